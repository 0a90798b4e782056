"""Do engine and trainer agree? The log-probs of the same tokens, compared every step; and the policy's entropy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.trainer.exchange import gather_to_rank_zero
from megatron_fipo.types import TrainSequence


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
    """Over all response tokens of the batch: mean entropy, and |engine - trainer| log-prob as mean and max.

    `logprobs` and `entropies` are the trainer's for this rank's `sequences` ([L] each; empty off the last stage). Only
    samples drawn from `weight_version` count for the mismatch: surplus of earlier steps differs rightly. Metrics on
    rank 0, None elsewhere. Collective over `control`.
    """
    share = None
    if layout.is_last_stage and layout.tp_rank == 0:
        masks = [sequence.loss_mask for sequence in sequences]
        share = (
            _flat([entropy.cpu().numpy()[mask] for entropy, mask in zip(entropies, masks)]),
            _flat(
                [
                    np.abs(trainer.cpu().numpy() - sequence.rollout_logprobs)[sequence.loss_mask]
                    for sequence, trainer in zip(sequences, logprobs)
                    if sequence.weight_version == weight_version
                ]
            ),
        )
    shares = gather_to_rank_zero(share, layout, control)
    if shares is None:
        return None
    entropy, mismatch = (_flat([part[i] for part in shares if part is not None]) for i in (0, 1))
    return {
        "entropy": float(entropy.mean(dtype=np.float64)) if entropy.size else 0.0,
        "engine_mismatch/mean": float(mismatch.mean(dtype=np.float64)) if mismatch.size else 0.0,
        "engine_mismatch/max": float(mismatch.max()) if mismatch.size else 0.0,
        "engine_mismatch/num_tokens": float(mismatch.size),
    }


def require_agreement(metrics: dict[str, float] | None, limit: float) -> None:
    """Raise EngineDisagrees when the mean mismatch exceeds `--engine-mismatch-limit`, or is NaN."""
    assert metrics is not None, "called on rank 0"
    found = metrics["engine_mismatch/mean"]
    if not found <= limit:
        raise EngineDisagrees(
            f"the engine's log-probs differ from the trainer's by {found:.3f} on average, but "
            f"--engine-mismatch-limit is {limit}: the engine's weights are stale or broken"
        )


def _flat(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.float32), *arrays])
