"""What runs through Megatron's pipeline schedule: the forward-only log-prob pass and the FIPO update."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_fipo.actor.model import run_model
from megatron_fipo.config import CorrectionSettings, PPOSettings
from megatron_fipo.losses import LOSSES, TokenStats, correction_weights
from megatron_fipo.losses.custom import Loss, load_custom_loss
from megatron_fipo.types import PackedBatch

Culprit = Literal["loss", "gradient"]

LARGEST_GRAD_NORM = 2.0**63  # Adam squares gradients: beyond it the square is no fp32 number, and would stay infinite


@dataclass(frozen=True)
class Objective:
    """What an update makes smaller."""

    algorithm: str
    settings: PPOSettings
    correction: CorrectionSettings
    max_response_len: int

    def loss(self) -> Loss:
        """The user's own loss, or the algorithm's. Raises ValueError when there is none where the flag says."""
        path = self.correction.custom_loss_function_path
        return LOSSES[self.algorithm] if path is None else load_custom_loss(path)


@dataclass(frozen=True, eq=False)
class MicroBatchLoss:
    """What is kept of a micro-batch on the last stage."""

    loss: Tensor  # [] the local sum, detached
    token_stats: TokenStats


@dataclass(frozen=True, eq=False)
class UpdateOutcome:
    """What one update left on this rank."""

    token_stats: tuple[TokenStats, ...]  # one per micro-batch on the last stage, none elsewhere
    grad_norm: float  # before clipping; NaN when the loss was not finite
    skipped_for: Culprit | None  # what was not finite, on any rank; None: the step was made


def forward_logprobs(
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[PackedBatch],
    after_each: Callable[[], None] | None = None,
) -> list[Tensor]:
    """Forward only: `[2, T]` log-probs and entropies per micro-batch on the last stage, nothing on the others.

    `after_each` is called when a chunk has run a micro-batch, before the next one begins.
    """
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        outputs = _run(
            chunks,
            batches,
            lambda batch, output: (output.new_zeros(()), output),
            forward_only=True,
            after_each=after_each,
        )
    for chunk in chunks:
        chunk.train()
    return outputs


def update(
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: Sequence[PackedBatch],
    objective: Objective,
    *,
    control: dist.ProcessGroup,
    cp_group: dist.ProcessGroup | None = None,
) -> UpdateOutcome:
    """One optimizer step over this rank's share of a mini-batch.

    The loss is a local sum; Megatron divides the gradients once by the count summed over micro-batches and the
    data- and context-parallel axes. When the loss or the gradient of any rank is not finite, or the gradient's norm is
    beyond LARGEST_GRAD_NORM, no rank makes the step: parameters and optimizer keep every bit. Collective over `control`
    (all ranks).
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses = accumulate_gradients(chunks, batches, objective, cp_group=cp_group)
    token_stats = tuple(loss.token_stats for loss in losses)
    # the user's own statistics become metrics, which must be finite; of ours only the loss can break them
    own = objective.correction.custom_loss_function_path is not None
    watched = [loss.loss for loss in losses] + [x for stats in token_stats for x in stats.values() if own]
    if not _agreed(all(bool(torch.isfinite(values).all()) for values in watched), control):
        return UpdateOutcome(token_stats, float("nan"), "loss")
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not _agreed(grad_norm <= LARGEST_GRAD_NORM, control):
        return UpdateOutcome(token_stats, grad_norm, "gradient")
    succeeded, *_ = optimizer.step()
    assert succeeded, "an fp32 or bf16 step is never skipped"
    return UpdateOutcome(token_stats, grad_norm, None)


def accumulate_gradients(
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[PackedBatch],
    objective: Objective,
    *,
    cp_group: dist.ProcessGroup | None = None,
) -> list[MicroBatchLoss]:
    """Forward and backward of every micro-batch (1F1B); the gradients of the globally normalised loss are in main_grad.

    Returns loss and token statistics per micro-batch on the last stage, an empty list on the others.
    """
    loss_of = functools.partial(_policy_loss, loss=objective.loss(), objective=objective, cp_group=cp_group)
    return _run(chunks, batches, loss_of, forward_only=False)


def _policy_loss(
    batch: PackedBatch,
    output: Tensor,
    *,
    loss: Loss,
    objective: Objective,
    cp_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, MicroBatchLoss]:
    """Megatron's 3-tuple: local loss sum, number of kept tokens or sequences, what to keep of this micro-batch.

    Under context parallelism all three are this rank's share, which add up to the micro-batch's.
    """
    assert batch.old_logprobs is not None, "the old log-prob pass comes before the update"
    corrected = correction_weights(batch.old_logprobs, batch.rollout_logprobs, batch.loss_mask, objective.correction)
    token_weights, correction_stats = corrected or (None, {})
    local_sum, info = loss(
        output[0],
        batch.old_logprobs,
        batch.advantages,
        batch.loss_mask,
        objective.settings,
        cu_seqlens=batch.cu_seqlens,
        group=cp_group,
        denominator=1.0,
        num_sequences=len(batch.members),
        max_response_len=objective.max_response_len,
        with_metrics=False,
        token_weights=token_weights,
        reference_logprobs=batch.reference_logprobs,
        kl_coef=objective.correction.kl_coef,
    )
    token_stats = {**info["token_stats"], **correction_stats}
    return local_sum, info["num_kept"].to(torch.int), MicroBatchLoss(local_sum.detach(), token_stats)


def _run(
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[PackedBatch],
    loss_of: Callable[[PackedBatch, Tensor], tuple[Any, ...]],
    *,
    forward_only: bool,
    after_each: Callable[[], None] | None = None,
) -> list[Any]:
    def forward_step(batches: Iterator[PackedBatch], stage: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(batches)
        output = run_model(stage, batch)
        if after_each is not None:
            after_each()
        return output, functools.partial(loss_of, batch)

    interleaved = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks] if interleaved else iter(batches),
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(batches),
        seq_length=1,  # ignored: every stage announces the shape it sends
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _agreed(is_finite: bool, control: dist.ProcessGroup) -> bool:
    """Whether it is so on all ranks."""
    flag = torch.tensor(int(is_finite))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=control)
    return bool(flag)
