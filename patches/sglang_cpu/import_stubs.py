"""Let `import triton` and `import torchvision` succeed where the packages are absent.

Why: sglang imports triton in over 400 modules and torchvision.transforms in one configuration module, whatever the
    device. Neither has a CPU wheel that fits beside a CPU torch, and no CPU path calls either.
Upstream: sglang.srt.utils.common (`import triton`), sglang.srt.configs.deepseek_ocr (`from torchvision.transforms`).
Drop-when: both imports are lazy upstream, or CPU wheels of both packages are installed (then nothing is stubbed).
Test: tests/distributed/test_patch_sglang.py
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

REPLACES: Final = {
    "sglang.srt.utils.common:triton": "0eec14eceb95f9bb",
}

STUBBED_PACKAGES = ("triton", "torchvision")
_STUB_VERSION = "3.6.0"  # of triton, as sglang compares it at import


def install_import_stubs() -> tuple[str, ...]:
    """Stub whichever of triton and torchvision is absent; returns the names stubbed. Calling it again changes nothing.

    A stub imports, decorates and subclasses; running a stubbed kernel or function raises RuntimeError.
    """
    if any(isinstance(finder, _StubFinder) for finder in sys.meta_path):
        return ()
    absent = tuple(name for name in STUBBED_PACKAGES if importlib.util.find_spec(name) is None)
    if "torchvision" in absent:
        # transformers asks importlib whether torchvision exists and remembers the answer: let it ask before the stub.
        from transformers.utils.import_utils import is_torchvision_available

        assert not is_torchvision_available()
    if absent:
        sys.meta_path.append(_StubFinder(absent))
    return absent


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for the absent packages and all their submodules; comes last, so that a real module always wins."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []
        if module.__name__ == "triton":
            module.__dict__["__version__"] = _STUB_VERSION


class _StubModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _stub_attribute(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


def _stub_attribute(full_name: str) -> Any:
    """A class for capitalised names (bases and annotations), a decorator or dtype stand-in for all others."""
    short_name = full_name.rpartition(".")[2]
    if short_name[:1].isupper():
        return type(short_name, (), {"__init__": lambda self, *args, **kwargs: None, "__module__": full_name})
    return _StubFunction(full_name)


class _StubFunction:
    """Stands for `triton.jit`, `triton.autotune(...)`, `tl.constexpr` and the like while modules are imported."""

    def __init__(self, full_name: str) -> None:
        self.full_name = full_name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], types.FunctionType | _StubKernel):
            return _StubKernel(args[0].__name__)  # @triton.jit
        return _stub_decorator  # @triton.autotune(configs=...), @triton.jit(launch_metadata=...)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stub_attribute(f"{self.full_name}.{name}")


def _stub_decorator(function: Callable[..., Any] | _StubKernel) -> _StubKernel:
    return _StubKernel(function.__name__)


class _StubKernel:
    """A decorated kernel: keeps its name, refuses to run."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getitem__(self, grid: object) -> Callable[..., NoReturn]:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(f"the kernel {self.__name__} was called, but triton is not installed on this machine")
