"""Future-KL and the influence weights made of it (FIPO, arXiv 2603.19835). Derivations: README.md beside this file.

Tensors are [B, L], one sequence per row, or packed [T] with `cu_seqlens`. Nothing here has a gradient.
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

SHIFT_BOUND = 20.0  # log-prob shifts are clamped to +-20 before anything else
BLOCK_LEN = 64  # tokens per block of the tensor scan
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
    group: context-parallel process group; only None or size 1.
    Returns F, same shape, detached; float64 for float64 shifts, else fp32. O(L) time and memory. CPU tensors are
    scanned in order by a compiled loop, others block by block on their device; both accumulate in float64, so F is
    the exact value rounded once. A NaN shift under the mask makes F NaN from there to the start of its sequence.
    Raises ValueError on shapes, dtypes, cu_seqlens or a half-life that do not fit, and on a group of several ranks.
    """
    require_single_rank(group)
    offsets = sequence_offsets(delta_logprobs, cu_seqlens)
    gamma = decay_factor(half_life)
    shape, out_dtype = delta_logprobs.shape, compute_dtype(delta_logprobs)
    flags = as_bool_mask(mask, delta_logprobs).reshape(-1)
    values = delta_logprobs.detach().reshape(-1).to(out_dtype)
    if values.device.type == "cpu":
        out = torch.empty_like(values, memory_format=torch.contiguous_format)
        scan = _compiled_scan()
        scan(values.contiguous().numpy(), flags.contiguous().numpy(), offsets.numpy(), gamma, out.numpy())
        return out.view(shape)
    # float64 costs nothing beside the model and leaves one rounding, as in the compiled loop
    return scan_blocks(torch.where(flags, values, 0).double(), offsets, gamma).to(out_dtype).view(shape)


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

    delta_logprobs, advantages, mask: [B, L], or packed [T] with cu_seqlens, as in `future_kl`; entries outside the
    mask are never read. Returns (f, F), same shape, detached; float64 for float64 shifts, else fp32. Outside the mask
    f is clamp(exp(F)) without the safety rule. Raises ValueError as `future_kl` does.
    """
    flags = as_bool_mask(mask, delta_logprobs)
    dtype = compute_dtype(delta_logprobs)
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


def sequence_offsets(tensor: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where each sequence starts in the flattened `tensor`, and its end: int64 [num_seqs + 1] on its device.

    [B, L] without cu_seqlens: the rows. [T] with cu_seqlens int32 [num_seqs + 1]: first 0, last T, never falling
    (empty sequences are allowed). Anything else raises ValueError.
    """
    if tensor.dim() == 2 and cu_seqlens is None:
        num_rows, row_len = tensor.shape
        return torch.arange(num_rows + 1, device=tensor.device) * row_len
    shape = tuple(tensor.shape)
    if tensor.dim() != 1:
        wanted = "[T] when cu_seqlens is given" if tensor.dim() == 2 else "[B, L], or [T] with cu_seqlens"
        raise ValueError(f"log-probs have shape {shape}, but must be {wanted}")
    if cu_seqlens is None:
        raise ValueError(f"cu_seqlens is missing: packed log-probs of shape {shape} need it")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.numel() == 0:
        found = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens is {found}, but must be int32 [num_seqs + 1]")
    offsets = cu_seqlens.cpu().long()
    if int(offsets[0]) != 0 or int(offsets[-1]) != shape[0]:
        raise ValueError(
            f"cu_seqlens runs from {int(offsets[0])} to {int(offsets[-1])}, but must run from 0 to T = {shape[0]}"
        )
    if bool((offsets.diff() < 0).any()):
        raise ValueError(f"cu_seqlens is {offsets.tolist()}, but must never fall")
    return offsets.to(tensor.device)


def require_single_rank(group: Any | None) -> None:
    """Raise ValueError for a context-parallel group of several ranks: sequences cut over ranks are not built yet."""
    if group is not None and group.size() > 1:
        raise ValueError(
            f"group has {group.size()} ranks, but must have 1: context parallelism is not built yet"
            " (--context-parallel-size 1)"
        )


def scan_blocks(values: Tensor, offsets: Tensor, gamma: float) -> Tensor:
    """x_t = values_t + gamma x_{t+1} over [T] floating, anew in every sequence of offsets [num_seqs + 1] int64.

    Tensor operations only, so it runs on any device: about 6 T operations in 20 launches at T = 32k. A NaN stays in
    its own sequence. Keeps the dtype of values.
    """
    decays = torch.full_like(values, gamma)
    ends = offsets[1:][offsets.diff() > 0] - 1
    decays[ends] = 0.0
    return _scan_affine(values, decays)


def _scan_affine(values: Tensor, decays: Tensor) -> Tensor:
    """x_t = values_t + decays_t x_{t+1} over [T]; where decays_t is 0, x_{t+1} is not read.

    Inside blocks by doubling windows, then over the blocks' first entries by the same scan (README.md).
    """
    num_tokens = values.numel()
    if num_tokens == 0:
        return values
    padding = -num_tokens % BLOCK_LEN
    # (x, product) of position t describe the window [t, t + width) of its block: x_t = x + product * x_{t + width}
    x = torch.nn.functional.pad(values, (0, padding)).view(-1, BLOCK_LEN)
    product = torch.nn.functional.pad(decays, (0, padding)).view(-1, BLOCK_LEN)
    width = 1
    while width < BLOCK_LEN:
        x_behind = torch.nn.functional.pad(x[:, width:], (0, width))
        product_behind = torch.nn.functional.pad(product[:, width:], (0, width), value=1.0)
        x, product = torch.where(product == 0, x, x + product * x_behind), product * product_behind
        width *= 2
    if x.shape[0] > 1:
        first = _scan_affine(x[:, 0], product[:, 0])
        behind = torch.nn.functional.pad(first[1:], (0, 1)).unsqueeze(1)
        x = torch.where(product == 0, x, x + product * behind)
    return x.reshape(-1)[:num_tokens]


@functools.cache
def _compiled_scan() -> Callable[..., None]:
    """The loop below as machine code, compiled once per process and dtype on first use (numba, about half a second)."""
    from numba import njit

    compiled: Callable[..., None] = njit(nogil=True)(_scan_in_order)
    return compiled


def _scan_in_order(values: Any, mask: Any, offsets: Any, gamma: float, out: Any) -> None:
    """values, out [T] fp32 or float64, mask [T] bool, offsets [num_seqs + 1] int64, numpy; the carry is float64."""
    for i in range(offsets.shape[0] - 1):
        carry = 0.0
        for t in range(offsets[i + 1] - 1, offsets[i] - 1, -1):
            carry = gamma * carry
            if mask[t]:
                carry += values[t]
            out[t] = carry
