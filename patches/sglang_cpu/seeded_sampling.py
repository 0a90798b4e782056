"""Draw tokens from one uniform number per (seed, position): SGLang's `sampling_seed`, at a tenth of the cost on CPU.

Why: SGLang's own seeded sampler hashes every (row, vocabulary entry) and takes two float64 logarithms of it: about
    100 ms per decode step for 64 rows of 49k entries on one core, as long as the model's forward pass.
Upstream: sglang.srt.layers.sampler.multinomial_with_seed; hook: sglang.srt.layers.sampler.register_sampler_backend
    (under the name "pytorch", because deterministic mode forces that backend)
Drop-when: upstream draws from the cumulative distribution, or deterministic mode leaves the sampling backend alone.
Test: tests/unit/test_patch_sglang_sampling.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

_MASK = (1 << 64) - 1


def register_seeded_sampler() -> None:
    """Make every sampler SGLang builds in this process ours. To be called before the model runner is built."""
    from sglang.srt.layers.sampler import Sampler, register_sampler_backend

    class SeededSampler(Sampler):
        """SGLang's sampler with its drawing step replaced; logits, log-probs and greedy decoding stay SGLang's."""

        def _sample_from_probs(
            self, probs: Tensor, sampling_info: SamplingBatchInfo, positions: Tensor, simple_sampling_case: bool
        ) -> tuple[Tensor, Any]:
            seeded = sampling_info.sampling_seed is not None
            if not seeded or sampling_info.need_min_p_sampling or sampling_info.sampling_mask_batch_indices is not None:
                return super()._sample_from_probs(probs, sampling_info, positions, simple_sampling_case)
            uniform = uniform_from_seed(sampling_info.sampling_seed, positions)
            if simple_sampling_case:
                return draw_from_cdf(probs, uniform).to(torch.int32), None
            return draw_top_k_top_p(probs, sampling_info.top_ks, sampling_info.top_ps, uniform).to(torch.int32), None

    register_sampler_backend("pytorch", SeededSampler)


def uniform_from_seed(seeds: Tensor, positions: Tensor) -> Tensor:
    """One number in (0, 1) per row, a function of seed and position alone.

    seeds, positions: [B] int64. Returns [B] float64: the top 53 bits of SplitMix64 (Steele, Lea & Flood 2014, the
    `mix64variant13` finaliser) over both, moved half a step away from 0.
    """
    values = [
        ((_mix64(_mix64(seed) + position) >> 11) + 0.5) * 2.0**-53
        for seed, position in zip(seeds.tolist(), positions.tolist(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64, device=seeds.device)


def draw_from_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The index at which the cumulative sum of a row's weights first exceeds uniform x total.

    weights: [B, V] non-negative fp32, need not add up to 1. uniform: [B] float64 in (0, 1). Returns [B] int64; an entry
    of weight 0 is never drawn.
    """
    cumulative = torch.cumsum(weights, dim=-1, dtype=torch.float64)
    threshold = uniform.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_max_(weights.shape[-1] - 1)


def draw_top_k_top_p(probs: Tensor, top_ks: Tensor, top_ps: Tensor, uniform: Tensor) -> Tensor:
    """Draw among the `top_ks` most probable entries and, of these, the shortest prefix whose sum reaches `top_ps`.

    probs: [B, V] fp32, rows add up to 1. top_ks: [B] int. top_ps: [B] fp32. uniform: [B] float64. Returns [B] int64.
    """
    sorted_probs, token_ids = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.shape[-1], device=probs.device)
    sum_before = torch.cumsum(sorted_probs, dim=-1, dtype=torch.float64) - sorted_probs
    outside = (rank >= top_ks.unsqueeze(-1)) | (sum_before > top_ps.unsqueeze(-1))
    sorted_probs.masked_fill_(outside, 0.0)
    return token_ids.gather(-1, draw_from_cdf(sorted_probs, uniform).unsqueeze(-1)).squeeze(-1)


def _mix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
