"""The training loop: one step as data flows, in order. Imports neither Megatron nor SGLang; both are handed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from megatron_fipo.config import CorrectionSettings, PPOSettings
from megatron_fipo.metrics.run_logger import RunLogger
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.trainer.agreement import agreement_metrics, require_agreement
from megatron_fipo.trainer.exchange import RankZero, StopRequested, scatter_shares
from megatron_fipo.trainer.guards import Guards
from megatron_fipo.types import TrainSequence


class Actor(Protocol):
    """What the loop asks of the model; every call is made by all ranks together."""

    def old_logprobs(self, mini_batches: Sequence[Sequence[TrainSequence]]) -> tuple[list[Tensor], list[Tensor]]: ...

    def reference_logprobs(self, mini_batches: Sequence[Sequence[TrainSequence]]) -> list[Tensor]: ...

    def update(
        self,
        sequences: Sequence[TrainSequence],
        old_logprobs: Sequence[Tensor],
        *,
        algorithm: str,
        settings: PPOSettings,
        correction: CorrectionSettings,
        reference_logprobs: Sequence[Tensor],
    ) -> dict[str, Any] | None: ...


@dataclass(frozen=True, eq=False)
class Rollout:
    """One rollout batch on rank 0: what to train on, and what is worth logging about it."""

    sequences: Sequence[TrainSequence]
    metrics: Mapping[str, float]
    texts: Sequence[Mapping[str, Any]]  # a few sampled responses
    histograms: Mapping[str, Sequence[float]] = field(default_factory=dict)  # values of all samples, by name


@dataclass(frozen=True, eq=False)
class Run:
    """Everything one training run is made of. The callables hide whether engines, files or fakes stand behind them."""

    algorithm: str
    loss: PPOSettings
    correction: CorrectionSettings
    num_steps: int
    num_updates: int
    layout: ParallelLayout
    control: dist.ProcessGroup
    rank_zero: RankZero
    hidden_size: int  # of the model: what a long sequence costs
    actor: Actor
    collect: Callable[[int], Rollout]  # the rollout batch of a step; rank 0
    start_training: Callable[[], None]  # the engines rest
    sync_weights: Callable[[int], None]  # push the weights under this version; all ranks
    evaluate: Callable[[int], None]  # after this many steps, once; all ranks; StopRequested when abandoned
    save: Callable[[int], None]  # the state after this many steps, unless it is saved already; all ranks
    pause: Callable[[], None]  # between stages; all ranks; StopRequested when a signal asks the run to end
    memory: Callable[[], Mapping[str, float]]  # of both sides at their last turns, by metric name; rank 0
    eval_interval: int | None
    save_interval: int | None
    engine_mismatch_limit: float
    guards: Guards | None  # rank 0
    log: RunLogger


def train(run: Run, *, first_step: int) -> bool:
    """Run steps `first_step` + 1 .. `num_steps`. Weights of version v are those after v steps. All ranks together.

    Returns whether it got to the end. When it is asked to stop, the stage under way is finished or abandoned, and the
    state after the last whole step is saved.
    """
    num_done = first_step
    try:
        if first_step == 0 or _evaluation_is_due(run, first_step):
            run.evaluate(first_step)
        if num_done == run.num_steps:  # no step is left, but it may have come from another directory than it saves to
            run.save(num_done)
        while num_done < run.num_steps:
            run.pause()
            _step(run, num_done + 1)
            num_done += 1
            if _evaluation_is_due(run, num_done):
                run.evaluate(num_done)
            if num_done == run.num_steps or _is_due(num_done, run.save_interval):
                run.save(num_done)
    except StopRequested:
        run.save(num_done)
        return False
    return True


def _step(run: Run, step: int) -> None:
    """One step. StopRequested leaves everything as it was before, but for what generation has drawn."""
    with run.log.stage("rollout"):
        rollout = run.rank_zero.run(partial(run.collect, step), interruptible=True)
    run.pause()
    run.start_training()
    with run.log.stage("logprobs"):
        mini_batches = scatter_shares(
            rollout.sequences if rollout else None, run.num_updates, run.layout, run.control, run.hidden_size
        )
        sequences = [sequence for mini_batch in mini_batches for sequence in mini_batch]
        logprobs, entropies = run.actor.old_logprobs(mini_batches)
        agreement = agreement_metrics(
            sequences, logprobs, entropies, weight_version=step - 1, layout=run.layout, control=run.control
        )
        run.rank_zero.run(partial(require_agreement, agreement, run.engine_mismatch_limit))
    reference: list[Tensor] = []
    if run.correction.kl_coef > 0:
        with run.log.stage("reference"):
            reference = run.actor.reference_logprobs(mini_batches)
    with run.log.stage("update"):
        updates = _update(run, mini_batches, logprobs, reference)
    with run.log.stage("sync"):
        run.sync_weights(step)
    record = {**_step_metrics(rollout, agreement, updates), **run.memory(), "step": step}
    warnings = run.rank_zero.run(partial(_log_step, run, record))
    for warning in warnings or ():
        run.log.say(f"warning: step {step}: {warning}")
    if rollout is not None:
        run.log.log_samples(step, rollout.texts)


def _update(
    run: Run,
    mini_batches: Sequence[Sequence[TrainSequence]],
    logprobs: Sequence[Tensor],
    reference: Sequence[Tensor],
) -> list[dict[str, Any] | None]:
    """One optimizer step per mini-batch; metrics on rank 0, None elsewhere."""
    updates = []
    start = 0
    for mini_batch in mini_batches:
        end = start + len(mini_batch)
        updates.append(
            run.actor.update(
                mini_batch,
                logprobs[start:end],
                algorithm=run.algorithm,
                settings=run.loss,
                correction=run.correction,
                reference_logprobs=reference[start:end],
            )
        )
        start = end
    return updates


def _log_step(run: Run, record: Mapping[str, Any]) -> list[str]:
    """Log the step with what the guards found in it, also when they stop the run; what they warn of. Rank 0."""
    assert run.guards is not None
    try:
        return run.guards.check(record)
    finally:
        run.log.log_step({**record, **run.guards.metrics()})


def _step_metrics(
    rollout: Rollout | None, agreement: Mapping[str, float] | None, updates: Sequence[dict[str, Any] | None]
) -> dict[str, Any]:
    """The step's record on rank 0; what sums up the updates stands beside the updates themselves.

    Updates that were skipped for a NaN or an infinity have no part in the summary but their number.
    """
    if rollout is None:
        return {}
    assert agreement is not None
    present = [update for update in updates if update is not None]
    made = [update for update in present if not update["skipped"]]
    summary: dict[str, float] = {"num_skipped_updates": len(present) - len(made), "lr": present[-1]["lr"]}
    # the user's own loss may give a statistic in some updates only
    numbers = {name: None for update in made for name, value in update.items() if isinstance(value, int | float)}
    for name in numbers:
        if name not in ("lr", "skipped"):
            summary[name] = _over_updates(name, [update[name] for update in made if name in update])
    if "future_kl_std" in present[0]:
        # before the first update old and new log-probs are the same computation: any spread is noise
        summary["noise_gauge"] = present[0]["future_kl_std"]
    return {
        **summary,  # first: a statistic of the user's own loss may bear the name of a step's metric
        **rollout.metrics,
        **agreement,
        "num_tokens": sum(len(sequence.token_ids) for sequence in rollout.sequences),
        "histograms": rollout.histograms,
        "updates": present,
    }


def _over_updates(name: str, values: Sequence[float]) -> float:
    """A step's value of an update metric: the extreme of extremes, the mean of everything else."""
    if name.endswith(("_max", "/max")):
        return max(values)
    return min(values) if name.endswith(("_min", "/min")) else sum(values) / len(values)


def _evaluation_is_due(run: Run, step: int) -> bool:
    return step == run.num_steps or _is_due(step, run.eval_interval)


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
