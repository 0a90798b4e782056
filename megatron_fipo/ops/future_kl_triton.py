"""Future-KL and influence weights on CUDA: one pass over the packed tokens, parallel along them. Derivation: README.md.

The kernel has run under Triton's interpreter only, never on a GPU; it compiles for compute capability 9.0. Written for
triton 3.6 and 3.9.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_LEN = 2048  # tokens per program, 8 per thread; not tuned, since never timed
NUM_WARPS = 8
# below this a tile's decays multiply to nearly the smallest float64, and must be kept from becoming 0
SMALLEST_TILE_DECAY: tl.constexpr = tl.constexpr(1e-290)

SHIFT_BOUND: tl.constexpr = tl.constexpr(20.0)  # as in future_kl.py
RELEASED_LOW: tl.constexpr = tl.constexpr(0.8)
RELEASED_HIGH: tl.constexpr = tl.constexpr(1.0)


@dataclass(frozen=True)
class InfluenceBounds:
    """The numbers of the influence weights: `influence_weights`' arguments, dual_clip as its logarithm."""

    log_dual_clip: float
    influence_low: float
    influence_high: float
    safety_threshold: float
    is_released: bool


def scan_future_kl(
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    gamma: float,
    carries: Tensor | None = None,
    *,
    row_len: int | None = None,
    tile_len: int = TILE_LEN,
) -> tuple[Tensor, Tensor]:
    """(F, totals) of F_t = values_t mask_t + gamma F_{t+1}, anew in every segment.

    values: [T] fp32 or float64; where mask [T] bool is 0 they may be NaN.
    offsets: [num_segments + 1] int64, first 0, last T, never falling.
    carries: [num_segments] float64, F at the token after each segment; None: 0.
    row_len: given when all segments have this length > 0: their ends are then computed, not looked up; no carries.
    tile_len: tokens per program, a power of 2.
    Returns F [T] in values' dtype, the float64 value rounded once, and totals [num_segments] float64, F at each
    segment's first token: 0 for an empty one, not written when row_len is given.
    """
    future = torch.empty_like(values, memory_format=torch.contiguous_format)
    return future, _launch(values, mask, None, offsets, gamma, carries, future, None, None, row_len, tile_len)


def scan_influence(
    delta_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    bounds: InfluenceBounds,
    offsets: Tensor,
    gamma: float,
    carries: Tensor | None = None,
    *,
    row_len: int | None = None,
    tile_len: int = TILE_LEN,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((f, F), totals) of `influence_weights` in one kernel: clamp, filter, scan, exp, clamp, safety rule.

    delta_logprobs [T] fp32 or float64, mask [T] bool, advantages [T] floating; the rest as in `scan_future_kl`. f and F
    have delta_logprobs' dtype.
    """
    future = torch.empty_like(delta_logprobs, memory_format=torch.contiguous_format)
    weights = torch.empty_like(future)
    totals = _launch(
        delta_logprobs, mask, advantages, offsets, gamma, carries, future, weights, bounds, row_len, tile_len
    )
    return (weights, future), totals


def _launch(
    values: Tensor,
    mask: Tensor,
    advantages: Tensor | None,
    offsets: Tensor,
    gamma: float,
    carries: Tensor | None,
    future: Tensor,
    weights: Tensor | None,
    bounds: InfluenceBounds | None,
    row_len: int | None,
    tile_len: int,
) -> Tensor:
    """Fill future and weights; return totals."""
    assert row_len is None or (row_len > 0 and carries is None), f"row_len {row_len} with carries"
    num_tokens, num_segments = values.numel(), offsets.numel() - 1
    num_tiles = triton.cdiv(num_tokens, tile_len)
    zeros = torch.zeros(num_segments + 1 + num_tiles, dtype=torch.int64, device=values.device)
    totals, board = zeros[:num_segments].view(torch.float64), zeros[num_segments:]
    if num_tokens == 0:
        return totals
    influence = bounds or InfluenceBounds(math.inf, 1.0, 1.0, math.inf, False)
    _scan_tile[(num_tiles,)](
        values.contiguous(),
        mask.contiguous().view(torch.uint8),
        values if advantages is None else advantages.contiguous(),
        offsets.contiguous(),
        totals if carries is None else carries.contiguous(),
        future,
        future if weights is None else weights,
        totals,
        board,
        num_tokens,
        num_segments,
        num_tiles,
        row_len or 1,
        GAMMA=gamma,
        LOG_DUAL_CLIP=influence.log_dual_clip,
        LOW=influence.influence_low,
        HIGH=influence.influence_high,
        LOG_LOW=math.log(influence.influence_low),
        LOG_HIGH=math.log(influence.influence_high),
        SAFETY_THRESHOLD=influence.safety_threshold,
        IS_RELEASED=influence.is_released,
        WITH_INFLUENCE=bounds is not None,
        HAS_CARRIES=carries is not None,
        IS_ROWS=row_len is not None,
        HAS_LONG_ROWS=row_len is not None and row_len >= tile_len,
        TILE_LEN=tile_len,
        num_warps=NUM_WARPS,
    )
    return totals


@triton.jit
def _scan_tile(
    values_ptr,  # [T] fp32 or float64: shifts
    mask_ptr,  # [T] uint8
    advantages_ptr,  # [T], read WITH_INFLUENCE
    offsets_ptr,  # [num_segments + 1] int64, read unless IS_ROWS
    carries_ptr,  # [num_segments] float64, read if HAS_CARRIES
    future_ptr,  # [T] as values
    weights_ptr,  # [T] as values, written WITH_INFLUENCE
    totals_ptr,  # [num_segments] float64, written unless IS_ROWS
    board_ptr,  # [1 + num_tiles] int64, zeros at the start: tickets taken, and what each tile owes its left neighbours
    num_tokens,
    num_segments,
    num_tiles,
    row_len,
    GAMMA: tl.constexpr,
    LOG_DUAL_CLIP: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LOG_LOW: tl.constexpr,
    LOG_HIGH: tl.constexpr,
    SAFETY_THRESHOLD: tl.constexpr,
    IS_RELEASED: tl.constexpr,
    WITH_INFLUENCE: tl.constexpr,
    HAS_CARRIES: tl.constexpr,
    IS_ROWS: tl.constexpr,
    HAS_LONG_ROWS: tl.constexpr,
    TILE_LEN: tl.constexpr,
):
    # Tiles are handed out from the right in the order in which programs start: whoever is waited for already runs.
    tile = num_tiles - 1 - tl.atomic_add(board_ptr, 1, sem="relaxed")  # int64, as all addresses below
    start = tile * TILE_LEN
    place = tl.arange(0, TILE_LEN)
    token = start + place
    is_token = token < num_tokens
    is_taken = tl.load(mask_ptr + token, mask=is_token, other=0) != 0
    shift = tl.where(is_taken, tl.load(values_ptr + token, mask=is_token, other=0.0), 0.0)
    kept = shift
    if WITH_INFLUENCE:
        shift = _clamp(shift, -SHIFT_BOUND, SHIFT_BOUND)
        kept = tl.where(shift > LOG_DUAL_CLIP, 0.0, shift)

    if IS_ROWS:
        is_end = _row_ends(start, place, row_len, HAS_LONG_ROWS, TILE_LEN)
    else:
        segment = _segments(offsets_ptr, token, start, tl.minimum(start + TILE_LEN, num_tokens) - 1, num_segments)
        is_end = token + 1 == tl.load(offsets_ptr + segment + 1)

    # F_t = total_t + decay_t F_{tile end}, where decay_t = 0 if a segment ends in between
    gamma = tl.full([TILE_LEN], GAMMA, tl.float64)
    total = kept.to(tl.float64)
    if HAS_CARRIES:
        total += gamma * tl.load(carries_ptr + segment, mask=is_end & is_token, other=0.0)
    is_end = is_end | (token >= num_tokens)
    decay = tl.where(is_end, 0.0, gamma)
    if GAMMA**TILE_LEN < SMALLEST_TILE_DECAY:
        decay, total = tl.associative_scan((decay, total), 0, _join_tiny, reverse=True)
    else:
        decay, total = tl.associative_scan((decay, total), 0, _join, reverse=True)

    last_end = tl.max(tl.where(is_end, place, -1), axis=0)
    first_total = tl.sum(tl.where(place == 0, total, 0.0), axis=0)
    _publish(board_ptr + 1 + tile, first_total, last_end >= 0)
    carry = _value_behind(board_ptr + 2 + tile, last_end == TILE_LEN - 1, GAMMA**TILE_LEN)
    total = tl.where(place > last_end, total + decay * carry, total)

    if not IS_ROWS:
        is_start = is_token & (token == tl.load(offsets_ptr + segment))
        tl.store(totals_ptr + segment, total, mask=is_start)
    future = total.to(future_ptr.dtype.element_ty)
    tl.store(future_ptr + token, future, mask=is_token)
    if WITH_INFLUENCE:
        influence = _clamp(tl.exp(_clamp(future, LOG_LOW, LOG_HIGH)), LOW, HIGH)
        advantage = tl.load(advantages_ptr + token, mask=is_token, other=0.0)
        is_unsafe = is_taken & (advantage < 0.0) & (tl.exp(shift) > SAFETY_THRESHOLD)
        if IS_RELEASED:
            influence = tl.where(is_unsafe, _clamp(influence, RELEASED_LOW, RELEASED_HIGH), influence)
        else:
            influence = tl.where(is_unsafe, 1.0, influence)
        tl.store(weights_ptr + token, influence, mask=is_token)


@triton.jit
def _publish(word_ptr, first_total, has_end):
    """Tell the left neighbours F at the tile's first token, given 0 behind the tile, and whether a segment ends in it.

    One word says all, so nothing needs ordering: bit 0 it is there, bit 1 has_end, and the rest is the float64, of
    whose 53 binary digits the last two are given up.
    """
    word = (first_total.to(tl.int64, bitcast=True) & -4) | 1
    tl.atomic_xchg(word_ptr, tl.where(has_end, word | 2, word), sem="relaxed")


@triton.jit
def _value_behind(word_ptr, has_end, TILE_DECAY: tl.constexpr):
    """F at the first token of the tile whose word this is: from its word and those to its right, up to one with an end.

    0, without reading any, if has_end from the start. A tile publishes its word before it waits for others, so no wait
    depends on another. The order of the sum is fixed.
    """
    tile_decay = tl.full([], TILE_DECAY, tl.float64)
    value = tile_decay * 0.0
    weight = value + 1.0
    while not has_end:
        word = tl.atomic_add(word_ptr, 0, sem="relaxed")
        while word == 0:
            word = tl.atomic_add(word_ptr, 0, sem="relaxed")
        value += weight * (word & -4).to(tl.float64, bitcast=True)
        weight *= tile_decay
        word_ptr += 1
        has_end = (word & 2) != 0
    return value


@triton.jit
def _row_ends(start, place, row_len, HAS_LONG_ROWS: tl.constexpr, TILE_LEN: tl.constexpr):
    """Which tokens start + place are the last of rows of row_len tokens; long rows have at most one end in a tile."""
    first_end = tl.minimum(row_len - start % row_len, TILE_LEN + 1).to(tl.int32)
    return place + 1 == first_end if HAS_LONG_ROWS else (place + 1 - first_end) % row_len == 0


@triton.jit
def _join(decay_right, total_right, decay_left, total_left):
    """Two neighbouring windows as one; nothing of the right one is read, not even a NaN, where the left one ends."""
    total = tl.where(decay_left == 0.0, total_left, total_left + decay_left * total_right)
    return decay_left * decay_right, total


@triton.jit
def _join_tiny(decay_right, total_right, decay_left, total_left):
    """`_join` for decays that could underflow to 0, which would pass for an end and hide a NaN to the right."""
    decay = tl.where((decay_left == 0.0) | (decay_right == 0.0), 0.0, tl.maximum(decay_left * decay_right, 1e-300))
    total = tl.where(decay_left == 0.0, total_left, total_left + decay_left * total_right)
    return decay, total


@triton.jit
def _segments(offsets_ptr, token, start, last, num_segments):
    """The segment of each token of a tile that holds tokens start to last; those behind it count as the last one."""
    first_segment = _segment_of(offsets_ptr, start, start * 0, start * 0 + num_segments - 1)
    last_segment = _segment_of(offsets_ptr, last, first_segment, start * 0 + num_segments - 1)
    return _segment_of(offsets_ptr, tl.minimum(token, last), first_segment, last_segment)


@triton.jit
def _segment_of(offsets_ptr, token, first, last):
    """The largest index in [first, last] with offsets[index] <= token: the segment, never an empty one, of a token.

    Scalars or tensors of int64; about log2(last - first) dependent reads.
    """
    found = token * 0 + first
    step = first * 0 + 1
    while step <= last - first:
        step *= 2
    while step > 1:
        step = step // 2
        probe = found + step
        is_inside = probe <= last
        offset = tl.load(offsets_ptr + probe, mask=is_inside, other=0)
        found = tl.where(is_inside & (offset <= token), probe, found)
    return found


@triton.jit
def _clamp(x, low, high):
    """A NaN stays one."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)
