"""Allow `enable_deterministic_inference` with the torch_native attention backend, so that requests can carry seeds.

Why: SGLang draws with a request's `sampling_seed` only in its deterministic mode, which accepts GPU attention backends
    alone and replaces GEMMs by triton kernels. On a CPU with a fixed number of threads PyTorch's operators already give
    the same bits for the same batch.
Upstream: sglang.srt.arg_groups.choices (two lists with public `add_*` hooks),
    sglang.srt.batch_invariant_ops.enable_batch_invariant_mode (raises without CUDA or XPU)
Drop-when: deterministic mode works on CPU upstream, or sampling_seed works without it.
Test: tests/distributed/test_patch_sglang.py, tests/e2e/test_engine.py
"""

from __future__ import annotations

from typing import Final

REPLACES: Final = {
    "sglang.srt.batch_invariant_ops:enable_batch_invariant_mode": "a30aa0b45ba02563",
    "sglang.srt.arg_groups.choices:DETERMINISTIC_ATTENTION_BACKEND_CHOICES": "d42d24f5d384eb8a",
}


def allow_deterministic_inference_on_cpu() -> None:
    """Register torch_native as deterministic (with the radix cache) and keep triton's GEMMs out of the way."""
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups import choices

    if "torch_native" not in choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES:
        choices.add_deterministic_attention_backend_choices(["torch_native"])
        choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    assert hasattr(batch_invariant_ops, "enable_batch_invariant_mode"), "sglang.srt.batch_invariant_ops has changed"
    batch_invariant_ops.enable_batch_invariant_mode = _keep_torch_operators


def _keep_torch_operators(enable_bmm: bool = True) -> None:
    """In place of triton's batch-invariant GEMMs: nothing. Results depend on the composition of the batch."""
