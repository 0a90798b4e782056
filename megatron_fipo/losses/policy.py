"""What all algorithms share: from checked tokens over the losses of each sequence to (loss, info)."""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor

from megatron_fipo.config import FIPOSettings, PPOSettings
from megatron_fipo.losses.eager import eager_terms
from megatron_fipo.losses.fused import fused_policy_terms
from megatron_fipo.losses.kl import kl_estimates
from megatron_fipo.losses.reduction import normalise, spread_to_tokens
from megatron_fipo.losses.terms import policy_batch
from megatron_fipo.losses.update_metrics import gather_token_stats, update_metrics


class LossOptions(TypedDict, total=False):
    """What every loss takes beside its contract's arguments; meanings and defaults in the package's docstring."""

    num_sequences: int | None
    max_response_len: int | None
    with_metrics: bool
    fused: bool
    token_weights: Tensor | None
    reference_logprobs: Tensor | None
    kl_coef: float


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    settings: PPOSettings,
    *,
    with_influence: bool,
    cu_seqlens: Tensor | None = None,
    group: Any | None = None,
    denominator: float | Tensor | None = None,
    num_sequences: int | None = None,
    max_response_len: int | None = None,
    with_metrics: bool = True,
    fused: bool = True,
    token_weights: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Any]]:
    """The clipped policy loss, with FIPO's influence weights and sequence drop if `with_influence`.

    Arguments, result and errors are those of every loss: the package's docstring.
    """
    if kl_coef and (reference_logprobs is None or not 0 < kl_coef < float("inf")):
        raise ValueError(f"kl_coef is {kl_coef}, but must be 0, or a number > 0 with reference_logprobs")
    batch = policy_batch(
        logprobs,
        old_logprobs,
        advantages,
        loss_mask,
        cu_seqlens=cu_seqlens,
        group=group,
        token_weights=token_weights,
        reference_logprobs=reference_logprobs,
    )
    make_terms = fused_policy_terms if fused else eager_terms
    terms = make_terms(batch, settings, with_influence=with_influence)
    drops = with_influence and isinstance(settings, FIPOSettings) and settings.semantics == "released"
    if max_response_len is None and len(batch.shape) == 2:
        max_response_len = batch.shape[1]
    normaliser = normalise(
        terms.num_tokens,
        terms.num_dual_clipped if drops else None,
        settings.loss_agg,
        group=group,
        denominator=denominator,
        num_sequences=num_sequences,
        max_response_len=max_response_len,
    )
    local_sum = terms.weighted_sum(normaliser.factors)
    kept = batch.mask & spread_to_tokens(normaliser.kept, batch.offsets) if drops else batch.mask
    token_stats = {
        **terms.token_stats,
        "loss_sum": local_sum.detach().double().reshape(1),
        "num_kept": normaliser.count.reshape(1),
    }
    if batch.reference_logprobs is not None:
        kl = kl_estimates(batch.logprobs, batch.reference_logprobs, batch.mask)
        token_stats["kl"] = kl.detach()[batch.mask].to(batch.logprobs.dtype)
        if kl_coef:
            weighted_kl = kl * spread_to_tokens(normaliser.factors, batch.offsets)
            local_sum = local_sum + (kl_coef * weighted_kl.sum()).to(local_sum.dtype)
    nothing = batch.logprobs.new_zeros(()).detach()
    info: dict[str, Any] = {
        "future_kl": nothing.expand(batch.shape) if terms.future_kl is None else terms.future_kl.view(batch.shape),
        "influence_weights": (nothing + 1).expand(batch.shape)
        if terms.influence_weights is None
        else terms.influence_weights.view(batch.shape),
        "loss_mask": kept.view(batch.shape).to(batch.mask_dtype),
        "num_kept": normaliser.count,
        "token_stats": token_stats,
    }
    if with_metrics:
        info |= update_metrics(gather_token_stats(token_stats, group), settings)
    return local_sum / normaliser.divisor, info
