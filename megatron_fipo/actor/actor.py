"""The actor: one rank's share of the Megatron model, its optimizer, and the passes the training loop asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_fipo.actor import pipeline
from megatron_fipo.actor.checkpoint_files import agreed
from megatron_fipo.actor.finite_weights import require_finite_weights
from megatron_fipo.actor.fp8_scaling import DelayedScaling, has_delayed_scaling
from megatron_fipo.actor.model import build_policy, gather_parameters, transformer_config
from megatron_fipo.actor.optimizer import build_optimizer, build_scheduler
from megatron_fipo.actor.owned_tensors import require_on_device
from megatron_fipo.actor.reference import ReferenceWeights, copy_weights, weights_lent
from megatron_fipo.actor.setup import Groups
from megatron_fipo.actor.weight_stream import export_buckets
from megatron_fipo.actor.weights import WeightTable, export_weights, load_hf_weights, weight_table
from megatron_fipo.config import CorrectionSettings, PPOSettings, require
from megatron_fipo.losses import collect_token_stats, correction_metrics, update_histograms, update_metrics
from megatron_fipo.losses.custom import custom_metrics
from megatron_fipo.ops.packing import micro_batches, pack, padded_length, shared_micro_batches
from megatron_fipo.ops.zigzag import zigzag_indices
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.types import PackedBatch, TrainSequence
from megatron_fipo.weights.architecture import Architecture, check_layout, padded_vocab_size
from megatron_fipo.weights.bucket import WeightBucket
from megatron_fipo.weights.buffers import BucketBuffers
from megatron_fipo.weights.source import WeightSource

NO_CORRECTION = CorrectionSettings()
QUANTISED_ROWS = 128  # FP8 and FP4 matrix products of every recipe take rows in multiples of this


@dataclass(frozen=True, eq=False)
class Actor:
    """What a rank needs to score and train. Made by `build_actor`; every method is called by all ranks together."""

    arch: Architecture
    layout: ParallelLayout
    groups: Groups
    chunks: list[DistributedDataParallel]  # of this pipeline rank; several when stages are interleaved
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    table: WeightTable
    device: torch.device
    max_tokens_per_micro_batch: int  # on each context-parallel rank
    max_response_len: int
    row_multiple: int  # what the rows of a rank's packs are padded to a multiple of
    share_prompts: bool  # compute a prompt that samples of a micro-batch share once
    even_micro_batches: bool  # every rank runs as many as the one with the most
    scaling: DelayedScaling | None  # None unless that is the FP8 recipe
    reference: ReferenceWeights | None  # the weights of --hf-checkpoint; None without a KL term
    buffers: BucketBuffers = field(default_factory=BucketBuffers)

    def old_logprobs(self, mini_batches: Sequence[Sequence[TrainSequence]]) -> tuple[list[Tensor], list[Tensor]]:
        """Log-probs and entropies of this rank's sequences under the current weights, forward only.

        Kernels, precision, code path and packing are those of the update: no micro-batch crosses a mini-batch. On the
        last pipeline stage: per sequence, in order, [L] fp32, 0 where the loss mask is False; else two empty lists.
        Context-parallel ranks exchange their shares, so that each has whole sequences.
        """
        require_on_device(self.chunks)
        batches: list[PackedBatch] = []
        first_of: list[int] = []  # per micro-batch: how many sequences the mini-batches before its own hold
        num_before = 0
        for mini_batch in mini_batches:
            packed = self._packed(mini_batch)
            batches += packed
            first_of += [num_before] * len(packed)
            num_before += len(mini_batch)
        sequences = [sequence for mini_batch in mini_batches for sequence in mini_batch]
        outputs = self._forward(batches)
        logprobs: dict[int, Tensor] = {}
        entropies: dict[int, Tensor] = {}
        for batch, first, output in zip(batches, first_of, outputs):
            whole = self._whole(output, batch.cu_seqlens)
            for member, start in zip(batch.members, batch.cu_seqlens.tolist()):
                index = first + member
                end = start + len(sequences[index].token_ids)
                logprobs[index], entropies[index] = whole[:, start:end].clone()
        order = sorted(logprobs)
        return [logprobs[i] for i in order], [entropies[i] for i in order]

    def reference_logprobs(self, mini_batches: Sequence[Sequence[TrainSequence]]) -> list[Tensor]:
        """What `old_logprobs` gives, under the weights of the Hugging Face checkpoint that the run began with.

        The current weights are back, bit for bit, when it returns. Only for an actor built with `keep_reference`.
        """
        assert self.reference is not None, "this actor was built without keep_reference"
        with weights_lent(self.chunks, self.reference):
            logprobs, _ = self.old_logprobs(mini_batches)
        return logprobs

    def update(
        self,
        sequences: Sequence[TrainSequence],
        old_logprobs: Sequence[Tensor],
        *,
        algorithm: str,
        settings: PPOSettings,
        correction: CorrectionSettings = NO_CORRECTION,
        reference_logprobs: Sequence[Tensor] = (),
    ) -> dict[str, Any] | None:
        """One optimizer step over a mini-batch, of which `sequences` are this rank's share.

        `old_logprobs` is what `old_logprobs()` gave for them (empty off the last stage), and so is
        `reference_logprobs`, needed where `correction` has a KL term. Returns the metrics of the whole mini-batch and
        its histograms on rank 0, None elsewhere.

        When the loss (or a statistic of the user's own loss) or the gradient is NaN or infinite on any rank, no rank
        makes the step: parameters, optimizer state and learning-rate schedule keep every bit, and rank 0's metrics are
        `skipped` 1.0, `skipped_for_loss` and `skipped_for_gradient` (1.0 for which of them it was) and `lr`. Otherwise
        `skipped` is 0.0 among them.
        """
        require_on_device(self.chunks, self.optimizer)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        is_last = self.layout.is_last_stage
        assert not (is_last and correction.kl_coef and not reference_logprobs), "a KL term, but no reference log-probs"
        batches = self._packed(
            sequences, old_logprobs if is_last else None, reference_logprobs if is_last and reference_logprobs else None
        )
        objective = pipeline.Objective(algorithm, settings, correction, self.max_response_len)
        outcome = pipeline.update(
            self.chunks, self.optimizer, batches, objective, control=self.groups.control, cp_group=self.groups.cp
        )
        if outcome.skipped_for is not None:
            culprits = {f"skipped_for_{what}": float(outcome.skipped_for == what) for what in ("loss", "gradient")}
            return {"skipped": 1.0, **culprits, "lr": learning_rate} if self.layout.rank == 0 else None
        self.scheduler.step(increment=1)
        metrics = self._mini_batch_metrics(outcome, settings, correction)
        if metrics is not None:
            metrics.update(lr=learning_rate, grad_norm=outcome.grad_norm, skipped=0.0)
        return metrics

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The current weights as (Hugging Face name, tensor), on rank 0; every rank must exhaust the iterator.

        Raises BrokenWeights on every rank when they hold a number that is not finite.
        """
        gather_parameters(self.chunks)
        require_finite_weights(self.chunks, self.groups.control, num_updates=self.scheduler.num_steps)
        return export_weights(self.chunks, self.arch, self.layout, self.groups, self.table)

    def export_buckets(
        self, bucket_bytes: int, *, receivers: Sequence[int] = (0,), fp8: bool = False
    ) -> Iterator[WeightBucket]:
        """The current weights in buckets for the engines, on each rank of `receivers`; every rank must exhaust it.

        With `fp8` linear weights are block-quantised on the way (weights/fp8.py). Raises BrokenWeights as
        `export_weights`: after the last bucket, which the engines are loading meanwhile, but first where `fp8` would
        hide such a number.
        """
        gather_parameters(self.chunks)
        check = partial(require_finite_weights, self.chunks, self.groups.control, num_updates=self.scheduler.num_steps)
        if fp8:
            check()
        yield from export_buckets(
            self.chunks,
            self.arch,
            self.layout,
            self.table,
            self.buffers,
            bucket_bytes,
            receivers=receivers,
            quantise=fp8,
        )
        if not fp8:
            check()

    def _forward(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """The forward-only pass, under the very scales of the update that follows."""
        if self.scaling is None:
            return pipeline.forward_logprobs(self.chunks, batches)
        few = batches[: self.layout.pp if self.layout.vpp > 1 else 1]
        with self.scaling.as_in_training(partial(pipeline.forward_logprobs, self.chunks, few)) as make_scales:
            return pipeline.forward_logprobs(self.chunks, batches, make_scales)

    def _packed(
        self,
        sequences: Sequence[TrainSequence],
        old_logprobs: Sequence[Tensor] | None = None,
        reference_logprobs: Sequence[Tensor] | None = None,
    ) -> list[PackedBatch]:
        layout = self.layout
        return [
            pack(
                sequences,
                members,
                old_logprobs=old_logprobs,
                reference_logprobs=reference_logprobs,
                share_prompts=self.share_prompts,
                multiple_of=self.row_multiple,
                cp_size=layout.cp,
                cp_rank=layout.cp_rank,
                device=self.device,
            )
            for members in self._micro_batches(sequences)
        ]

    def _micro_batches(self, sequences: Sequence[TrainSequence]) -> list[list[int]]:
        """As few as the token budget allows, and as many as the schedule and the other ranks ask for.

        Interleaved stages take micro-batches in rounds of pp. Expert-parallel ranks exchange tokens in every layer, and
        data-parallel ranks with delayed scaling their amaxes after every micro-batch, so then all ranks run the same
        number (collective over all ranks).
        """
        layout = self.layout
        max_tokens = padded_length(self.max_tokens_per_micro_batch * layout.cp, layout.cp)
        lengths = [padded_length(len(sequence.token_ids), layout.cp) for sequence in sequences]
        require(
            max(lengths) <= max_tokens,
            "--max-tokens-per-micro-batch",
            self.max_tokens_per_micro_batch,
            f">= {max(lengths) // layout.cp}, this rank's share of the longest sequence",
        )
        unit = layout.pp if layout.vpp > 1 else 1
        at_least = unit
        while True:
            if self.share_prompts:
                batches = shared_micro_batches(sequences, max_tokens, at_least=at_least)
            else:
                batches = micro_batches(lengths, max_tokens, at_least=at_least)
            wanted = -(-len(batches) // unit) * unit
            if self.even_micro_batches:
                most = torch.tensor(wanted)
                dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.groups.control)
                wanted = int(most)
            if wanted == at_least or (len(batches) == wanted and not self.even_micro_batches):
                return batches
            at_least = wanted

    def _whole(self, output: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The context-parallel shares [2, T] of a micro-batch put together in sequence order: [2, T * cp]."""
        if self.layout.cp == 1:
            return output
        shares = [torch.empty_like(output) for _ in range(self.layout.cp)]
        dist.all_gather(shares, output.contiguous(), group=self.groups.cp)
        whole = output.new_empty(2, output.size(1) * self.layout.cp)
        for rank, share in enumerate(shares):
            whole[:, zigzag_indices(cu_seqlens, self.layout.cp, rank)] = share
        return whole

    def _mini_batch_metrics(
        self, outcome: pipeline.UpdateOutcome, settings: PPOSettings, correction: CorrectionSettings
    ) -> dict[str, Any] | None:
        """Gather the per-token statistics of the whole mini-batch to rank 0: quantiles do not average."""
        share: dict[str, np.ndarray] | None = None
        if self.layout.is_last_stage and self.layout.tp_rank == 0:
            stats = collect_token_stats(outcome.token_stats)
            share = {name: value.cpu().numpy() for name, value in stats.items()}
        shares: list[Any] | None = [None] * self.layout.world_size if self.layout.rank == 0 else None
        dist.gather_object(share, shares, dst=0, group=self.groups.control)
        if shares is None:
            return None
        parts = [{name: torch.from_numpy(array) for name, array in part.items()} for part in shares if part is not None]
        whole = collect_token_stats(parts)
        metrics = {**correction_metrics(whole, correction), "num_kept": float(whole["num_kept"].sum())}
        if correction.custom_loss_function_path is not None:
            return custom_metrics(whole, settings) | metrics
        return update_metrics(whole, settings) | update_histograms(whole, settings) | metrics


def build_actor(
    arch: Architecture,
    weights: WeightSource,
    layout: ParallelLayout,
    groups: Groups,
    *,
    params_dtype: torch.dtype,
    device: torch.device,
    transformer_impl: str,
    transformer: Mapping[str, Any],
    ddp: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    lr_warmup_iters: int,
    max_tokens_per_micro_batch: int,
    max_response_len: int,
    vocab_divisible_by: int = 1,
    temperature: float = 1.0,
    logprobs_chunk_size: int = 1024,
    keep_reference: bool = False,
) -> Actor:
    """Build this rank's stage, load its weights, and make the optimizer over them.

    `transformer`, `ddp` and `optimizer` are the user's megatron-core fields; log-probs are those at `temperature`.
    With `keep_reference` a copy of these weights stays in main memory, for `reference_logprobs`.
    Raises ValueError for a layout that does not divide the architecture. Collective over all ranks.
    """
    check_layout(arch, layout)
    padded_vocab = padded_vocab_size(arch.vocab_size, layout.tp, vocab_divisible_by)
    config = transformer_config(arch, layout, params_dtype=params_dtype, device=device, overrides=transformer)
    chunks = build_policy(
        arch,
        config,
        layout,
        padded_vocab=padded_vocab,
        transformer_impl=transformer_impl,
        ddp=ddp,
        temperature=temperature,
        logprobs_chunk_size=logprobs_chunk_size,
        device=device,
    )
    # what one rank finds damaged, all of them raise
    agreed(lambda: load_hf_weights(chunks, arch, weights, layout, padded_vocab=padded_vocab), groups.control)
    reference = copy_weights(chunks) if keep_reference else None
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    is_delayed = has_delayed_scaling(config)
    built = build_optimizer(chunks, params_dtype=params_dtype, overrides=optimizer)
    return Actor(
        arch=arch,
        layout=layout,
        groups=groups,
        chunks=chunks,
        optimizer=built,
        scheduler=build_scheduler(built, lr_warmup_iters=lr_warmup_iters),
        table=weight_table(chunks, arch, layout, groups),
        device=device,
        max_tokens_per_micro_batch=max_tokens_per_micro_batch,
        max_response_len=max_response_len,
        row_multiple=(layout.tp if layout.sequence_parallel else 1)
        * (QUANTISED_ROWS if config.fp8 or config.fp4 else 1),
        # Transformer Engine's kernels know sequences, not shared prompts, and a cut sequence has no prompt to share
        share_prompts=transformer_impl == "local" and layout.cp == 1,
        even_micro_batches=layout.ep > 1 or (is_delayed and layout.dp > 1),
        scaling=DelayedScaling(chunks) if is_delayed else None,
        reference=reference,
    )
