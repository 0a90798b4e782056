"""Which patches are applied where: on a CPU all that are listed, where CUDA is visible none.

Each finding is that of a process of its own, since patches cannot be taken back.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def test_on_a_cpu_exactly_the_listed_patches_are_applied(repo_root: Path) -> None:
    found = in_a_process_of_its_own(repo_root, "cpu")
    rows = [
        line.split("`")[1]
        for line in (repo_root / "patches" / "README.md").read_text().splitlines()
        if line.startswith("| `megatron_cpu/")
    ]
    assert sorted(f"megatron_cpu/{name}.py" for name in found["applied"]) == sorted(rows)
    assert found["errors"] == []
    assert found["modules with a stand-in for torch"] > 30
    assert found["replaced"] == found["replaceable"]


def test_where_cuda_is_visible_no_patch_is_applied(repo_root: Path) -> None:
    found = in_a_process_of_its_own(repo_root, "cuda")
    assert found["errors"] == [
        "the CPU patches for megatron-core must not be applied where CUDA is available",
        "the CPU patches of SGLang were asked for on a machine with CUDA",
    ]
    assert (found["applied"], found["replaced"], found["modules with a stand-in for torch"]) == ([], [], 0)
    assert found["stubs"] == []
    assert not found["megatron is blocked"]


def in_a_process_of_its_own(repo_root: Path, device: str) -> dict[str, Any]:
    command = [sys.executable, __file__, device]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def report(device: str) -> dict[str, Any]:
    import torch

    if device == "cuda":
        torch.cuda.is_available = lambda: True
    from megatron.core import optimizer  # noqa: F401

    from megatron_fipo.patches.megatron_cpu import apply_patches
    from megatron_fipo.patches.sglang_cpu.apply import apply_sglang_cpu

    found: dict[str, Any] = {"applied": [], "errors": []}
    for apply in (apply_patches, *([apply_sglang_cpu] if device == "cuda" else [])):
        try:
            found["applied"] += apply() or ()
        except RuntimeError as error:
            found["errors"].append(str(error))
    modules = [module for name, module in sys.modules.items() if name.startswith("megatron.core")]
    found["modules with a stand-in for torch"] = sum(getattr(module, "torch", torch) is not torch for module in modules)
    found["stubs"] = [type(finder).__name__ for finder in sys.meta_path if "Stub" in type(finder).__name__]
    found["megatron is blocked"] = sys.modules["megatron"] is None
    found["replaceable"] = sorted(functions())
    found["replaced"] = sorted(name for name, function in functions().items() if is_ours(function))
    return found


def functions() -> dict[str, Any]:
    """megatron-core's functions that the patches declare to replace, as they are now, where they are called from."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
    import check_patches

    found = {}
    for patch in check_patches.read_patches():
        for symbol in patch.replaces if patch.upstream == "megatron-core" else ():
            module, _, dotted = symbol.partition(":")
            if dotted in ("torch.cuda", "te_general_gemm") or module.endswith("moe_utils"):
                continue  # no function; called through another module's name
            value = importlib.import_module(module)
            for name in dotted.split("."):
                value = getattr(value, name)
            found[symbol] = value
    return found


def is_ours(function: Any) -> bool:
    function = getattr(function, "__func__", function)
    return "patches" in getattr(getattr(function, "__code__", None), "co_filename", "")


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1])))
