"""Each patch of SGLang does its job, and each fails this test once SGLang no longer needs it.

SGLang is imported in one process of its own: importing it changes transformers for everybody in the process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_fipo.patches.sglang_cpu.plugin import ASKED_FOR, activate

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
TRITON_ABSENT = importlib.util.find_spec("triton") is None


@pytest.fixture(scope="module")
def patched() -> dict[str, Any]:
    """What `_report` found in a process with the patches."""
    package = "megatron_fipo.patches.sglang_cpu.models"
    settings = {ASKED_FOR: "1", "SGLANG_EXTERNAL_MODEL_PACKAGE": package, "TORCHDYNAMO_DISABLE": "1"}
    environment = {**os.environ, **settings, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.skipif(not TRITON_ABSENT, reason="triton is installed: there is nothing to stub")
def test_sglang_cannot_be_imported_without_the_stubs() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", "import sglang"], capture_output=True, text=True, check=False, timeout=300
    )
    assert "No module named 'triton'" in answer.stderr


def test_only_absent_packages_are_stubbed(patched) -> None:
    absent = [name for name in ("triton", "torchvision") if importlib.util.find_spec(name) is None]
    assert patched["stubbed"] == absent
    assert patched["stubbed_again"] == []


def test_a_stubbed_kernel_refuses_to_run_and_transformers_is_not_fooled(patched) -> None:
    assert patched["kernel"] == ("some_kernel" if TRITON_ABSENT else "triton")
    assert patched["torchvision_available"] is (importlib.util.find_spec("torchvision") is not None)


def test_the_platform_is_ours_and_sglangs_own_still_has_no_attention_backend(patched) -> None:
    assert patched["platform"] == "NativeCpuPlatform"
    assert patched["attention_backend"] == "torch_native"
    assert patched["base_platform"] == "NotImplementedError"


def test_sglang_outside_our_engines_is_left_to_choose_its_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ASKED_FOR, raising=False)
    assert activate() is None
    monkeypatch.setenv(ASKED_FOR, "1")
    assert activate() == "megatron_fipo.patches.sglang_cpu.platform.NativeCpuPlatform"


def test_deterministic_mode_accepts_torch_native_only_through_the_patch(patched) -> None:
    assert patched["deterministic_before"] is False
    assert patched["deterministic_after"] is True
    assert "No supported accelerator" in patched["batch_invariant_before"]
    assert patched["batch_invariant_after"] == "None"


def test_seeded_draws_are_ours_and_sglangs_still_need_a_kernel(patched) -> None:
    assert patched["sampler"] == "SeededSampler"
    assert patched["sglang_draw"] == "No module named 'sgl_kernel'"


def test_batched_attention_equals_sglangs_and_is_faster(patched) -> None:
    assert patched["attention_class"] == "BatchedTorchAttention"
    assert patched["attention_difference"] < 1e-6
    assert patched["attention_ms"] < patched["sglang_attention_ms"]


def test_children_are_forked_although_sglang_asks_for_spawn(patched) -> None:
    assert patched["process_class"] == "ForkProcess"
    assert patched["asks_for_spawn"]


def test_megatron_stays_out_of_the_engine_although_sglang_asks_for_it(patched) -> None:
    assert patched["dumper_asks_for_megatron"]
    assert patched["megatron"] == "None"


def test_our_families_load_without_the_whole_registry(patched) -> None:
    assert patched["families"] == list(FAMILIES)
    assert patched["registry_untouched"]


def _report() -> dict[str, Any]:
    from megatron_fipo.patches.sglang_cpu.apply import apply_sglang_cpu
    from megatron_fipo.patches.sglang_cpu.import_stubs import install_import_stubs

    report: dict[str, Any] = {"stubbed": install_import_stubs(), "stubbed_again": install_import_stubs()}
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups import choices

    report["deterministic_before"] = "torch_native" in choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES
    report["batch_invariant_before"] = _outcome(batch_invariant_ops.enable_batch_invariant_mode)
    apply_sglang_cpu()
    report["deterministic_after"] = "torch_native" in choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES
    report["batch_invariant_after"] = _outcome(batch_invariant_ops.enable_batch_invariant_mode)
    report |= _report_stubs() | _report_platform() | _report_sampler() | _report_attention() | _report_process()
    from sglang.srt.models.registry import ModelRegistry

    report |= _report_megatron()
    report["families"] = [ModelRegistry.resolve_model_cls([name])[0].__name__ for name in FAMILIES]
    report["registry_untouched"] = not ModelRegistry._default_models_loaded
    return report


def _outcome(function: Callable[[], object]) -> str:
    try:
        return str(function())
    except RuntimeError as error:
        return str(error)


def _report_stubs() -> dict[str, Any]:
    from transformers.utils.import_utils import is_torchvision_available

    kernel = "triton"
    if TRITON_ABSENT:
        import triton

        @triton.autotune(configs=[triton.Config({})], key=[])
        @triton.jit
        def some_kernel() -> None:
            return

        try:
            some_kernel[(1,)](3)
        except RuntimeError as error:
            kernel = str(error).split()[2]
    return {"kernel": kernel, "torchvision_available": is_torchvision_available()}


def _report_platform() -> dict[str, Any]:
    from sglang.srt.platforms import current_platform
    from sglang.srt.platforms.interface import SRTPlatform

    try:
        base = SRTPlatform().get_default_attention_backend()
    except NotImplementedError:
        base = "NotImplementedError"
    return {
        "platform": type(current_platform).__name__,
        "attention_backend": current_platform.get_default_attention_backend(),
        "base_platform": base,
    }


def _report_sampler() -> dict[str, Any]:
    from sglang.srt.layers import sampler

    rows = torch.randn(2, 8).log_softmax(-1)
    try:
        sampler.multinomial_with_seed(rows, torch.arange(2), torch.arange(2))
        outcome = "it ran"
    except ModuleNotFoundError as error:
        outcome = str(error)
    return {"sampler": sampler._CUSTOM_SAMPLER_FACTORIES["pytorch"].__name__, "sglang_draw": outcome}


def _report_attention() -> dict[str, Any]:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from megatron_fipo.patches.sglang_cpu.batched_attention import attend, plan_groups

    batch, longest = 32, 48
    contexts = torch.arange(batch) + longest - batch + 1
    slots = torch.randint(1, 4000, (batch, longest), dtype=torch.int32)
    keys, values, query = torch.randn(4000, 3, 64), torch.randn(4000, 3, 64), torch.randn(batch, 9, 64)
    groups = plan_groups(slots, contexts, torch.ones_like(contexts))

    def by_sglang() -> torch.Tensor:
        return TorchNativeAttnBackend._run_sdpa_forward_decode(
            None,
            query,
            torch.empty_like(query),
            keys,
            values,
            slots,
            torch.arange(batch),
            contexts,
            scaling=0.125,
            enable_gqa=True,
        )

    return {
        "attention_class": ATTENTION_BACKENDS["torch_native"].__name__,
        "attention_difference": float((attend(query, keys, values, groups, 0.125) - by_sglang()).abs().max()),
        "attention_ms": _fastest_ms(lambda: attend(query, keys, values, groups, 0.125)),
        "sglang_attention_ms": _fastest_ms(by_sglang),
    }


def _report_process() -> dict[str, Any]:
    import inspect

    from sglang.srt.entrypoints import engine

    asks = 'set_start_method("spawn", force=True)' in inspect.getsource(engine)
    return {"process_class": engine.mp.Process.__name__, "asks_for_spawn": asks}


def _report_megatron() -> dict[str, Any]:
    import inspect

    from sglang.srt.debug_utils import dumper

    asks = "from megatron.core import" in inspect.getsource(dumper._MegatronPlugin)
    return {"dumper_asks_for_megatron": asks, "megatron": str(sys.modules.get("megatron"))}


def _fastest_ms(function: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times) * 1e3


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_report()))
