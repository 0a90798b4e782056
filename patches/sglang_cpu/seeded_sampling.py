"""Draw tokens by SGLang's `sampling_seed` with random bits that are cheap on a CPU.

Why: SGLang's own seeded sampler hashes by a kernel of sgl_kernel, which has no wheel for a CPU (and hashes every row
    and vocabulary entry in integers, then takes two float64 logarithms of each: as long as a small model's forward).
Upstream: sglang.srt.layers.sampler.multinomial_with_seed; hook: sglang.srt.layers.sampler.register_sampler_backend
    (under the name "pytorch", because deterministic mode forces that backend)
Drop-when: sglang.kernels.ops.sampling.murmur_hash runs without sgl_kernel, and fast.
Test: tests/unit/test_patch_sglang_sampling.py, tests/distributed/test_patch_sglang.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

REPLACES: Final = {
    "sglang.srt.layers.sampler:Sampler._sample_from_probs": "d7b95f7928f9e1ac",
    "sglang.srt.layers.sampler:multinomial_with_seed": "428f7f9bca592007",
    "sglang.srt.layers.sampler:register_sampler_backend": "9b05ecaf4c9bb192",
}


def register_seeded_sampler() -> None:
    """Make every sampler SGLang builds in this process ours. To be called before the model runner is built."""
    from sglang.srt.layers.sampler import Sampler, register_sampler_backend

    class SeededSampler(Sampler):
        """SGLang's sampler with its drawing step replaced; logits, log-probs and greedy decoding stay SGLang's."""

        def _sample_from_probs(
            self, probs: Tensor, sampling_info: SamplingBatchInfo, positions: Tensor, simple_sampling_case: bool
        ) -> tuple[Tensor, Any]:
            seeds = sampling_info.sampling_seed
            if (
                seeds is None
                or sampling_info.need_min_p_sampling
                or sampling_info.sampling_mask_batch_indices is not None
            ):
                return super()._sample_from_probs(probs, sampling_info, positions, simple_sampling_case)
            if not simple_sampling_case:
                probs = keep_top_k_top_p(probs, sampling_info.top_ks, sampling_info.top_ps)
            return draw(probs, seeds, positions).to(torch.int32), None

    assert hasattr(Sampler, "_sample_from_probs"), "sglang.srt.layers.sampler.Sampler has changed"
    register_sampler_backend("pytorch", SeededSampler)


def draw(weights: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """One index per row with probability proportional to its weight, a function of the row, its seed and position.

    An exponential race: entry i arrives at time E_i / weight_i, E_i exponential, and the first one wins. A small change
    of the weights (another batch, another GEMM kernel) changes the winner only where two arrivals were that close.
    weights: [B, V] non-negative fp32, need not add up to 1. seeds, positions: [B] int64. Returns [B] int64.
    """
    vocab_size = weights.shape[-1]
    bits = np.empty((len(seeds), vocab_size + vocab_size % 2), dtype=np.uint32)
    for row, key in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        bits[row] = np.random.SFC64(key).random_raw(bits.shape[1] // 2).view(np.uint32)
    # u in (0, 1]: 32 random bits, so that the smallest arrival times are resolved to 1e-10; u == 1 never arrives.
    uniform = torch.from_numpy(bits[:, :vocab_size].astype(np.float32)).add_(0.5).mul_(2.0**-32)
    exponential = uniform.neg_().log1p_().neg_()
    return torch.argmax(weights / exponential, dim=-1)


def keep_top_k_top_p(probs: Tensor, top_ks: Tensor, top_ps: Tensor) -> Tensor:
    """`probs` with 0 outside the `top_ks` most probable entries and, of these, outside the shortest prefix that reaches
    a sum of `top_ps`.

    probs: [B, V] fp32, rows add up to 1. top_ks: [B] int. top_ps: [B] fp32.
    """
    sorted_probs, token_ids = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.shape[-1], device=probs.device)
    sum_before = torch.cumsum(sorted_probs, dim=-1, dtype=torch.float64) - sorted_probs
    outside = (rank >= top_ks.unsqueeze(-1)) | (sum_before >= top_ps.unsqueeze(-1))
    return torch.zeros_like(probs).scatter_(-1, token_ids, sorted_probs.masked_fill_(outside, 0.0))
