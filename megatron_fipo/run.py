"""One run, start to end: check, start engines and actor side by side, resume, train, evaluate, export, clean up."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.checkpoint import load_checkpoint, save_checkpoint
from megatron_fipo.actor.checkpoint_files import find_checkpoint, read_run_state, verify_checkpoint_together
from megatron_fipo.actor.setup import initialize_distributed, initialize_model_parallel, shut_down
from megatron_fipo.arguments import Settings, config_text, config_values
from megatron_fipo.assembly import (
    RolloutSide,
    build_trainer_side,
    log_evaluation,
    replayed,
    start_run_engines,
)
from megatron_fipo.checks import Checked
from megatron_fipo.config import FIPOSettings
from megatron_fipo.hybrid.turns import HybridEngine
from megatron_fipo.metrics.records import METRICS_FILE, read_metrics
from megatron_fipo.metrics.run_logger import RunLogger
from megatron_fipo.problems import Problems
from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.trainer.custom_generation import FLAG as CUSTOM_GENERATE
from megatron_fipo.trainer.exchange import on_rank_zero
from megatron_fipo.trainer.guards import Guards
from megatron_fipo.trainer.loop import Rollout, Run, train
from megatron_fipo.user_function import load_user_function
from megatron_fipo.weights.hf_files import write_hf_checkpoint
from megatron_fipo.weights.mapping import checked_stream


def run(settings: Settings, checked: Checked, problems: Problems | None, ending: Callable[[], None]) -> None:
    """Train as `settings` say, which `checked` is for. Every rank calls this.

    `problems`: what rank 0 trains on; None on the other ranks, and where recorded rollouts are replayed. `ending` is
    called before the clean-up, however the run went. Errors of the user's making are ValueErrors on rank 0 and
    ValueError or RankZeroFailed elsewhere.
    """
    with contextlib.ExitStack() as stack:
        try:
            _run(settings, checked, problems, stack)
        finally:
            ending()


def _run(settings: Settings, checked: Checked, problems: Problems | None, stack: contextlib.ExitStack) -> None:
    layout, device = checked.layout, checked.device
    resume_from = None if settings.run.load is None else find_checkpoint(settings.run.load)
    initialize_distributed(layout, device, timeout_minutes=settings.run.distributed_timeout_minutes)
    stack.callback(shut_down)
    saved: dict[str, Any] = {"step": 0}
    if resume_from is not None:
        verify_checkpoint_together(resume_from)  # before the log drops what came after it
        saved = read_run_state(resume_from)
    first_step = saved["step"]
    if first_step > settings.run.train_iters:
        raise ValueError(
            f"--train-iters is {settings.run.train_iters}, but {resume_from} (--load) already has {first_step} steps"
        )
    log = stack.enter_context(_open_log(settings, layout.rank, first_step if resume_from else None))
    for note in (*settings.notes, *(problems.notes if problems is not None else ())):
        log.say(note)
    pool: EnginePool | None = None
    if problems is not None:
        if settings.rollout.custom_generate_function_path is not None:
            # what is wrong with it shows before an engine starts
            load_user_function(CUSTOM_GENERATE, settings.rollout.custom_generate_function_path)
        pool = stack.enter_context(start_run_engines(settings, layout, device))  # starts while the actor is built
    with log.stage("start trainer", part_of_step=False):
        if device.type == "cpu":
            from megatron_fipo.patches.megatron_cpu import apply_patches

            apply_patches()
        groups = initialize_model_parallel(
            layout, seed=settings.run.seed, timeout_minutes=settings.run.distributed_timeout_minutes
        )
        actor = build_trainer_side(settings, checked, groups)
        if resume_from is not None and not load_checkpoint(actor, resume_from):
            log.say(f"{resume_from} was saved in another layout or precision: the run goes on, but not bit for bit")
    guards = None
    if layout.rank == 0:
        guards = Guards(settings.guards, read_metrics(Path(settings.run.output_dir) / METRICS_FILE))
    stages = _Stages(settings, actor, problems, pool, guards, log)
    if resume_from is not None:
        stages.restore(saved["trainer"])
    stages.train(first_step)
    log.say(log.timings_table())


class _Stages:
    """The callables the loop needs, over real engines or over recorded rollouts."""

    def __init__(
        self,
        settings: Settings,
        actor: Actor,
        problems: Problems | None,
        pool: EnginePool | None,
        guards: Guards | None,
        log: RunLogger,
    ) -> None:
        self.settings, self.actor, self.log = settings, actor, log
        self.layout, self.control = actor.layout, actor.groups.control
        self.guards = guards
        self.replays = settings.rollout.replay_rollouts is not None
        self.hybrid: HybridEngine | None = None
        self.rollout_side: RolloutSide | None = None
        self._restored: dict[str, Any] | None = None
        if self.replays:
            return
        with log.stage("start engines", part_of_step=False):
            self.hybrid = HybridEngine(actor, pool, bucket_bytes=settings.engine.weight_bucket_mb * 2**20)
            if problems is not None:
                self.rollout_side = RolloutSide(settings, problems, self.hybrid.generate)
            self._on_rank_zero(lambda: pool.wait_ready() if pool else None)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Put back what a checkpoint holds besides Megatron's state."""

        def restore() -> None:
            if self.rollout_side is None:
                self._restored = state  # a replay moves no data position, and must not lose one
                return
            if state is None:
                raise ValueError("the checkpoint was saved while replaying rollouts: it has no data position to resume")
            self.rollout_side.collector.load_state_dict(state)
            custom = self.settings.rollout.custom_generate_function_path
            if custom is not None and self.rollout_side.collector.unfinished:
                raise ValueError(
                    f"--custom-generate-function-path is {custom!r}, but the checkpoint holds unfinished responses of "
                    "--partial-rollout-len, which it cannot continue: resume without it"
                )

        self._on_rank_zero(restore)

    def train(self, first_step: int) -> None:
        """Evaluate, train, evaluate, export."""
        run_settings = self.settings.run
        if self.hybrid is not None:
            with self.log.stage("first sync", part_of_step=False):
                self._sync(first_step)
        if first_step == 0:
            self._evaluate(0)
        train(self._as_run(), first_step=first_step)
        self._evaluate(run_settings.train_iters)
        if run_settings.export_hf is not None:
            with self.log.stage("export", part_of_step=False):
                self._export(run_settings.export_hf)

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
            hidden_size=self.actor.arch.hidden_size,
            actor=self.actor,
            collect=self._collect(),
            start_training=self.hybrid.start_training if self.hybrid is not None else lambda: None,
            sync_weights=self._sync,
            evaluate=self._evaluate,
            save=self._save,
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
            return self.rollout_side.collect(step)

        return collect

    def _sync(self, version: int) -> None:
        """Every rank sends its part of the weights; what goes wrong between rank 0 and the engines stops all ranks."""
        if self.hybrid is None:
            return
        failure = self.hybrid.sync_weights(version)

        def report() -> None:
            if failure is not None:
                raise failure

        self._on_rank_zero(report)

    def _evaluate(self, step: int) -> None:
        if self.replays:
            return
        side = self.rollout_side
        with self.log.stage("evaluate", part_of_step=False):
            results = self._on_rank_zero(lambda: side.evaluate() if side is not None else [])
        log_evaluation(self.log, step, results or [], self.settings.run.output_dir)

    def _save(self, step: int) -> None:
        directory = self.settings.run.save
        if directory is None:
            return
        side = self.rollout_side
        state = side.collector.state_dict() if side is not None else self._restored
        with self.log.stage("save", part_of_step=False):
            save_checkpoint(self.actor, directory, step, state)

    def _export(self, directory: str) -> None:
        """Write the final model as a Hugging Face directory. All ranks take part in the stream."""
        tensors = checked_stream(self.actor.arch, self.actor.export_weights()) if self.layout.rank == 0 else None
        if tensors is None:
            for _ in self.actor.export_weights():
                raise AssertionError("only rank 0 receives whole tensors")
            return
        write_hf_checkpoint(directory, self.settings.run.hf_checkpoint, tensors)

    def _on_rank_zero(self, function: Callable[[], Any]) -> Any:
        return on_rank_zero(function, self.layout, self.control)


def _open_log(settings: Settings, rank: int, resume_step: int | None) -> RunLogger:
    bounds = None
    if isinstance(settings.loss, FIPOSettings):
        bounds = (settings.loss.influence_low, settings.loss.influence_high)
    return RunLogger(
        Path(settings.run.output_dir),
        total_steps=settings.run.train_iters,
        rank=rank,
        resume_step=resume_step,
        tensorboard_dir=settings.run.tensorboard_dir,
        influence_bounds=bounds,
        config=config_values(settings),
        config_text=config_text(settings),
        wandb_project=settings.run.wandb_project,
        wandb_exp_name=settings.run.wandb_exp_name,
    )
