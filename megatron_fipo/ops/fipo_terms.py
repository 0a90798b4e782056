"""The clipped policy loss with its influence weights and its gradient, fused: log-probs in, d loss / d log-probs out.

It is what `losses.eager` builds from tensor operations and autograd; `f = 1` and no scan for algorithms without
influence weights. CPU tensors go through compiled loops in one pass, CUDA tensors through Triton kernels. Derivation:
README.md beside this file.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.config import FIPOSettings, PPOSettings
from megatron_fipo.ops.future_kl import RELEASED_SAFETY_RANGE, SHIFT_BOUND, decay_factor, scan_shared
from megatron_fipo.ops.future_kl_sharded import piece_carries, piece_offsets


@dataclass(frozen=True, eq=False)
class FusedTerms:
    """The loss before any sum over sequences. n counts the response tokens; per-sequence numbers are this rank's."""

    loss_sums: Tensor  # [num_seqs] float64, sum of w L over the sequence's response
    num_tokens: Tensor  # [num_seqs] int64
    num_dual_clipped: Tensor  # [num_seqs] int64
    gradient: Tensor  # [T], dtype of the log-probs: d loss_sums / d logprobs
    future_kl: Tensor | None  # [T], None without influence weights
    influence_weights: Tensor | None  # [T], likewise
    token_stats: dict[str, Tensor]  # shift, advantages, clipped, dual_clipped, influence_weights, future_kl: [n]


def fused_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    offsets: Tensor,
    settings: PPOSettings,
    *,
    with_influence: bool,
    group: Any | None = None,
    token_weights: Tensor | None = None,
) -> FusedTerms:
    """Loss, gradient and statistics of every sequence, as `settings` (FIPOSettings when with_influence) say.

    logprobs, old_logprobs, advantages: [T], all fp32 or all float64; mask: [T] bool; entries outside it are never
        read. offsets: [num_seqs + 1] int64, where the sequences lie in them.
    group: context-parallel group; with several ranks the tensors are this rank's zigzag share, and F is exact over the
        whole sequences (one exchange of a number per sequence and piece).
    token_weights: [T] w in the log-probs' dtype, which multiplies L and nothing else; None: 1.
    A NaN or infinite log-prob in the mask makes the loss of its sequence NaN, and its own gradient; through F also the
    gradients before it. Raises ValueError on devices other than cpu and cuda.
    """
    if logprobs.device.type not in ("cpu", "cuda"):
        raise ValueError(f"log-probs are on {logprobs.device}, but the fused loss wants them on cpu or cuda")
    assert isinstance(settings, FIPOSettings) or not with_influence, f"influence weights, but settings are {settings}"
    make_terms = compiled_terms if logprobs.device.type == "cpu" else triton_terms
    new, old, weights, flags = (x.detach().contiguous() for x in (logprobs, old_logprobs, advantages, mask))
    if token_weights is not None:
        token_weights = token_weights.contiguous()
    return make_terms(
        new,
        old,
        weights,
        flags,
        offsets,
        settings,
        with_influence=with_influence,
        group=group,
        token_weights=token_weights,
    )


def scale_sequences(gradient: Tensor, factors: Tensor, offsets: Tensor) -> Tensor:
    """gradient [T] times factors [num_seqs] float64 of its sequence; 0 times NaN stays NaN. Keeps gradient's dtype."""
    if gradient.device.type == "cpu":
        from megatron_fipo.ops.fipo_terms_cpu import fill_scaled

        out = torch.empty_like(gradient)
        fill_scaled(gradient.numpy(), factors.numpy(), offsets.numpy(), out.numpy())
        return out
    return gradient * factors.to(gradient.dtype).repeat_interleave(offsets.diff(), output_size=gradient.numel())


def compiled_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    offsets: Tensor,
    settings: PPOSettings,
    *,
    with_influence: bool,
    group: Any | None = None,
    token_weights: Tensor | None = None,
) -> FusedTerms:
    """`fused_terms` of contiguous CPU tensors without gradient, by loops that numba compiles on first use (2 s)."""
    from megatron_fipo.ops.fipo_terms_cpu import TermArrays, TokenArrays, fill_terms, fill_totals

    arrays = TokenArrays(*(x.numpy() for x in (logprobs, old_logprobs, advantages, mask)))
    limits, gamma = _limits(settings, logprobs.dtype), 0.0
    segments = offsets
    carries = torch.zeros(offsets.numel() - 1, dtype=torch.float64)
    if with_influence:
        assert isinstance(settings, FIPOSettings)
        gamma = decay_factor(settings.half_life)
        if group is not None and group.size() > 1:
            segments = piece_offsets(offsets)
            totals = torch.empty(segments.numel() - 1, dtype=torch.float64)
            fill_totals(arrays, segments.numpy(), gamma, limits, totals.numpy())
            carries = piece_carries(totals, offsets.diff() // 2, gamma, group)
    num_tokens, num_response = logprobs.numel(), int(mask.sum())
    num_scanned, num_scanned_response = (num_tokens, num_response) if with_influence else (0, 0)
    out = {
        "gradient": torch.empty_like(logprobs),
        "future_kl": logprobs.new_empty(num_scanned),
        "influence_weights": logprobs.new_empty(num_scanned),
        "stat_shift": logprobs.new_empty(num_response),
        "stat_advantages": logprobs.new_empty(num_response),
        "stat_clipped": mask.new_empty(num_response),
        "stat_dual_clipped": mask.new_empty(num_response),
        "stat_future_kl": logprobs.new_empty(num_scanned_response),
        "stat_influence_weights": logprobs.new_empty(num_scanned_response),
        "loss_sums": torch.empty_like(carries),
        "num_tokens": torch.empty_like(carries, dtype=torch.int64),
        "num_dual_clipped": torch.empty_like(carries, dtype=torch.int64),
    }
    term_arrays = TermArrays(**{name: tensor.numpy() for name, tensor in out.items()})
    token_weight_array = None if token_weights is None else token_weights.numpy()
    fill_terms(
        arrays, token_weight_array, segments.numpy(), carries.numpy(), gamma, with_influence, limits, term_arrays
    )
    pieces_per_sequence = 1 if segments is offsets else 2
    names = ["shift", "advantages", "clipped", "dual_clipped"]
    names += ["influence_weights", "future_kl"] if with_influence else []
    return FusedTerms(
        **{
            name: out[name].view(-1, pieces_per_sequence).sum(1)
            for name in ("loss_sums", "num_tokens", "num_dual_clipped")
        },
        gradient=out["gradient"],
        future_kl=out["future_kl"] if with_influence else None,
        influence_weights=out["influence_weights"] if with_influence else None,
        token_stats={name: out[f"stat_{name}"] for name in names},
    )


def triton_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    offsets: Tensor,
    settings: PPOSettings,
    *,
    with_influence: bool,
    group: Any | None = None,
    token_weights: Tensor | None = None,
) -> FusedTerms:
    """`fused_terms` of contiguous CUDA tensors without gradient, by Triton: shifts, scan, clipped losses.

    CPU tensors work too under TRITON_INTERPRET=1. Raises RuntimeError when triton is not installed.
    """
    try:
        from megatron_fipo.ops import fipo_terms_triton, future_kl_triton
    except ModuleNotFoundError as error:
        raise RuntimeError("the fused loss of CUDA tensors needs triton: pip install triton, or fused=False") from error
    shift, outside = fipo_terms_triton.masked_shifts(logprobs, old_logprobs, mask, SHIFT_BOUND)
    weights = future_kl = None
    if with_influence:
        assert isinstance(settings, FIPOSettings)
        assert settings.dual_clip is not None
        bounds = future_kl_triton.InfluenceBounds(
            math.log(settings.dual_clip),
            settings.influence_low,
            settings.influence_high,
            settings.safety_threshold,
            settings.semantics == "released",
        )
        scan = functools.partial(future_kl_triton.scan_influence, shift, mask, advantages, bounds)
        (weights, future_kl), _ = scan_shared(scan, offsets, decay_factor(settings.half_life), group)
    terms = fipo_terms_triton.clip_sequences(
        shift,
        outside,
        advantages,
        mask,
        weights,
        token_weights,
        offsets,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
    response = mask.nonzero().view(-1)
    decisions = terms.decisions[response]
    stats = {
        "shift": shift[response],
        "advantages": advantages[response],
        "clipped": decisions & fipo_terms_triton.CLIPPED.value != 0,
        "dual_clipped": decisions & fipo_terms_triton.DUAL_CLIPPED.value != 0,
    }
    if weights is not None and future_kl is not None:
        stats |= {"influence_weights": weights[response], "future_kl": future_kl[response]}
    return FusedTerms(
        loss_sums=terms.loss_sums,
        num_tokens=terms.num_tokens,
        num_dual_clipped=terms.num_dual_clipped,
        gradient=terms.gradient,
        future_kl=future_kl,
        influence_weights=weights,
        token_stats=stats,
    )


def _limits(settings: PPOSettings, dtype: torch.dtype) -> Any:
    from megatron_fipo.ops.fipo_terms_cpu import Limits

    scalar = torch.empty((), dtype=dtype).numpy().dtype.type
    dual_clip = math.inf if settings.dual_clip is None else settings.dual_clip
    low, high, threshold, safe_range = 1.0, 1.0, math.inf, (1.0, 1.0)
    if isinstance(settings, FIPOSettings):
        low, high, threshold = settings.influence_low, settings.influence_high, settings.safety_threshold
        safe_range = RELEASED_SAFETY_RANGE if settings.semantics == "released" else (1.0, 1.0)
    limits = Limits(
        zero=0.0,
        shift_bound=SHIFT_BOUND,
        ratio_low=1 - settings.clip_low,
        ratio_high=1 + settings.clip_high,
        dual_clip=dual_clip,
        log_dual_clip=math.log(dual_clip),
        log_influence_low=math.log(low),
        log_influence_high=math.log(high),
        influence_low=low,
        influence_high=high,
        safety_threshold=threshold,
        safe_low=safe_range[0],
        safe_high=safe_range[1],
    )
    return Limits(*(scalar(value) for value in limits))
