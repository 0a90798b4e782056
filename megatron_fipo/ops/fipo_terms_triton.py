"""The steps of `fipo_terms` around its scan as Triton kernels: shifts before it, clipped losses and gradient after it.

The scan between them is future_kl_triton.py's: it works in tiles that wait for one another, these in independent ones,
and reading the shifts once more costs less than a second kernel that waits. The kernels have run under Triton's
interpreter only, never on a GPU; they compile for compute capability 9.0. Written for triton 3.6 and 3.9.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_LEN = 1024  # tokens per program; not tuned, since never timed
NUM_WARPS = 4
SUM_LEN = 128  # partial sums added at once

CLIPPED: tl.constexpr = tl.constexpr(1)  # bits of a token's decisions
DUAL_CLIPPED: tl.constexpr = tl.constexpr(2)


@dataclass(frozen=True, eq=False)
class ClippedTerms:
    """What `clip_sequences` gives."""

    gradient: Tensor  # [T], dtype of the shifts
    decisions: Tensor  # [T] uint8, CLIPPED + DUAL_CLIPPED
    loss_sums: Tensor  # [num_seqs] float64
    num_tokens: Tensor  # [num_seqs] int64
    num_dual_clipped: Tensor  # [num_seqs] int64


def masked_shifts(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, bound: float, *, tile_len: int = TILE_LEN
) -> tuple[Tensor, Tensor]:
    """(d, outside): d = clamp(logprobs - old_logprobs, -bound, bound), 0 off the mask; where the clamp took effect.

    All [T]: log-probs fp32 or float64, mask and outside bool. An infinite log-prob in the mask makes d NaN.
    """
    shift = torch.empty_like(logprobs, memory_format=torch.contiguous_format)
    outside = torch.empty_like(shift, dtype=torch.uint8)
    num_tokens = shift.numel()
    if num_tokens > 0:
        _shift_tile[(triton.cdiv(num_tokens, tile_len),)](
            logprobs.contiguous(),
            old_logprobs.contiguous(),
            mask.contiguous().view(torch.uint8),
            shift,
            outside,
            num_tokens,
            BOUND=bound,
            TILE_LEN=tile_len,
            num_warps=NUM_WARPS,
        )
    return shift, outside.view(torch.bool)


def clip_sequences(
    shift: Tensor,
    outside: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    token_weights: Tensor | None,
    offsets: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    tile_len: int = TILE_LEN,
) -> ClippedTerms:
    """The clipped loss summed over each sequence, and its gradient by the log-probs.

    shift, outside: of `masked_shifts`. advantages, weights (f, inside the clip), token_weights (w, outside of it): [T]
    in shift's dtype; None: all are 1. offsets: [num_seqs + 1] int64. Sums are made in a fixed order, so a run repeats
    bit for bit.
    """
    num_tokens, num_seqs = shift.numel(), offsets.numel() - 1
    # a program per tile of a sequence: at most this many, and which one is whose is looked up on the device
    num_programs = triton.cdiv(num_tokens, tile_len) + num_seqs
    first_programs = torch.nn.functional.pad(
        (offsets.diff() + tile_len - 1).div(tile_len, rounding_mode="floor"), (1, 0)
    )
    first_programs = first_programs.cumsum(0)
    gradient, decisions = torch.empty_like(shift), torch.empty_like(outside, dtype=torch.uint8)
    partial_sums = torch.empty(num_programs, dtype=torch.float64, device=shift.device)
    partial_counts = torch.empty(2, num_programs, dtype=torch.int64, device=shift.device)
    loss_sums = torch.empty(num_seqs, dtype=torch.float64, device=shift.device)
    counts = torch.empty(2, num_seqs, dtype=torch.int64, device=shift.device)
    if num_seqs > 0:
        _clip_tile[(num_programs,)](
            shift,
            outside.view(torch.uint8),
            advantages.contiguous(),
            mask.contiguous().view(torch.uint8),
            shift if weights is None else weights.contiguous(),
            shift if token_weights is None else token_weights.contiguous(),
            offsets,
            first_programs,
            gradient,
            decisions,
            partial_sums,
            partial_counts,
            num_seqs,
            num_programs,
            RATIO_LOW=1 - clip_low,
            RATIO_HIGH=1 + clip_high,
            DUAL_CLIP=math.inf if dual_clip is None else dual_clip,
            HAS_WEIGHTS=weights is not None,
            HAS_TOKEN_WEIGHTS=token_weights is not None,
            TILE_LEN=tile_len,
            num_warps=NUM_WARPS,
        )
        _sum_programs[(num_seqs,)](
            first_programs, partial_sums, partial_counts, loss_sums, counts, num_seqs, num_programs, SUM_LEN=SUM_LEN
        )
    return ClippedTerms(gradient, decisions, loss_sums, counts[0], counts[1])


@triton.jit
def _shift_tile(
    logprobs_ptr,
    old_logprobs_ptr,
    mask_ptr,
    shift_ptr,
    outside_ptr,
    num_tokens,
    BOUND: tl.constexpr,
    TILE_LEN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TILE_LEN + tl.arange(0, TILE_LEN)
    is_token = token < num_tokens
    is_taken = tl.load(mask_ptr + token, mask=is_token, other=0) != 0
    delta = tl.load(logprobs_ptr + token, mask=is_taken, other=0.0)
    delta = delta - tl.load(old_logprobs_ptr + token, mask=is_taken, other=0.0)
    bound = tl.full([], BOUND, delta.dtype)
    # 0 times an infinity is NaN: the clamp alone would make an ordinary shift of it
    shift = tl.where(delta > bound, bound, tl.where(delta < -bound, -bound, delta)) + delta * 0.0
    tl.store(shift_ptr + token, shift, mask=is_token)
    tl.store(outside_ptr + token, ((delta > bound) | (delta < -bound)).to(tl.uint8), mask=is_token)


@triton.jit
def _clip_tile(
    shift_ptr,  # [T] fp32 or float64
    outside_ptr,  # [T] uint8
    advantages_ptr,  # [T] as shift
    mask_ptr,  # [T] uint8
    weights_ptr,  # [T] as shift, read if HAS_WEIGHTS
    token_weights_ptr,  # [T] as shift, read if HAS_TOKEN_WEIGHTS
    offsets_ptr,  # [num_seqs + 1] int64
    first_programs_ptr,  # [num_seqs + 1] int64, the first program of each sequence
    gradient_ptr,  # [T] as shift
    decisions_ptr,  # [T] uint8
    partial_sums_ptr,  # [num_programs] float64
    partial_counts_ptr,  # [2, num_programs] int64: response tokens, dual-clipped ones
    num_seqs,
    num_programs,
    RATIO_LOW: tl.constexpr,
    RATIO_HIGH: tl.constexpr,
    DUAL_CLIP: tl.constexpr,  # inf: off
    HAS_WEIGHTS: tl.constexpr,
    HAS_TOKEN_WEIGHTS: tl.constexpr,
    TILE_LEN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if program >= tl.load(first_programs_ptr + num_seqs):
        return
    sequence = _sequence_of(first_programs_ptr, program, num_seqs)
    tile = program - tl.load(first_programs_ptr + sequence)
    token = tl.load(offsets_ptr + sequence) + tile * TILE_LEN + tl.arange(0, TILE_LEN)
    is_token = token < tl.load(offsets_ptr + sequence + 1)
    is_taken = tl.load(mask_ptr + token, mask=is_token, other=0) != 0
    shift = tl.load(shift_ptr + token, mask=is_token, other=0.0)
    weighted = tl.load(advantages_ptr + token, mask=is_taken, other=0.0)
    if HAS_WEIGHTS:
        weighted *= tl.load(weights_ptr + token, mask=is_taken, other=0.0)
    low, high = tl.full([], RATIO_LOW, shift.dtype), tl.full([], RATIO_HIGH, shift.dtype)
    ratio = tl.exp(shift)
    in_range = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    plain, bounded = -weighted * ratio, -weighted * in_range
    is_clipped = bounded > plain
    loss = tl.where(is_clipped, bounded, plain)
    bound = -weighted * tl.full([], DUAL_CLIP, shift.dtype)
    is_dual_clipped = (weighted < 0.0) & (loss > bound)
    loss = tl.where(is_dual_clipped, bound, loss)
    is_outside = tl.load(outside_ptr + token, mask=is_token, other=0) != 0
    slope = tl.where(is_outside, plain * 0.0, plain)
    if HAS_TOKEN_WEIGHTS:
        token_weight = tl.load(token_weights_ptr + token, mask=is_taken, other=0.0)
        loss *= token_weight
        slope *= token_weight
    tl.store(gradient_ptr + token, tl.where(is_clipped | is_dual_clipped, 0.0, slope), mask=is_token)
    decision = is_clipped.to(tl.uint8) * CLIPPED + is_dual_clipped.to(tl.uint8) * DUAL_CLIPPED
    tl.store(decisions_ptr + token, decision.to(tl.uint8), mask=is_token)
    tl.store(partial_sums_ptr + program, tl.sum(loss.to(tl.float64), axis=0))
    tl.store(partial_counts_ptr + program, tl.sum(is_taken.to(tl.int64), axis=0))
    tl.store(partial_counts_ptr + num_programs + program, tl.sum(is_dual_clipped.to(tl.int64), axis=0))


@triton.jit
def _sum_programs(
    first_programs_ptr,
    partial_sums_ptr,
    partial_counts_ptr,
    loss_sums_ptr,
    counts_ptr,
    num_seqs,
    num_programs,
    SUM_LEN: tl.constexpr,
):
    """Add up the partial sums of one sequence's programs."""
    sequence = tl.program_id(0).to(tl.int64)
    program = tl.load(first_programs_ptr + sequence)
    end = tl.load(first_programs_ptr + sequence + 1)
    losses = tl.zeros([SUM_LEN], tl.float64)
    tokens, dual_clipped = tl.zeros([SUM_LEN], tl.int64), tl.zeros([SUM_LEN], tl.int64)
    while program < end:
        place = program + tl.arange(0, SUM_LEN)
        is_own = place < end
        losses += tl.load(partial_sums_ptr + place, mask=is_own, other=0.0)
        tokens += tl.load(partial_counts_ptr + place, mask=is_own, other=0)
        dual_clipped += tl.load(partial_counts_ptr + num_programs + place, mask=is_own, other=0)
        program += SUM_LEN
    tl.store(loss_sums_ptr + sequence, tl.sum(losses, axis=0))
    tl.store(counts_ptr + sequence, tl.sum(tokens, axis=0))
    tl.store(counts_ptr + num_seqs + sequence, tl.sum(dual_clipped, axis=0))


@triton.jit
def _sequence_of(first_programs_ptr, program, num_seqs):
    """The sequence whose programs include this one: first_programs[i] <= program < first_programs[i + 1]."""
    low, high = program * 0, program * 0 + num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        is_right = tl.load(first_programs_ptr + middle) <= program
        low = tl.where(is_right, middle, low)
        high = tl.where(is_right, high, middle - 1)
    return low
