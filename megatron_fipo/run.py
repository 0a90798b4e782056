"""One run, start to end: check, start engines and actor side by side, resume, train, evaluate, export, clean up."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.checkpoint import load_checkpoint, require_same_architecture
from megatron_fipo.actor.checkpoint_files import (
    RUN_STATE,
    CheckpointError,
    find_valid_checkpoint,
    read_run_state,
    verify_checkpoint_together,
)
from megatron_fipo.actor.checkpoint_saver import CheckpointSaver
from megatron_fipo.actor.finite_weights import BrokenWeights
from megatron_fipo.actor.last_word import passed_on
from megatron_fipo.actor.megatron_weights import MegatronWeights
from megatron_fipo.actor.setup import initialize_distributed, initialize_model_parallel, shut_down
from megatron_fipo.arguments import Settings, config_text, config_values
from megatron_fipo.assembly import (
    RolloutSide,
    build_trainer_side,
    log_evaluation,
    replayed,
)
from megatron_fipo.checks import Checked, holds_checkpoints
from megatron_fipo.config import FIPOSettings
from megatron_fipo.connections import notice_lost_machines
from megatron_fipo.engine_nodes import RunEngines, await_engines, find_nodes, start_own_engines
from megatron_fipo.hybrid.turns import HybridEngine
from megatron_fipo.interruption import Signals
from megatron_fipo.metrics.records import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from megatron_fipo.metrics.run_logger import RunLogger
from megatron_fipo.own_state import NOTHING_DONE, require_own_state
from megatron_fipo.problems import Problems
from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.trainer.custom_generation import FLAG as CUSTOM_GENERATE
from megatron_fipo.trainer.evaluation_result import EvaluationResult, summary
from megatron_fipo.trainer.exchange import RankZero, StopRequested, largest
from megatron_fipo.trainer.guards import Guards
from megatron_fipo.trainer.loop import Rollout, Run, train
from megatron_fipo.trainer.sampling import CollectorPosition
from megatron_fipo.user_function import load_user_function
from megatron_fipo.weights.hf_files import write_hf_checkpoint
from megatron_fipo.weights.mapping import checked_stream


def run(settings: Settings, checked: Checked, problems: Problems | None, signals: Signals) -> bool:
    """Train as `settings` say, which `checked` is for. Every rank calls this.

    `problems`: what rank 0 trains on; None on the other ranks, and where recorded rollouts are replayed. Returns
    whether the run got to its end; it did not where one of the `signals` asked it to stop and its state was saved.
    Errors of the user's making are ValueErrors on rank 0 and ValueError or RankZeroFailed elsewhere.
    """
    with contextlib.ExitStack() as stack:
        try:
            with passed_on(signals):
                return _run(settings, checked, problems, signals, stack)
        finally:
            signals.ending()  # before the clean-up


def _run(
    settings: Settings, checked: Checked, problems: Problems | None, signals: Signals, stack: contextlib.ExitStack
) -> bool:
    layout, device = checked.layout, checked.device
    initialize_distributed(layout, device, timeout_minutes=settings.run.distributed_timeout_minutes)
    stack.callback(shut_down)
    said: list[str] = [*settings.notes, *(problems.notes if problems is not None else ())]
    resume_from = _checkpoint_to_resume(settings, said.append)  # before the log drops what came after it
    if resume_from is None and isinstance(checked.weights, MegatronWeights):
        said += _verified_start(checked.weights)
    saved: dict[str, Any] = {"step": 0, "trainer": NOTHING_DONE}
    if resume_from is not None:
        saved = read_run_state(resume_from)
        require_same_architecture(resume_from, saved["model"], asdict(checked.arch))  # the rest only Megatron knows
        require_own_state(resume_from, saved)
    first_step = saved["step"]
    if first_step > settings.run.train_iters:
        raise ValueError(
            f"--train-iters is {settings.run.train_iters}, but {resume_from} (--load) already has {first_step} steps"
        )
    is_resumed = resume_from is not None or settings.run.auto_resume
    log = stack.enter_context(
        _open_log(settings, layout.rank, first_step if is_resumed else None, saved["trainer"]["num_updates"])
    )
    for note in said:
        log.say(note)
    custom = settings.rollout.custom_generate_function_path
    if problems is not None and custom is not None:
        load_user_function(CUSTOM_GENERATE, custom)  # what is wrong with it shows before an engine starts
    has_engines = settings.rollout.replay_rollouts is None
    # engines take what a GPU has free: the actor is built when they have let go of it. Elsewhere they start meanwhile
    engines_first = has_engines and device.type == "cuda" and settings.engine.placement == "colocated"
    engines: RunEngines | None = None
    own_engines: EnginePool | None = None
    if has_engines:
        nodes = find_nodes(settings.engine, os.environ)
        own_engines = start_own_engines(settings, nodes, layout.rank, device, log.say)
        if own_engines is not None:
            stack.enter_context(own_engines)
    if device.type == "cpu":
        from megatron_fipo.patches.megatron_cpu import apply_patches

        apply_patches()
    groups = initialize_model_parallel(
        layout, seed=settings.run.seed, timeout_minutes=settings.run.distributed_timeout_minutes
    )
    notice_lost_machines(settings.run.node_timeout_s)
    if engines_first:
        with log.stage("start engines", part_of_step=False):
            engines = await_engines(
                own_engines, nodes, settings.engine, groups.control, stack, log.say, then_release=True
            )
    with log.stage("start trainer", part_of_step=False):
        actor = build_trainer_side(settings, checked, groups)
        if resume_from is not None and not load_checkpoint(actor, resume_from):
            log.say(f"{resume_from} was saved in another layout or precision: the run goes on, but not bit for bit")
    guards = None
    if layout.rank == 0:
        guards = Guards(settings.guards)
    if has_engines and not engines_first:
        with log.stage("start engines", part_of_step=False):
            engines = await_engines(own_engines, nodes, settings.engine, groups.control, stack, log.say)
    stages = stack.enter_context(contextlib.closing(_Stages(settings, actor, problems, engines, guards, log, signals)))
    if resume_from is not None:
        stages.restore(resume_from, saved)
    is_finished = stages.train(first_step)
    log.say(log.timings_table())
    return is_finished


def _checkpoint_to_resume(settings: Settings, say: Callable[[str], None]) -> Path | None:
    """The verified checkpoint that the run goes on from; None for a run from the start. Collective over all ranks."""
    load, save = settings.run.load, settings.run.save
    if load is not None:
        return find_valid_checkpoint(load, say=say)
    if not settings.run.auto_resume:
        return None
    assert save is not None
    found = [holds_checkpoints(save)]
    dist.broadcast_object_list(found, src=0)  # one rank's look decides for all
    if found[0]:
        say(f"--auto-resume: going on from the checkpoint in {save}")
        return find_valid_checkpoint(save, say=say)
    records = Path(settings.run.output_dir, METRICS_FILE)
    num_lost = len(records.read_text(encoding="utf-8").splitlines()) if records.is_file() else 0
    lost = (
        f"; {num_lost} steps that {records} holds were made before any was saved, and are made again"
        if num_lost
        else ""
    )
    say(f"--auto-resume: {save} holds no checkpoint yet, so the run begins at its first step{lost}")
    return None


def _verified_start(weights: MegatronWeights) -> list[str]:
    """Compare --pretrained-checkpoint, where it is a run's, with its manifest: what to say of it. Collective."""
    if (weights.directory / RUN_STATE).is_file():
        try:
            verify_checkpoint_together(weights.directory)
        except CheckpointError as error:
            raise CheckpointError(f"--pretrained-checkpoint: {error}") from error
    return [] if weights.note is None else [f"--pretrained-checkpoint: {weights.note}"]


class _Stages:
    """The callables the loop needs, over real engines or over recorded rollouts."""

    def __init__(
        self,
        settings: Settings,
        actor: Actor,
        problems: Problems | None,
        engines: RunEngines | None,
        guards: Guards | None,
        log: RunLogger,
        signals: Signals,
    ) -> None:
        self.settings, self.actor, self.log = settings, actor, log
        self.layout, self.control = actor.layout, actor.groups.control
        self.guards, self.signals = guards, signals
        self.rank_zero = RankZero(self.layout, self.control, signals)
        self.replays = settings.rollout.replay_rollouts is not None
        self.hybrid: HybridEngine | None = None
        self.rollout_side: RolloutSide | None = None
        self._scores: dict[int, float] = {}  # step -> its evaluation's; rank 0
        self._evaluated: set[int] = set()  # steps whose evaluations the records hold; rank 0
        if self.layout.rank == 0:
            records = read_metrics(Path(settings.run.output_dir) / EVALUATIONS_FILE)
            self._evaluated = {record["step"] for record in records}
            self._scores = {record["step"]: record["accuracy"] for record in records}
        self.saver: CheckpointSaver | None = None
        if settings.run.save is not None:
            self.saver = CheckpointSaver(
                actor,
                settings.run.save,
                is_async=settings.run.async_save,
                keep_last=settings.run.keep_last,
                keep_best=settings.run.keep_best,
                scores=self._scores,
                say=log.say,
            )
            self.rank_zero.after_failure.append(self._commit_what_is_written)
        self._saved_step: int | None = None
        self._before: tuple[int, CollectorPosition] | None = None  # the step that is done, and where collection stood
        self._restored: dict[str, Any] | None = None
        if engines is None:
            return
        engine, is_colocated = settings.engine, settings.engine.placement == "colocated"
        self.rank_zero.together["resync"] = self._resync
        self.hybrid = HybridEngine(
            actor,
            engines.everywhere,
            local_pool=engines.here,
            receivers=engines.nodes.receivers,
            bucket_bytes=engine.weight_bucket_mb * 2**20,
            placement=engine.placement,
            offload_trainer=engine.offload_trainer and is_colocated and actor.device.type == "cuda",
            check_weights_interval=engine.check_weights_interval,
            tp_size=engine.tp_size,
            ep_size=engine.server_args.get("ep_size", 1),
            fp8=engine.fp8_weights,
            call_everyone=lambda: self.rank_zero.call("resync"),
            say=log.say,
        )
        if problems is not None:
            self.rollout_side = RolloutSide(settings, problems, self.hybrid.generate)

    def restore(self, directory: Path, saved: Mapping[str, Any]) -> None:
        """Put back what the checkpoint in `directory`, whose run_state is `saved`, holds besides Megatron's state."""
        state = saved["trainer"]["collector"]
        save = self.settings.run.save
        if save is not None and Path(save).resolve() == directory.parent.resolve():
            self._saved_step = saved["step"]

        def restore() -> None:
            assert self.guards is not None
            self.guards.load_state_dict(saved["trainer"]["guards"])
            if self.rollout_side is None:
                self._restored = state  # a replay moves no data position, and must not lose one
                return
            if state is None:
                raise ValueError("the checkpoint was saved while replaying rollouts: it has no data position to resume")
            try:
                self.rollout_side.collector.load_state_dict(state)
            except ValueError as error:
                raise ValueError(f"{directory / RUN_STATE}: {error}") from error
            custom = self.settings.rollout.custom_generate_function_path
            if custom is not None and self.rollout_side.collector.unfinished:
                raise ValueError(
                    f"--custom-generate-function-path is {custom!r}, but the checkpoint holds unfinished responses of "
                    "--partial-rollout-len, which it cannot continue: resume without it"
                )

        self.rank_zero.run(restore)

    def train(self, first_step: int) -> bool:
        """Evaluate, train, evaluate, export. Returns whether it got to the end; where it did not, its state is saved.

        A signal that stops a run which saves nothing raises KeyboardInterrupt, also on the ranks that it did not reach.
        """
        if self.hybrid is not None:
            with self.log.stage("first sync", part_of_step=False):
                self._sync(first_step)
        if self.saver is not None:
            self.signals.defer()  # from here on there is something to save
        is_finished = train(self._as_run(), first_step=first_step)
        if not is_finished and self.saver is None:  # there is nothing to go on from
            raise KeyboardInterrupt
        if self.saver is not None:
            with self.log.stage("save", part_of_step=False):
                self.saver.finish()
        if not is_finished:
            self.signals.ending()  # a launcher signals the ranks that end a moment later than the first
            self._say_what_is_saved()
        elif self.settings.run.export_hf is not None:
            with self.log.stage("export", part_of_step=False), self._actor_at_work():
                self._export(self.settings.run.export_hf)
        return is_finished

    def close(self) -> None:
        """Abandon a checkpoint that is being written. Safe to call twice, and when other ranks are gone."""
        if self.saver is not None:
            self.saver.close()

    def _as_run(self) -> Run:
        settings = self.settings
        return Run(
            algorithm=settings.algorithm,
            loss=settings.loss,
            correction=settings.correction,
            num_steps=settings.run.train_iters,
            num_updates=settings.batch.num_updates_per_rollout,
            layout=self.layout,
            control=self.control,
            rank_zero=self.rank_zero,
            hidden_size=self.actor.arch.hidden_size,
            actor=self.actor,
            collect=self._collect(),
            start_training=self.hybrid.start_training if self.hybrid is not None else lambda: None,
            sync_weights=self._sync,
            evaluate=self._evaluate,
            save=self._save,
            pause=self._pause,
            memory=self.hybrid.memory if self.hybrid is not None else dict,
            eval_interval=settings.run.eval_interval,
            save_interval=settings.run.save_interval,
            # a recorded batch may rightly be far from this run's policy
            engine_mismatch_limit=math.inf if self.replays else settings.rollout.engine_mismatch_limit,
            guards=self.guards,
            log=self.log,
        )

    def _collect(self) -> Callable[[int], Rollout]:
        if self.replays:
            return replayed(self.settings)

        def collect(step: int) -> Rollout:
            assert self.rollout_side is not None
            self._before = (step - 1, self.rollout_side.collector.position())
            return self.rollout_side.collect(step)

        return collect

    def _pause(self) -> None:
        """Commit a checkpoint that has been written meanwhile; stop where a signal asks for it."""
        if self.saver is not None:
            self.saver.poll()
        number = largest(self.signals.first, self.control)
        if number:  # not what this rank alone has been sent meanwhile: the others would go on
            self.signals.hear_of(number)
            raise StopRequested

    def _sync(self, version: int) -> None:
        """Every rank sends its part of the weights; where no engine takes them, every rank ends."""
        if self.hybrid is None:
            return
        try:
            failure: Exception | None = self.hybrid.sync_weights(version)
        except BrokenWeights as error:  # like what is returned, on every rank
            failure = error
        if failure is not None:
            self._commit_what_is_written()
            raise failure

    def _commit_what_is_written(self) -> None:
        """All ranks are about to end the run for the same reason: the last asynchronous save is not lost by that."""
        if self.saver is None:
            return
        try:
            self.saver.finish()
        except CheckpointError as error:
            self.log.say(f"WARNING: the last checkpoint was not written: {error}")

    def _resync(self) -> None:
        """What all ranks do when rank 0 finds itself without engines in the middle of generating."""
        assert self.hybrid is not None
        self.hybrid.resync()  # a failure leaves its state "failed", which rank 0's next request runs into

    def _evaluate(self, step: int) -> None:
        """Evaluate after `step` steps, unless the run's records hold that evaluation."""
        if self.replays:
            return
        with self.log.stage("evaluate", part_of_step=False):
            results = self.rank_zero.run(partial(self._results, step), interruptible=True)
        if results:
            self._scores[step] = summary(results)["accuracy"]
        log_evaluation(self.log, step, results or [], self.settings.run.output_dir)

    def _results(self, step: int) -> list[EvaluationResult]:
        assert self.rollout_side is not None
        if step in self._evaluated:
            return []
        results = self.rollout_side.evaluate()
        self._evaluated.add(step)
        return results

    def _save(self, step: int) -> None:
        """Save the state after `step` steps, unless that was done."""
        if self.saver is None or step == self._saved_step:
            return
        if self._before is not None and self._before[0] == step:  # what has been collected since is abandoned
            assert self.rollout_side is not None
            self.rollout_side.collector.go_back(self._before[1])
        side = self.rollout_side
        state = {
            "collector": side.collector.state_dict() if side is not None else self._restored,
            "guards": self.guards.state_dict() if self.guards is not None else None,
            "num_updates": self.log.num_updates,
        }
        with self.log.stage("save", part_of_step=False), self._actor_at_work():
            self.rank_zero.run(self.log.flush_to_disk)
            self.saver.save(step, state, score=self._scores.get(step))
        self._saved_step = step

    def _say_what_is_saved(self) -> None:
        name = signal.Signals(self.signals.first).name
        self.log.say(
            f"interrupted by {name}: the state after step {self._saved_step} is in {self.settings.run.save}; the same "
            "command with --auto-resume, or with --load, goes on from it"
        )

    def _actor_at_work(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.hybrid is None else self.hybrid.actor_at_work()

    def _export(self, directory: str) -> None:
        """Write the final model as a Hugging Face directory. All ranks take part in the stream."""
        tensors = checked_stream(self.actor.arch, self.actor.export_weights()) if self.layout.rank == 0 else None
        if tensors is None:
            for _ in self.actor.export_weights():
                raise AssertionError("only rank 0 receives whole tensors")
            return
        write_hf_checkpoint(directory, self.settings.run.hf_checkpoint, tensors)


def _open_log(settings: Settings, rank: int, resume_step: int | None, num_updates: int) -> RunLogger:
    bounds = None
    if isinstance(settings.loss, FIPOSettings):
        bounds = (settings.loss.influence_low, settings.loss.influence_high)
    return RunLogger(
        Path(settings.run.output_dir),
        total_steps=settings.run.train_iters,
        rank=rank,
        resume_step=resume_step,
        num_updates=num_updates,
        tensorboard_dir=settings.run.tensorboard_dir,
        influence_bounds=bounds,
        config=config_values(settings),
        config_text=config_text(settings),
        wandb_project=settings.run.wandb_project,
        wandb_exp_name=settings.run.wandb_exp_name,
    )
