"""Give megatron-core's modules a `torch` whose CUDA calls mean the CPU.

Why: megatron-core asks `torch.cuda.current_device()` for every buffer, makes streams and events, and synchronises.
Upstream: about 30 modules of megatron.core, e.g. tensor_parallel.mappings, pipeline_parallel.p2p_communication,
    distributed.param_and_grad_buffer, optimizer.optimizer, dist_checkpointing.strategies.filesystem_async.
Drop-when: megatron-core takes its device from an argument, or from torch.accelerator.
Test: tests/distributed/test_patch_megatron.py::test_torch_on_cpu_is_needed

Only the name `torch` inside megatron.core's own modules changes; the rest of the process sees the real one.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any, Final

import torch

REPLACES: Final = {
    "megatron.core:torch.cuda": "60a5810daf29f238",
}

_CPU = torch.device("cpu")

# Modules that megatron.core imports lazily and that name CUDA: loaded first so that they are covered too.
_LAZY_MODULES = (
    "megatron.core.parallel_state",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)

_FACTORIES = (
    "arange as_tensor empty empty_like empty_strided full full_like ones ones_like rand randint randn tensor zeros "
    "zeros_like"
).split()


def apply() -> None:
    """Replace `torch` in every loaded megatron.core module."""
    for name in _LAZY_MODULES:
        importlib.import_module(name)
    stand_in = _torch_for_cpu()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]


class _Idle:
    """A stream or an event on a device that has neither: everything is done when it is asked for."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def record_event(self, event: object = None) -> _Idle:
        return self

    def synchronize(self) -> None:
        pass


def _nothing(*args: object, **kwargs: object) -> None:
    pass


class _Namespace(types.ModuleType):
    """A module that answers some names itself and leaves the others to the module it stands for."""

    def __init__(self, base: types.ModuleType, own: dict[str, Any]) -> None:
        super().__init__(base.__name__)
        self.__dict__.update(own)
        self.__dict__["_base"] = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)


def _torch_for_cpu() -> types.ModuleType:
    nvtx = {"range_push": _nothing, "range_pop": _nothing, "range": lambda *a, **k: contextlib.nullcontext()}
    cuda = _Namespace(
        torch.cuda,
        {
            "current_device": lambda: _CPU,
            "set_device": _nothing,
            "synchronize": _nothing,
            "empty_cache": _nothing,
            "Stream": _Idle,
            "Event": _Idle,
            "current_stream": lambda *a: _Idle(),
            "default_stream": lambda *a: _Idle(),
            "stream": lambda s: contextlib.nullcontext(),
            "manual_seed": torch.manual_seed,
            "get_rng_state": lambda *a, **k: torch.get_rng_state(),
            "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
            "nvtx": _Namespace(torch.cuda.nvtx, nvtx),
        },
    )
    own: dict[str, Any] = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    return _Namespace(torch, {**own, "cuda": cuda})


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`factory` with any CUDA device read as the CPU, and no pinned memory."""

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if isinstance(device, int) or str(device).startswith("cuda"):
            kwargs["device"] = _CPU
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return call
