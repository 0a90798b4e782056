"""Do engine and trainer agree? The log-probs of the same tokens, compared every step; and the policy's entropy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.trainer.exchange import gather_to_rank_zero
from megatron_fipo.types import TrainSequence

LARGEST_LOG_RATIO = 20.0  # beyond it a log-ratio counts as this, as in the losses, so that its exponential is finite


class EngineDisagrees(RuntimeError):
    """The engine's log-probs are not the trainer's: its weights are stale or its arithmetic is broken."""


def agreement_metrics(
    sequences: Sequence[TrainSequence],
    logprobs: Sequence[Tensor],
    entropies: Sequence[Tensor],
    *,
    weight_version: int,
    layout: ParallelLayout,
    control: dist.ProcessGroup,
) -> dict[str, float] | None:
    """Over all trained tokens of the batch: mean entropy, and how the trainer's log-probs differ from the engine's.

    `logprobs` and `entropies` are the trainer's for this rank's `sequences` ([L] each; empty off the last stage). The
    mismatch is over the tokens that `weight_version` drew: those of older weights, whose share is `older_tokens`,
    differ rightly. With rho = trainer - engine, and ratio = exp(rho): |rho| as `mean` and `max`; `k3_kl`, the mean of
    ratio - rho - 1 (an estimate of KL(engine || trainer), http://joschu.net/blog/kl-approx.html); the ratio as
    `ratio_mean`, `ratio_p99` and `ratio_max`. Tokens at which either is not finite are counted in `num_non_finite` and
    left out everywhere else. Metrics on rank 0, None elsewhere. Collective over `control`.
    """
    share = None
    if layout.is_last_stage and layout.tp_rank == 0:
        masks = [sequence.loss_mask for sequence in sequences]
        share = (
            _flat([entropy.cpu().numpy()[mask] for entropy, mask in zip(entropies, masks)]),
            _flat(
                [
                    (trainer.cpu().numpy() - sequence.rollout_logprobs)[sequence.loss_mask]
                    for sequence, trainer in zip(sequences, logprobs)
                ]
            ),
            _flat([sequence.token_versions[mask] for sequence, mask in zip(sequences, masks)]) == weight_version,
        )
    shares = gather_to_rank_zero(share, layout, control)
    if shares is None:
        return None
    entropy, rho, is_fresh = (_flat([part[i] for part in shares if part is not None]) for i in (0, 1, 2))
    return _metrics(entropy, rho, is_fresh.astype(bool))


def require_agreement(metrics: dict[str, float] | None, limit: float) -> None:
    """Raise EngineDisagrees when the mean mismatch exceeds `--engine-mismatch-limit`."""
    assert metrics is not None, "called on rank 0"
    found = metrics["engine_mismatch/mean"]
    if not found <= limit:
        raise EngineDisagrees(
            f"the engine's log-probs differ from the trainer's by {found:.3f} on average, but "
            f"--engine-mismatch-limit is {limit}: the engine's weights are stale or broken"
        )


def _metrics(entropy: np.ndarray, rho: np.ndarray, is_fresh: np.ndarray) -> dict[str, float]:
    """`entropy`, `rho` [tokens] fp32 or fp64, `is_fresh` [tokens] bool; all of the batch."""
    is_finite = np.isfinite(rho)
    found = rho[is_finite & is_fresh].astype(np.float64)  # a sum over a million tokens
    mismatch = np.abs(found)
    clamped = np.clip(found, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    ratio = np.exp(clamped)
    num = found.size
    return {
        "entropy": _mean(entropy[np.isfinite(entropy)]),
        "engine_mismatch/mean": _mean(mismatch),
        "engine_mismatch/max": float(mismatch.max()) if num else 0.0,
        "engine_mismatch/k3_kl": _mean(np.expm1(clamped) - clamped),
        "engine_mismatch/ratio_mean": _mean(ratio) if num else 1.0,
        "engine_mismatch/ratio_p99": float(np.quantile(ratio, 0.99)) if num else 1.0,
        "engine_mismatch/ratio_max": float(ratio.max()) if num else 1.0,
        "engine_mismatch/num_tokens": float(num),
        "engine_mismatch/older_tokens": _mean(~is_fresh),
        "engine_mismatch/num_non_finite": float((~is_finite).sum()),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if values.size else 0.0


def _flat(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.float32), *arrays])
