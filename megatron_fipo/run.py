"""One run, start to end: check, start engines and actor side by side, resume, train, evaluate, export, clean up."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint, verify_checkpoint
from megatron_fipo.actor.setup import initialize_distributed, initialize_model_parallel, shut_down
from megatron_fipo.arguments import Settings
from megatron_fipo.assembly import (
    RolloutSide,
    build_trainer_side,
    log_evaluation,
    replayed,
    start_engines,
)
from megatron_fipo.checks import check_checkpoint, choose_device, ranks_from_environment
from megatron_fipo.config import FIPOSettings
from megatron_fipo.hybrid.turns import HybridEngine
from megatron_fipo.metrics.run_logger import RunLogger
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.trainer.exchange import on_rank_zero
from megatron_fipo.trainer.loop import Rollout, Run, train
from megatron_fipo.weights.hf_files import write_hf_checkpoint
from megatron_fipo.weights.mapping import checked_stream


def run(settings: Settings) -> None:
    """Train as `settings` say. Every rank calls this; errors of the user's making are ValueErrors on all ranks."""
    rank, world_size = ranks_from_environment(os.environ)
    megatron = settings.megatron
    layout = ParallelLayout.for_world(
        world_size,
        rank,
        tp=megatron.tensor_model_parallel_size,
        pp=megatron.pipeline_model_parallel_size,
        cp=megatron.context_parallel_size,
        sequence_parallel=megatron.sequence_parallel,
    )
    device = choose_device(settings)
    arch, weights = check_checkpoint(settings, layout)
    resume_from = None if settings.run.load is None else find_checkpoint(settings.run.load)
    first_step = 0 if resume_from is None else int(verify_checkpoint(resume_from)["step"])
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(_open_log(settings, rank, first_step if resume_from else None))
        for note in settings.notes:
            log.say(note)
        pool: EnginePool | None = None
        if rank == 0 and settings.rollout.replay_rollouts is None:
            pool = stack.enter_context(start_engines(settings, layout, device))  # starts while the actor is built
        with log.stage("start trainer", part_of_step=False):
            if device.type == "cpu":
                from megatron_fipo.patches.megatron_cpu import apply_patches

                apply_patches()
            initialize_distributed(device, timeout_minutes=settings.run.distributed_timeout_minutes)
            stack.callback(shut_down)
            groups = initialize_model_parallel(
                layout, seed=settings.run.seed, timeout_minutes=settings.run.distributed_timeout_minutes
            )
            actor = build_trainer_side(settings, arch, weights, layout, groups, device)
            if resume_from is not None and not load_checkpoint(actor, resume_from):
                log.say(f"{resume_from} was saved in another layout: the run goes on, but not bit for bit")
        stages = _Stages(settings, actor, pool, log, stack)
        if resume_from is not None:
            stages.restore(verify_checkpoint(resume_from)["trainer"])
        stages.train(first_step)
        log.say(log.timings_table())


class _Stages:
    """The callables the loop needs, over real engines or over recorded rollouts."""

    def __init__(
        self, settings: Settings, actor: Actor, pool: EnginePool | None, log: RunLogger, stack: contextlib.ExitStack
    ) -> None:
        self.settings, self.actor, self.log = settings, actor, log
        self.layout, self.control = actor.layout, actor.groups.control
        self.replays = settings.rollout.replay_rollouts is not None
        self.hybrid: HybridEngine | None = None
        self.rollout_side: RolloutSide | None = None
        if self.replays:
            return
        with log.stage("start engines", part_of_step=False):
            self.hybrid = HybridEngine(actor, pool, bucket_bytes=settings.engine.weight_bucket_mb * 2**20)
            self.rollout_side = self._on_rank_zero(lambda: RolloutSide(settings, self._hybrid.generate))
            if self.rollout_side is not None:
                stack.callback(self.rollout_side.close)
            self._on_rank_zero(lambda: pool.wait_ready() if pool else None)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Put back what a checkpoint holds besides Megatron's state."""
        if self.rollout_side is not None:
            if state is None:
                raise ValueError("the checkpoint was saved while replaying rollouts: it has no data position to resume")
            self.rollout_side.collector.load_state_dict(state)

    def train(self, first_step: int) -> None:
        """Evaluate, train, evaluate, export."""
        run_settings = self.settings.run
        if first_step >= run_settings.train_iters:
            raise ValueError(
                f"--train-iters is {run_settings.train_iters}, but the checkpoint in --load already has "
                f"{first_step} steps"
            )
        if self.hybrid is not None:
            with self.log.stage("first sync", part_of_step=False):
                self.hybrid.sync_weights(first_step)
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
            num_steps=settings.run.train_iters,
            num_updates=settings.batch.num_updates_per_rollout,
            layout=self.layout,
            control=self.control,
            actor=self.actor,
            collect=self._collect(),
            start_training=self.hybrid.start_training if self.hybrid is not None else lambda: None,
            sync_weights=self.hybrid.sync_weights if self.hybrid is not None else lambda version: None,
            evaluate=self._evaluate,
            save=self._save,
            eval_interval=settings.run.eval_interval,
            save_interval=settings.run.save_interval,
            engine_mismatch_limit=settings.rollout.engine_mismatch_limit,
            log=self.log,
        )

    def _collect(self) -> Callable[[int], Rollout]:
        if self.replays:
            return replayed(self.settings)

        def collect(step: int) -> Rollout:
            assert self.rollout_side is not None
            return self.rollout_side.collect(step)

        return collect

    def _evaluate(self, step: int) -> None:
        side = self.rollout_side
        if self.replays or (side is not None and not side.eval_problems):
            return
        with self.log.stage("evaluate", part_of_step=False):
            result = side.evaluate() if side is not None else None
        log_evaluation(self.log, step, result)

    def _save(self, step: int) -> None:
        directory = self.settings.run.save
        if directory is None:
            return
        side = self.rollout_side
        with self.log.stage("save", part_of_step=False):
            save_checkpoint(self.actor, directory, step, side.collector.state_dict() if side is not None else None)

    def _export(self, directory: str) -> None:
        """Write the final model as a Hugging Face directory. All ranks take part in the stream."""
        tensors = checked_stream(self.actor.arch, self.actor.export_weights()) if self.layout.rank == 0 else None
        if tensors is None:
            for _ in self.actor.export_weights():
                raise AssertionError("only rank 0 receives whole tensors")
            return
        write_hf_checkpoint(directory, self.settings.run.hf_checkpoint, tensors)

    @property
    def _hybrid(self) -> HybridEngine:
        assert self.hybrid is not None
        return self.hybrid

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
    )
