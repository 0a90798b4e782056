"""Policy losses, advantages and the metrics of an update: pure functions of tensors and numbers.

Every loss of `LOSSES` is called the same way and returns (loss, info):

    loss(logprobs, old_logprobs, advantages, loss_mask, settings, *, cu_seqlens=None, group=None, denominator=None,
         num_sequences=None, max_response_len=None, with_metrics=True, fused=True, token_weights=None,
         reference_logprobs=None, kl_coef=0.0)

* logprobs, old_logprobs, advantages, loss_mask: [B, L], or packed [T] with cu_seqlens int32 [num_seqs + 1]. float64
  log-probs are computed in float64, all others in fp32. Only logprobs gets a gradient, through the ratio alone.
  Entries outside loss_mask are never read. A NaN or infinite log-prob inside it makes the loss NaN.
* group: context-parallel group. Of cp > 1 ranks, the tensors are this rank's [T_local], cut and ordered as in
  ops/zigzag.py, and cu_seqlens are the global padded offsets. The loss is then this rank's share: shares add up to
  the loss of the whole, and the gradients are those of the whole, without a factor cp. A collective: all ranks call.
* denominator: a number > 0, or one in a tensor []: loss = local sum / denominator. None: what loss_agg averages over,
  here or over the group (1 if zero).
  Sums of micro-batches and of shares add up, so pass 1 and divide once by the sum of all num_kept.
* num_sequences: how many of the sequences are real, when the pack ends in a dummy one (seq-mean forms).
* max_response_len: divisor of seq-mean-token-sum-norm; [B, L] takes L by itself, packed tensors need it.
* with_metrics: False leaves the metrics out of info, for a caller that makes them of many micro-batches' token_stats.
* fused: loss and gradient in one pass over the tokens (ops/fipo_terms.py). False: tensor operations and autograd
  (eager.py), the definition; same numbers.
* token_weights: w >= 0 [shape of logprobs], detached (`correction_weights`). A token's clipped loss L becomes w L,
  after f, clip and dual clip. All that is counted or decided is as without w: the denominator, f and Future-KL, clips,
  dropped sequences, and every metric but pg_loss, which is of the loss that is trained on. 0 times NaN stays NaN.
* reference_logprobs, kl_coef: adds kl_coef times the k3 estimate (kl.py) of every kept response token, summed, averaged
  and divided as L is. Its gradient goes through logprobs; w does not apply to it. Metric kl_loss, the mean estimate
  over the response before any drop; pg_loss is without the KL term.

info holds future_kl, influence_weights [shape given] (0 and 1 where the algorithm has none), loss_mask (after the
drop, in the dtype given), num_kept [] int64 (kept tokens, or sequences in the seq-mean forms), token_stats (for
`collect_token_stats`) and the metrics of `update_metrics` for these tensors, as floats. Over a group of several ranks
num_kept is a share too (the sequences are counted by the group's first rank), per-token tensors and token_stats are
this rank's, and the metrics are those of the whole, the same on every rank (a gather of the token_stats).
Wrong shapes, dtypes, devices, offsets, numbers or settings raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_fipo.losses.advantages import group_advantages, overlong_penalty
from megatron_fipo.losses.correction import correction_metrics, correction_weights
from megatron_fipo.losses.dapo import dapo_loss
from megatron_fipo.losses.fipo import fipo_loss
from megatron_fipo.losses.grpo import grpo_loss
from megatron_fipo.losses.histograms import update_histograms
from megatron_fipo.losses.update_metrics import TokenStats, collect_token_stats, update_metrics

LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, Any]]]] = {
    "grpo": grpo_loss,
    "dapo": dapo_loss,
    "fipo": fipo_loss,
}
"""The losses by name (`--algorithm`); the table a new algorithm is added to."""

__all__ = [
    "LOSSES",
    "TokenStats",
    "collect_token_stats",
    "correction_metrics",
    "correction_weights",
    "dapo_loss",
    "fipo_loss",
    "group_advantages",
    "grpo_loss",
    "overlong_penalty",
    "update_histograms",
    "update_metrics",
]
