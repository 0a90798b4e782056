"""The metrics of one update under the FIPO authors' names, exact over a whole mini-batch.

A loss keeps, per micro-batch, flat tensors of its response tokens (`token_stats`). Concatenated over micro-batches and
gathered over data-parallel ranks they give the numbers one big batch would have given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.config import FIPOSettings, PPOSettings

TokenStats = dict[str, Tensor]
"""n response tokens (the mask before any drop), detached: shift [n] d, advantages [n], clipped [n] bool L2 > L1,
dual_clipped [n] bool; with FIPO also influence_weights [n] f and future_kl [n] F; with reference log-probs also kl [n].
And per micro-batch: loss_sum [1] float64 and num_kept [1] int64, the local sum of the policy loss (token weights in it,
the KL term not) and what it is divided by."""

PER_CALL_STATS = ("loss_sum", "num_kept")
MEAN_EPSILON = 1e-8  # the authors' masked mean is sum / (n + 1e-8)
BOUND_SLACK = 1e-7  # an influence weight this close to a bound counts as clipped there


def collect_token_stats(parts: Sequence[TokenStats]) -> TokenStats:
    """Concatenate the token_stats of several micro-batches (or ranks) of one algorithm.

    Raises ValueError when there are none, or when they do not hold the same tensors.
    """
    if not parts:
        raise ValueError("parts is empty, but must hold the token_stats of at least one micro-batch")
    names = list(parts[0])
    for part in parts[1:]:
        if set(part) != set(names):
            raise ValueError(f"token_stats of one update differ: {sorted(part)} and {sorted(names)}")
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def gather_token_stats(stats: TokenStats, group: Any | None) -> TokenStats:
    """The token_stats of all ranks of `group` (the context-parallel axis), concatenated in rank order on each of them.

    The same on every rank, float64 throughout. Costs 8 bytes per entry and response token: for a call that wants
    metrics of its own, not for training. None or one rank: what was given.
    """
    if group is None or group.size() == 1:
        return stats
    names = [name for name in stats if name not in PER_CALL_STATS]
    columns = torch.stack([stats[name].double() for name in names])
    totals = torch.cat([stats[name].double() for name in PER_CALL_STATS])
    num_tokens = torch.tensor([columns.shape[1]], device=columns.device)
    lengths = [torch.empty_like(num_tokens) for _ in range(group.size())]
    dist.all_gather(lengths, num_tokens, group=group)
    longest = max(int(length) for length in lengths)
    mine = torch.cat([columns, columns.new_zeros(len(names), longest - columns.shape[1])], dim=1)
    flat = torch.cat([totals, mine.reshape(-1)])
    shares = [torch.empty_like(flat) for _ in lengths]
    dist.all_gather(shares, flat, group=group)
    parts = []
    for share, length in zip(shares, lengths):
        values = share[len(PER_CALL_STATS) :].view(len(names), longest)[:, : int(length)]
        parts.append(dict(zip([*names, *PER_CALL_STATS], [*values, *share[: len(PER_CALL_STATS)].split(1)])))
    return collect_token_stats(parts)


def update_metrics(token_stats: TokenStats, settings: PPOSettings) -> dict[str, float]:
    """The update's metrics from all its response tokens, computed in float64.

    Definitions as in the authors' code: over the response before the drop, masked mean = sum / (n + 1e-8), linear
    quantiles, 0 where there is no token to speak of. exp(F) saturates at the fp32 maximum. pg_loss is the mini-batch's
    policy loss: the sum of its local sums over its count. FIPO's own metrics and kl_loss appear when token_stats has
    their tensors.
    """
    shift, advantages = token_stats["shift"].double(), token_stats["advantages"].double()
    loss_sum, num_kept = token_stats["loss_sum"].sum(), token_stats["num_kept"].sum()
    metrics = {
        "pg_loss": loss_sum / num_kept.clamp(min=1),
        "pg_clipfrac": _mean(token_stats["clipped"]),
        "ppo_kl": _mean(-shift),
        "pg_clipfrac_lower": _mean(token_stats["dual_clipped"]),
        **_ratio_metrics(shift.exp(), advantages, settings),
    }
    if "influence_weights" in token_stats:
        assert isinstance(settings, FIPOSettings), f"influence weights, but the settings are {settings}"
        metrics |= _influence_metrics(
            token_stats["influence_weights"].double(), token_stats["future_kl"].double(), settings
        )
    if "kl" in token_stats:
        metrics["kl_loss"] = _mean(token_stats["kl"])
    # one transfer for all of them
    values = torch.stack([value.double() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values))


def _ratio_metrics(ratio: Tensor, advantages: Tensor, settings: PPOSettings) -> dict[str, Tensor]:
    negative, positive = advantages < 0, advantages > 0
    dual_clip = float("inf") if settings.dual_clip is None else settings.dual_clip
    quantiles_of = {
        "neg_is": (ratio[negative], {"p75": 0.75, "p995": 0.995, "p999": 0.999, "max": 1.0}),
        "pos_is": (
            ratio[positive],
            {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p995": 0.995, "p999": 0.999, "max": 1.0},
        ),
    }
    metrics = {
        f"neg_ratio_{name}": _mean(negative & (ratio >= low) & (ratio < high))
        for name, low, high in (("2_3", 2.0, 3.0), ("3_4", 3.0, 4.0), ("4_10", 4.0, dual_clip))
    }
    metrics["pos_mini_frac"] = _mean(positive & (ratio < 1e-3))
    for prefix, (ratios, levels) in quantiles_of.items():
        for name, value in zip(levels, _quantiles(ratios, tuple(levels.values()))):
            metrics[f"{prefix}_{name}"] = value
    return metrics


def _influence_metrics(weights: Tensor, future_kl: Tensor, settings: FIPOSettings) -> dict[str, Tensor]:
    raw = _raw_weights(future_kl)
    at_upper = weights >= settings.influence_high - BOUND_SLACK
    at_lower = weights <= settings.influence_low + BOUND_SLACK
    future_kl_mean = _mean(future_kl)
    return {
        "influence_weights_mean": _mean(weights),
        "influence_weights_min": _min(weights),
        "influence_weights_max": _max(weights),
        "IW_overall_clip_ratio": _mean(at_upper | at_lower),
        "IW_upper_clip_ratio": _mean(at_upper),
        "IW_lower_clip_ratio": _mean(at_lower),
        "influence_weights_mean_raw": _mean(raw),
        "raw_influence_weights_min": _min(raw),
        "raw_influence_weights_max": _max(raw),
        "future_kl_mean": future_kl_mean,
        "future_kl_std": _mean((future_kl - future_kl_mean).square()).sqrt(),
        "future_kl_min": _min(future_kl),
        "future_kl_max": _max(future_kl),
    }


def _raw_weights(future_kl: Tensor) -> Tensor:
    """exp(F), at most the fp32 maximum: F reaches 107 at the default half-life, exp overflows fp32 above 88."""
    return future_kl.exp().clamp(max=torch.finfo(torch.float32).max)


def _mean(values: Tensor) -> Tensor:
    return values.double().sum() / (values.numel() + MEAN_EPSILON)


def _min(values: Tensor) -> Tensor:
    return values.min() if values.numel() else values.sum()


def _max(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.sum()


def _quantiles(values: Tensor, levels: tuple[float, ...]) -> list[Tensor]:
    """Linear quantiles of values [n]; zeros when n = 0. One sort, and no size limit (torch.quantile stops at 2^24)."""
    if values.numel() == 0:
        return [values.new_zeros(())] * len(levels)
    ordered = values.sort().values
    last = values.numel() - 1
    result = []
    for level in levels:
        position = level * last
        below = int(position)
        above = min(below + 1, last)
        result.append(torch.lerp(ordered[below], ordered[above], position - below))
    return result
