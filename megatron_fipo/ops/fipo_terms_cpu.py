"""The loops of `fipo_terms` on CPU, compiled by numba on first use; import this module only where they are called.

Blocks of tokens go from the end of a sequence to its start; what the steps of a block hand on stays in the cache.
Every step is a plain loop over few arrays, which is what LLVM turns into vector instructions; the scan alone goes
token by token. Elements are computed in the tokens' dtype, as the eager form does, sums and the scan in float64.
No fastmath flag here drops a NaN: `contract` allows fused multiply-add, `reassoc` a sum in any order.
Without token weights (None, a type of its own to numba) the loops are compiled as if there were no such thing.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit

BLOCK_LEN = 1024  # tokens; the block's arrays take 35 KB in float64, 23 KB in fp32
LOG2_E = math.log2(math.e)
LN2_HIGH = 6.93147180369123816490e-01  # ln 2 = high + low; n * high is exact for |n| < 2^20
LN2_LOW = 1.90821492927058770002e-10
ROUNDER = 1.5 * 2.0**52  # x + this - this rounds to an integer, which the low bits of the sum hold
ONE_BITS = np.int64(0x3FF0000000000000)  # 1.0; its exponent field starts at bit 52
EXP_RANGE = 700.0  # beyond it 2^n would leave the normal numbers; no shift or clamped F comes near
TAYLOR = tuple(1.0 / math.factorial(i) for i in range(13, -1, -1))  # of exp; 4e-18 at ln(2) / 2


class Limits(NamedTuple):
    """The settings as scalars of the tokens' dtype, so that comparisons are made in it."""

    zero: Any
    shift_bound: Any
    ratio_low: Any
    ratio_high: Any
    dual_clip: Any  # inf when off
    log_dual_clip: Any
    log_influence_low: Any
    log_influence_high: Any
    influence_low: Any
    influence_high: Any
    safety_threshold: Any
    safe_low: Any
    safe_high: Any


class TokenArrays(NamedTuple):
    """What goes in, all [T]: log-probs, old log-probs and advantages of one dtype, mask bool."""

    logprobs: Any
    old_logprobs: Any
    advantages: Any
    mask: Any


class TermArrays(NamedTuple):
    """What comes out: [T], [n] for the n response tokens, and [num_segments] sums. Empty where there is no scan."""

    gradient: Any  # [T]
    future_kl: Any  # [T], or [0]
    influence_weights: Any  # [T], or [0]
    stat_shift: Any  # [n]
    stat_advantages: Any  # [n]
    stat_clipped: Any  # [n] bool
    stat_dual_clipped: Any  # [n] bool
    stat_future_kl: Any  # [n], or [0]
    stat_influence_weights: Any  # [n], or [0]
    loss_sums: Any  # [num_segments] float64
    num_tokens: Any  # [num_segments] int64
    num_dual_clipped: Any  # [num_segments] int64


@njit(nogil=True, no_cfunc_wrapper=True)
def fill_terms(
    tokens: TokenArrays,
    token_weights: Any,
    offsets: Any,
    carries: Any,
    gamma: float,
    with_influence: bool,
    limits: Limits,
    out: TermArrays,
) -> None:
    """Everything in one pass over the segments of offsets [num_segments + 1] int64.

    token_weights: [T] w in the tokens' dtype, or None. carries: [num_segments] float64, F at the first token behind
    each segment.
    """
    dtype = tokens.logprobs.dtype
    shifts, ratios = np.empty(BLOCK_LEN, dtype), np.empty(BLOCK_LEN, dtype)
    ones, values = np.ones(BLOCK_LEN, dtype), np.empty(BLOCK_LEN, np.float64)
    outside, clipped, dual_clipped = (
        np.empty(BLOCK_LEN, np.bool_),
        np.empty(BLOCK_LEN, np.bool_),
        np.empty(BLOCK_LEN, np.bool_),
    )
    row = out.stat_shift.shape[0]
    for segment in range(offsets.shape[0] - 2, -1, -1):
        carry, loss_sum, num_tokens, num_dual_clipped = carries[segment], 0.0, 0, 0
        end = offsets[segment + 1]
        while end > offsets[segment]:
            start = max(offsets[segment], end - BLOCK_LEN)
            length = end - start
            mask, advantages = tokens.mask[start:end], tokens.advantages[start:end]
            future_kl, weights = out.future_kl[start:end], ones[:length]
            ratio = ratios[:length]
            _shift(tokens.logprobs[start:end], tokens.old_logprobs[start:end], mask, limits, shifts, values, outside)
            _clamped_exp(shifts, -limits.shift_bound, limits.shift_bound, ratio)
            if with_influence:
                weights = out.influence_weights[start:end]
                carry = _scan(values, carry, gamma, future_kl)
                _clamped_exp(future_kl, limits.log_influence_low, limits.log_influence_high, weights)
                _bound_weights(advantages, mask, ratio, limits, weights)
            block_sum, block_dual_clipped = _clip(
                advantages,
                mask,
                ratio,
                weights,
                _part(token_weights, start, end),
                outside,
                limits,
                out.gradient[start:end],
                clipped,
                dual_clipped,
            )
            block_tokens = _count(mask)
            row -= block_tokens
            if block_tokens > 0:
                stats = slice(row, row + block_tokens)
                _select(shifts, mask, out.stat_shift[stats])
                _select(advantages, mask, out.stat_advantages[stats])
                _select(clipped, mask, out.stat_clipped[stats])
                _select(dual_clipped, mask, out.stat_dual_clipped[stats])
                if with_influence:
                    _select(future_kl, mask, out.stat_future_kl[stats])
                    _select(weights, mask, out.stat_influence_weights[stats])
            loss_sum += block_sum
            num_tokens += block_tokens
            num_dual_clipped += block_dual_clipped
            end = start
        out.loss_sums[segment] = loss_sum
        out.num_tokens[segment] = num_tokens
        out.num_dual_clipped[segment] = num_dual_clipped


@njit(nogil=True, no_cfunc_wrapper=True)
def fill_totals(tokens: TokenArrays, offsets: Any, gamma: float, limits: Limits, totals: Any) -> None:
    """totals [num_segments] float64: F at each segment's first token if nothing came after the segment."""
    shifts, history = np.empty(BLOCK_LEN, tokens.logprobs.dtype), np.empty(BLOCK_LEN, tokens.logprobs.dtype)
    values, outside = np.empty(BLOCK_LEN, np.float64), np.empty(BLOCK_LEN, np.bool_)
    for segment in range(offsets.shape[0] - 1):
        carry = 0.0
        end = offsets[segment + 1]
        while end > offsets[segment]:
            start = max(offsets[segment], end - BLOCK_LEN)
            logprobs, old_logprobs = tokens.logprobs[start:end], tokens.old_logprobs[start:end]
            _shift(logprobs, old_logprobs, tokens.mask[start:end], limits, shifts, values, outside)
            carry = _scan(values, carry, gamma, history[: end - start])
            end = start
        totals[segment] = carry


@njit(nogil=True, no_cfunc_wrapper=True)
def fill_scaled(gradient: Any, factors: Any, offsets: Any, out: Any) -> None:
    """out [T] = gradient [T] times its sequence's entry of factors [num_seqs] float64."""
    for segment in range(offsets.shape[0] - 1):
        _scale(gradient[offsets[segment] : offsets[segment + 1]], factors[segment], out[offsets[segment] :])


@njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, fastmath={"contract"})
def _shift(logprobs: Any, old_logprobs: Any, mask: Any, limits: Limits, shifts: Any, values: Any, outside: Any) -> None:
    """d, what of it takes part in F, and whether the clamp took its gradient. NaN for an infinite log-prob."""
    for j in range(logprobs.shape[0]):
        delta = logprobs[j] - old_logprobs[j] if mask[j] else limits.zero
        shift = limits.shift_bound if delta > limits.shift_bound else delta
        shift = -limits.shift_bound if shift < -limits.shift_bound else shift
        shift = shift + limits.zero * delta
        shifts[j] = shift
        values[j] = 0.0 if shift > limits.log_dual_clip else np.float64(shift)
        outside[j] = (delta > limits.shift_bound) | (delta < -limits.shift_bound)


@njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, fastmath={"contract"})
def _scan(values: Any, carry: float, gamma: float, future_kl: Any) -> Any:
    """F_t = k_t + gamma F_{t+1}; returns F at the first token."""
    for j in range(future_kl.shape[0] - 1, -1, -1):
        carry = carry * gamma + values[j]
        future_kl[j] = carry
    return carry


@njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, fastmath={"contract"})
def _clamped_exp(values: Any, low: Any, high: Any, out: Any) -> None:
    for j in range(out.shape[0]):
        value = low if values[j] < low else values[j]
        value = high if value > high else value
        out[j] = _exp(np.float64(value))


@njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, fastmath={"contract"})
def _bound_weights(advantages: Any, mask: Any, ratios: Any, limits: Limits, weights: Any) -> None:
    """The bounds once more, exp(log(x)) may miss x by a bit, then the safety rule."""
    for j in range(weights.shape[0]):
        weight = limits.influence_low if weights[j] < limits.influence_low else weights[j]
        weight = limits.influence_high if weight > limits.influence_high else weight
        safe = limits.safe_low if weight < limits.safe_low else weight
        safe = limits.safe_high if safe > limits.safe_high else safe
        safe = limits.safe_low if limits.safe_low == limits.safe_high else safe  # paper: 1, even for a NaN
        unsafe = mask[j] & (advantages[j] < limits.zero) & (ratios[j] > limits.safety_threshold)
        weights[j] = safe if unsafe else weight


@njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, fastmath={"contract", "reassoc"})
def _clip(
    advantages: Any,
    mask: Any,
    ratios: Any,
    weights: Any,
    token_weights: Any,
    outside: Any,
    limits: Limits,
    gradient: Any,
    clipped: Any,
    dual_clipped: Any,
) -> Any:
    """The clipped loss and its derivative by the log-prob, both times the token's weight; returns (sum of losses,
    dual-clipped tokens)."""
    loss_sum, num_dual_clipped = 0.0, 0
    for j in range(gradient.shape[0]):
        ratio = ratios[j]
        weighted = advantages[j] * weights[j] if mask[j] else limits.zero
        ratio_in_range = limits.ratio_low if ratio < limits.ratio_low else ratio
        ratio_in_range = limits.ratio_high if ratio_in_range > limits.ratio_high else ratio_in_range
        plain, bounded = -weighted * ratio, -weighted * ratio_in_range
        bound = -weighted * limits.dual_clip
        is_clipped = bounded > plain
        worse = bounded if is_clipped else plain
        is_dual_clipped = (weighted < limits.zero) & (worse > bound)
        loss = bound if is_dual_clipped else worse
        # 0 times a NaN shows, as it does in autograd
        slope = limits.zero * plain if outside[j] else plain
        if token_weights is not None:
            token_weight = token_weights[j] if mask[j] else limits.zero
            loss *= token_weight
            slope *= token_weight
        loss_sum += np.float64(loss)
        num_dual_clipped += is_dual_clipped
        gradient[j] = limits.zero if is_clipped | is_dual_clipped else slope
        clipped[j] = is_clipped
        dual_clipped[j] = is_dual_clipped
    return loss_sum, num_dual_clipped


@njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _part(values: Any, start: int, end: int) -> Any:
    if values is None:
        return None
    return values[start:end]


@njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _count(mask: Any) -> Any:
    count = 0
    for j in range(mask.shape[0]):
        count += mask[j]
    return count


@njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _select(values: Any, mask: Any, out: Any) -> None:
    """out [n] = the entries of values where mask is set."""
    if out.shape[0] == mask.shape[0]:
        for j in range(out.shape[0]):
            out[j] = values[j]
        return
    row = 0
    for j in range(mask.shape[0]):
        if mask[j]:
            out[row] = values[j]
            row += 1


@njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _scale(values: Any, factor: float, out: Any) -> None:
    for j in range(values.shape[0]):
        out[j] = values[j] * factor


@njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, fastmath={"contract"}, inline="always")
def _exp(x: Any) -> Any:
    """exp of a float64 to 2 ulp without a call, which would keep the loop around it from being vectorised.

    exp(x) = 2^n exp(r) with x = n ln 2 + r, |r| <= ln(2) / 2; exp(r) by its Taylor polynomial.
    """
    x = EXP_RANGE if x > EXP_RANGE else x
    x = -EXP_RANGE if x < -EXP_RANGE else x
    rounded = np.float64(x * LOG2_E + ROUNDER)
    n = rounded - ROUNDER
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    result = TAYLOR[0]
    for coefficient in TAYLOR[1:]:
        result = result * r + coefficient
    power = np.int64((rounded.view(np.int64) << 52) + ONE_BITS).view(np.float64)
    return result * power
