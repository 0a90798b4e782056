"""Future-KL and the influence weights made of it (FIPO, arXiv 2603.19835). Derivations: README.md beside this file.

Tensors are [B, L], one sequence per row, or packed [T] with `cu_seqlens`; over a context-parallel group of cp ranks
they are the rank's share [T_local] of the zigzag cut, with global offsets. Nothing here has a gradient.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.config import Semantics
from megatron_fipo.ops.future_kl_sharded import piece_carries, piece_offsets
from megatron_fipo.ops.zigzag import require_cuttable

SHIFT_BOUND = 20.0  # log-prob shifts are clamped to +-20 before anything else
RELEASED_SAFETY_RANGE = (0.8, 1.0)  # where `released` clamps the influence weight of an unsafe token


def future_kl(
    delta_logprobs: Tensor,
    mask: Tensor,
    half_life: float,
    *,
    cu_seqlens: Tensor | None = None,
    group: Any | None = None,
) -> Tensor:
    """The masked recurrence F_t = d_t m_t + gamma F_{t+1}, gamma = 2^(-1/half_life), anew in every sequence.

    delta_logprobs: [B, L], or packed [T] with cu_seqlens int32 [num_seqs + 1], first 0, last T. Values where the mask
        is 0 are never read: they may be NaN.
    mask: same shape, bool or any dtype holding only 0 and 1; holes and a masked prefix are fine, F is defined there
        too (it decays through them).
    half_life: tokens, > 0.
    group: context-parallel process group. Of cp > 1 ranks it wants packed [T_local], this rank's pieces, and
        cu_seqlens as global padded offsets: last T_local * cp, every sequence a multiple of 2 cp tokens (zigzag.py).
        The ranks exchange one float64 per sequence and piece, and each scans its pieces twice.
    Returns F, same shape, detached; float64 for float64 shifts, else fp32. O(L) time and memory. CPU tensors are
    scanned in order by a compiled loop, CUDA tensors tile by tile by a Triton kernel; both accumulate in float64, so F
    is the exact value rounded once. A NaN shift under the mask makes F NaN from there to the start of its sequence.
    Raises ValueError on shapes, dtypes, devices, cu_seqlens or a half-life that do not fit; RuntimeError on CUDA
    without triton.
    """
    offsets = sequence_offsets(delta_logprobs, cu_seqlens, _num_ranks(group))
    gamma = decay_factor(half_life)
    flags = as_bool_mask(mask, delta_logprobs).reshape(-1)
    values = delta_logprobs.detach().reshape(-1).to(compute_dtype(delta_logprobs))
    scan = functools.partial(_segment_scan(delta_logprobs), values, flags)
    future, _ = scan_shared(scan, offsets, gamma, group)
    return future.view(delta_logprobs.shape)


def future_kl_reference(
    delta_logprobs: Tensor, mask: Tensor, half_life: float, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The definition of `future_kl`, as a plain loop over Python floats (float64). Same arguments, dtypes, errors."""
    offsets = sequence_offsets(delta_logprobs, cu_seqlens).tolist()
    gamma = decay_factor(half_life)
    flags = as_bool_mask(mask, delta_logprobs).reshape(-1).tolist()
    values = delta_logprobs.detach().reshape(-1).tolist()
    result = [0.0] * len(values)
    for start, end in itertools.pairwise(offsets):
        carry = 0.0
        for t in reversed(range(start, end)):
            carry = (values[t] if flags[t] else 0.0) + gamma * carry
            result[t] = carry
    dtype = compute_dtype(delta_logprobs)
    return torch.tensor(result, dtype=torch.float64, device=delta_logprobs.device).to(dtype).view(delta_logprobs.shape)


def influence_weights(
    delta_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    half_life: float,
    dual_clip: float,
    influence_low: float,
    influence_high: float,
    safety_threshold: float,
    semantics: Semantics,
    cu_seqlens: Tensor | None = None,
    group: Any | None = None,
) -> tuple[Tensor, Tensor]:
    """The influence weights f and the Future-KL F they come from: filter, scan, exp and clamp, safety rule.

        d = clamp(delta_logprobs, -20, 20);  k = d where masked in and d <= log(dual_clip), else 0
        F = future_kl(k);  f = clamp(exp(F), influence_low, influence_high), clamped in log space: exp(F) may overflow
        where A < 0 and exp(d) > safety_threshold:  paper: f = 1;  released: f = clamp(f, 0.8, 1.0)

    delta_logprobs, advantages, mask: [B, L], or packed [T] with cu_seqlens, over a group [T_local], as in `future_kl`;
    entries outside the mask are never read. Returns (f, F), same shape, detached; float64 for float64 shifts, else
    fp32. Outside the mask f is clamp(exp(F)) without the safety rule. CUDA tensors take one fused Triton kernel.
    Raises as `future_kl` does.
    """
    if advantages.shape != delta_logprobs.shape:
        raise ValueError(
            f"advantages have shape {tuple(advantages.shape)}, but must have the log-probs' "
            f"{tuple(delta_logprobs.shape)}"
        )
    flags = as_bool_mask(mask, delta_logprobs)
    dtype = compute_dtype(delta_logprobs)
    if _runs_triton(delta_logprobs):
        kernels = _triton_kernels()
        fused = functools.partial(
            kernels.scan_influence,
            delta_logprobs.detach().reshape(-1).to(dtype),
            flags.reshape(-1),
            advantages.detach().reshape(-1),
            kernels.InfluenceBounds(
                math.log(dual_clip), influence_low, influence_high, safety_threshold, semantics == "released"
            ),
            row_len=_row_len(delta_logprobs),
        )
        offsets = sequence_offsets(delta_logprobs, cu_seqlens, _num_ranks(group))
        (weights, history), _ = scan_shared(fused, offsets, decay_factor(half_life), group)
        return weights.view(delta_logprobs.shape), history.view(delta_logprobs.shape)
    shift = torch.where(flags, delta_logprobs.detach().to(dtype), 0).clamp(-SHIFT_BOUND, SHIFT_BOUND)
    # "not above" rather than "<=": a NaN shift stays in the sum, where it can be seen
    participates = flags & ~(shift > math.log(dual_clip))
    history = future_kl(shift, participates, half_life, cu_seqlens=cu_seqlens, group=group)
    weights = history.clamp(math.log(influence_low), math.log(influence_high)).exp()
    weights = weights.clamp(influence_low, influence_high)  # exp(log(x)) may miss x by a bit
    unsafe = flags & (advantages.detach() < 0) & (shift.exp() > safety_threshold)
    safe_value = weights.clamp(*RELEASED_SAFETY_RANGE) if semantics == "released" else torch.ones_like(weights)
    return torch.where(unsafe, safe_value, weights), history


def decay_factor(half_life: float) -> float:
    """gamma = 2^(-1/half_life). Raises ValueError unless half_life > 0 tokens."""
    if not half_life > 0:
        raise ValueError(f"half_life is {half_life!r}, but must be > 0 tokens")
    return float(2.0 ** (-1.0 / half_life))


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 tensors, fp32 for every other floating dtype. Raises ValueError for integers."""
    if not tensor.is_floating_point():
        raise ValueError(f"log-probs have dtype {tensor.dtype}, but must be of a floating dtype")
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def as_bool_mask(mask: Tensor, like: Tensor) -> Tensor:
    """`mask` as bool. Raises ValueError when its shape is not `like`'s or it holds anything but 0 and 1."""
    if mask.shape != like.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, but must have the log-probs' {tuple(like.shape)}")
    if mask.dtype == torch.bool:
        return mask
    flags = mask != 0
    if not bool((mask == flags).all()):
        raise ValueError("mask holds values other than 0 and 1")
    return flags


def sequence_offsets(tensor: Tensor, cu_seqlens: Tensor | None, cp_size: int = 1) -> Tensor:
    """Where each sequence starts in the flattened `tensor`, and its end: int64 [num_seqs + 1] on its device.

    [B, L] without cu_seqlens: the rows. [T] with cu_seqlens int32 [num_seqs + 1]: first 0, last T, never falling
    (empty sequences are allowed). Over cp_size > 1 context-parallel ranks `tensor` is one rank's [T_local], cu_seqlens
    are global padded offsets (last T_local * cp_size, sequences of multiples of 2 * cp_size tokens) and the offsets
    returned are local: an even number of tokens per sequence. Anything else raises ValueError.
    """
    shape = tuple(tensor.shape)
    if tensor.dim() == 2 and cu_seqlens is None and cp_size == 1:
        num_rows, row_len = shape
        return torch.arange(num_rows + 1, device=tensor.device) * row_len
    if tensor.dim() != 1:
        wanted = "[B, L], or [T] with cu_seqlens"
        if cp_size > 1:
            wanted = f"packed [T_local] with cu_seqlens over {cp_size} context-parallel ranks"
        elif tensor.dim() == 2:
            wanted = "[T] when cu_seqlens is given"
        raise ValueError(f"log-probs have shape {shape}, but must be {wanted}")
    if cu_seqlens is None:
        raise ValueError(f"cu_seqlens is missing: packed log-probs of shape {shape} need it")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.numel() == 0:
        found = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens is {found}, but must be int32 [num_seqs + 1]")
    offsets = cu_seqlens.cpu().long()
    num_tokens = shape[0] * cp_size
    if int(offsets[0]) != 0 or int(offsets[-1]) != num_tokens:
        total = f"T = {num_tokens}" if cp_size == 1 else f"T_local * cp = {shape[0]} * {cp_size} = {num_tokens}"
        raise ValueError(
            f"cu_seqlens runs from {int(offsets[0])} to {int(offsets[-1])}, but must run from 0 to {total}"
        )
    if bool((offsets.diff() < 0).any()):
        raise ValueError(f"cu_seqlens is {offsets.tolist()}, but must never fall")
    require_cuttable(offsets, cp_size)
    return (offsets // cp_size).to(tensor.device)


def scan_shared(
    scan: Callable[..., tuple[Any, Tensor]], offsets: Tensor, gamma: float, group: Any | None
) -> tuple[Any, Tensor]:
    """Run a scan of segments, `scan(offsets, gamma, carries) -> (result, totals)`, over what the ranks of `group` hold.

    offsets: local, of `sequence_offsets`. carries [num_segments] float64 or None: F at the token after each segment;
    totals [num_segments] float64: F at each segment's first token, given the carries. One rank or no group: the
    segments are the sequences. Else they are the pieces, scanned once for their totals and once more from the carries
    that the ranks of the context-parallel axis work out of these (one all-gather of a float64 per sequence and piece).
    """
    if _num_ranks(group) == 1:
        return scan(offsets, gamma, None)
    pieces = piece_offsets(offsets)
    _, totals = scan(pieces, gamma, None)
    assert group is not None
    carries = piece_carries(totals, pieces.diff()[::2], gamma, group)
    return scan(pieces, gamma, carries)


def scan_in_order(
    values: Tensor, mask: Tensor, offsets: Tensor, gamma: float, carries: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(F, totals) of every segment by a compiled loop: values [T] fp32 or float64, mask [T] bool, on the CPU.

    offsets, carries and totals as in `scan_shared`. What a segment yields depends on nothing but its own tokens and
    carry, to the last bit.
    """
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    totals = torch.zeros(offsets.numel() - 1, dtype=torch.float64)
    given = torch.zeros_like(totals) if carries is None else carries
    tensors = (values.contiguous(), mask.contiguous(), offsets, given.contiguous(), out, totals)
    _compiled_loop()(*(tensor.numpy() for tensor in tensors), gamma)
    return out, totals


def _num_ranks(group: Any | None) -> int:
    return 1 if group is None else group.size()


def _row_len(tensor: Tensor) -> int | None:
    return tensor.shape[1] if tensor.dim() == 2 and tensor.numel() else None


def _segment_scan(tensor: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """The scan for what lies in `tensor`: (values [T], mask [T] bool, offsets, gamma, carries) -> (F, totals).

    F has the dtype of values, fp32 or float64; the rest as in `scan_shared`.
    """
    if _runs_triton(tensor):
        return functools.partial(_triton_kernels().scan_future_kl, row_len=_row_len(tensor))
    if tensor.device.type != "cpu":
        raise ValueError(f"log-probs are on {tensor.device}, but must be on cpu or cuda")
    return scan_in_order


def _runs_triton(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _triton_kernels() -> Any:
    """The module of the Triton kernels. Raises RuntimeError when triton is not installed."""
    try:
        from megatron_fipo.ops import future_kl_triton
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "Future-KL of CUDA tensors needs triton, but it is not installed: pip install triton"
        ) from error
    return future_kl_triton


@functools.cache
def _compiled_loop() -> Callable[..., None]:
    """The loop below as machine code, compiled once per process and dtype on first use (numba, about a second)."""
    from numba import njit

    # a multiply-add may be one instruction: one rounding less; nothing else is reordered
    compiled: Callable[..., None] = njit(nogil=True, fastmath={"contract"})(_loop)
    return compiled


def _loop(values: Any, mask: Any, offsets: Any, carries: Any, out: Any, totals: Any, gamma: float) -> None:
    """values, out [T] fp32 or float64, mask [T] bool, offsets [num_segments + 1] int64, carries, totals float64; numpy.

    Four tokens at a time, counted from a segment's end, so that only one multiply-add in four waits for the last.
    """
    gamma2, gamma3, gamma4 = gamma**2, gamma**3, gamma**4
    for i in range(offsets.shape[0] - 1):
        start, t, carry = offsets[i], offsets[i + 1], carries[i]
        for _ in range((t - start) // 4):
            t -= 4
            # read first, then discarded: the compiler turns a condition around the read into a branch per token
            x0, x1, x2, x3 = 1.0 * values[t], 1.0 * values[t + 1], 1.0 * values[t + 2], 1.0 * values[t + 3]
            if not mask[t]:
                x0 = 0.0
            if not mask[t + 1]:
                x1 = 0.0
            if not mask[t + 2]:
                x2 = 0.0
            if not mask[t + 3]:
                x3 = 0.0
            x2 += gamma * x3
            x1 += gamma * x2
            x0 += gamma * x1
            out[t + 3] = x3 + gamma * carry
            out[t + 2] = x2 + gamma2 * carry
            out[t + 1] = x1 + gamma3 * carry
            carry = x0 + gamma4 * carry
            out[t] = carry
        while t > start:
            t -= 1
            carry *= gamma
            if mask[t]:
                carry += values[t]
            out[t] = carry
        totals[i] = carry
