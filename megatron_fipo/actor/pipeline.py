"""What runs through Megatron's pipeline schedule: the forward-only log-prob pass and the FIPO update."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_fipo.actor.model import run_model
from megatron_fipo.config import PPOSettings
from megatron_fipo.losses import LOSSES, TokenStats
from megatron_fipo.types import PackedBatch


@dataclass(frozen=True, eq=False)
class UpdateOutcome:
    """What one update left on this rank: token statistics, one per micro-batch on the last stage, none elsewhere."""

    token_stats: tuple[TokenStats, ...]
    grad_norm: float  # before clipping


class NonFiniteUpdate(RuntimeError):
    """A NaN or an infinity in the loss or the gradients. The parameters are unchanged."""


def forward_logprobs(chunks: Sequence[DistributedDataParallel], batches: Sequence[PackedBatch]) -> list[Tensor]:
    """Forward only: `[2, T]` log-probs and entropies per micro-batch on the last stage, nothing on the others."""
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        outputs = _run(chunks, batches, lambda batch, output: (output.new_zeros(()), output), forward_only=True)
    for chunk in chunks:
        chunk.train()
    return outputs


def update(
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: Sequence[PackedBatch],
    *,
    algorithm: str,
    settings: PPOSettings,
    control: dist.ProcessGroup,
    max_response_len: int,
    cp_group: dist.ProcessGroup | None = None,
) -> UpdateOutcome:
    """One optimizer step over this rank's share of a mini-batch.

    The loss is a local sum; Megatron divides the gradients once by the count summed over micro-batches and the
    data- and context-parallel axes. Raises NonFiniteUpdate on every rank, before any parameter changes.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    token_stats = accumulate_gradients(
        chunks,
        batches,
        algorithm=algorithm,
        settings=settings,
        max_response_len=max_response_len,
        cp_group=cp_group,
    )
    _refuse_non_finite(all(bool(torch.isfinite(stats["loss_sum"])) for stats in token_stats), "loss", control)
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    _refuse_non_finite(grad_norm < float("inf"), "gradient", control)
    succeeded, *_ = optimizer.step()
    assert succeeded, "an fp32 or bf16 step is never skipped"
    return UpdateOutcome(tuple(token_stats), grad_norm)


def accumulate_gradients(
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[PackedBatch],
    *,
    algorithm: str,
    settings: PPOSettings,
    max_response_len: int,
    cp_group: dist.ProcessGroup | None = None,
) -> list[TokenStats]:
    """Forward and backward of every micro-batch (1F1B); the gradients of the globally normalised loss are in main_grad.

    Returns the token statistics per micro-batch on the last stage, an empty list on the others.
    """
    loss_of = functools.partial(
        _policy_loss, algorithm=algorithm, settings=settings, max_response_len=max_response_len, cp_group=cp_group
    )
    return _run(chunks, batches, loss_of, forward_only=False)


def _policy_loss(
    batch: PackedBatch,
    output: Tensor,
    *,
    algorithm: str,
    settings: PPOSettings,
    max_response_len: int,
    cp_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, TokenStats]:
    """Megatron's 3-tuple: local loss sum, number of kept tokens or sequences, what to keep of this micro-batch.

    Under context parallelism all three are this rank's share, which add up to the micro-batch's.
    """
    assert batch.old_logprobs is not None, "the old log-prob pass comes before the update"
    loss, info = LOSSES[algorithm](
        output[0],
        batch.old_logprobs,
        batch.advantages,
        batch.loss_mask,
        settings,
        cu_seqlens=batch.cu_seqlens,
        group=cp_group,
        denominator=1.0,
        num_sequences=len(batch.members),
        max_response_len=max_response_len,
        with_metrics=False,
    )
    return loss, info["num_kept"].to(torch.int), info["token_stats"]


def _run(
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[PackedBatch],
    loss_of: Callable[[PackedBatch, Tensor], tuple[Any, ...]],
    *,
    forward_only: bool,
) -> list[Any]:
    def forward_step(batches: Iterator[PackedBatch], stage: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(batches)
        return run_model(stage, batch), functools.partial(loss_of, batch)

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


def _refuse_non_finite(is_finite: bool, what: str, control: dist.ProcessGroup) -> None:
    flag = torch.tensor(int(not is_finite))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=control)
    if flag:
        raise NonFiniteUpdate(f"the {what} of this update is NaN or infinite; the parameters are unchanged")
