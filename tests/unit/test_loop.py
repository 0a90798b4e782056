"""The training loop with fakes for everything it is handed: what is called when, with what, and what is logged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_fipo.config import CorrectionSettings, FIPOSettings, PPOSettings
from megatron_fipo.metrics.run_logger import RunLogger
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.run_config import GuardSettings
from megatron_fipo.trainer.agreement import EngineDisagrees
from megatron_fipo.trainer.exchange import RankZero, StopRequested
from megatron_fipo.trainer.guards import Guards, GuardStopped
from megatron_fipo.trainer.loop import Rollout, Run, train
from megatron_fipo.types import TrainSequence

NUM_SEQUENCES, NUM_UPDATES = 4, 2


class World:
    """Stands for the actor, the engines and the disk, and keeps one diary of all that is asked of them."""

    def __init__(self) -> None:
        self.diary: list[Any] = []
        self.mismatch = 0.25
        self.num_updates_done = 0
        self.engine_version = 0
        self.skips: set[int] = set()  # numbers of updates that end in a NaN
        self.own_statistics: dict[str, float] = {}  # of the user's own loss
        self.even_statistics: dict[str, float] = {}  # and those of every other update
        self.stop_at: tuple[str, int] | None = None  # ("pause" | "collect" | "evaluate", which call of it)
        self.num_calls = {"pause": 0, "collect": 0, "evaluate": 0}

    def may_stop(self, where: str) -> None:
        self.num_calls[where] += 1
        if self.stop_at == (where, self.num_calls[where]):
            raise KeyboardInterrupt if where == "collect" else StopRequested

    def pause(self) -> None:
        self.may_stop("pause")

    def collect(self, step: int) -> Rollout:
        self.diary.append(("collect", step))
        self.may_stop("collect")
        sequences = [make_sequence(f"s{step}/{i}", 2 + i, version=self.engine_version) for i in range(NUM_SEQUENCES)]
        return Rollout(sequences, {"accuracy": step / 10}, [{"uid": sequences[0].uid, "text": "4"}])

    def start_training(self) -> None:
        self.diary.append("start training")

    def old_logprobs(
        self, mini_batches: Sequence[Sequence[TrainSequence]]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        sequences = [sequence for mini_batch in mini_batches for sequence in mini_batch]
        self.diary.append(("old log-probs", [sequence.uid for sequence in sequences]))
        logprobs = [torch.from_numpy(sequence.rollout_logprobs) - self.mismatch for sequence in sequences]
        return logprobs, [torch.full(row.shape, 1.5) for row in logprobs]

    def reference_logprobs(self, mini_batches: Sequence[Sequence[TrainSequence]]) -> list[torch.Tensor]:
        sequences = [sequence for mini_batch in mini_batches for sequence in mini_batch]
        self.diary.append(("reference log-probs", [sequence.uid for sequence in sequences]))
        return [torch.full(sequence.rollout_logprobs.shape, float(len(sequence.token_ids))) for sequence in sequences]

    def update(
        self,
        sequences: Sequence[TrainSequence],
        old_logprobs: Sequence[torch.Tensor],
        *,
        algorithm: str,
        settings: PPOSettings,
        correction: CorrectionSettings,
        reference_logprobs: Sequence[torch.Tensor],
    ) -> dict[str, Any]:
        self.diary.append(("update", [sequence.uid for sequence in sequences], algorithm))
        for sequence, row in zip(sequences, reference_logprobs, strict=bool(correction.kl_coef)):
            assert row.tolist() == [len(sequence.token_ids)] * len(row), "reference log-probs of another sequence"
        for sequence, row in zip(sequences, old_logprobs, strict=True):
            wanted = torch.from_numpy(sequence.rollout_logprobs) - self.mismatch
            assert torch.equal(row, wanted), "log-probs of another sequence"
        self.num_updates_done += 1
        n = float(self.num_updates_done)
        if self.num_updates_done in self.skips:
            return {"skipped": 1.0, "lr": 0.1 * n}
        metrics = {"pg_loss": n, "lr": 0.1 * n, "grad_norm": 10 * n, "skipped": 0.0}
        metrics |= self.own_statistics | ({} if self.num_updates_done % 2 else self.even_statistics)
        return metrics | ({"future_kl_std": 0.01 * n} if isinstance(settings, FIPOSettings) else {})

    def sync_weights(self, version: int) -> None:
        self.diary.append(("sync", version))
        self.engine_version = version

    def evaluate(self, step: int) -> None:
        self.diary.append(("evaluate", step))
        self.may_stop("evaluate")

    def save(self, step: int) -> None:
        self.diary.append(("save", step))


def make_sequence(uid: str, length: int, *, version: int) -> TrainSequence:
    mask = np.arange(length) < length - 1
    return TrainSequence(
        uid=uid,
        token_ids=np.zeros(length, dtype=np.int64),
        loss_mask=mask,
        advantages=mask.astype(np.float32),
        rollout_logprobs=np.where(mask, np.float32(-length), np.float32(0)),
        token_versions=np.where(mask, version, -1),
    )


def make_run(world: World, control: dist.ProcessGroup, run_dir: Path, *, num_steps: int = 2, **options: Any) -> Run:
    settings: dict[str, Any] = {
        "algorithm": "fipo",
        "loss": FIPOSettings(),
        "correction": CorrectionSettings(),
        "num_steps": num_steps,
        "num_updates": NUM_UPDATES,
        "layout": ParallelLayout(),
        "control": control,
        "rank_zero": RankZero(ParallelLayout(), control),
        "hidden_size": 8,
        "actor": world,
        "collect": world.collect,
        "start_training": world.start_training,
        "sync_weights": world.sync_weights,
        "evaluate": world.evaluate,
        "save": world.save,
        "pause": world.pause,
        "memory": lambda: {"memory/training/trainer": 0.25},
        "eval_interval": None,
        "save_interval": None,
        "engine_mismatch_limit": 1.0,
        "guards": Guards(GuardSettings()),
    }
    resume_step = options.pop("resume_step", None)
    log = RunLogger(run_dir, total_steps=num_steps, resume_step=resume_step)
    return Run(**{**settings, "log": log, **options})


def records(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def test_a_step_happens_in_order(control: dist.ProcessGroup, tmp_path: Path) -> None:
    world = World()
    train(make_run(world, control, tmp_path), first_step=0)
    expected: list[Any] = []
    for step in (1, 2):
        uids = [f"s{step}/{i}" for i in range(NUM_SEQUENCES)]
        expected += [
            ("collect", step),
            "start training",
            ("old log-probs", uids),  # of the whole batch, before any update
            ("update", uids[:2], "fipo"),
            ("update", uids[2:], "fipo"),
            ("sync", step),  # weights of version v are those after v steps
        ]
    assert world.diary == [("evaluate", 0), *expected, ("evaluate", 2), ("save", 2)]


def test_every_step_is_logged_with_the_means_over_its_updates(control: dist.ProcessGroup, tmp_path: Path) -> None:
    train(make_run(World(), control, tmp_path), first_step=0)
    first, second = records(tmp_path)
    assert (first["step"], second["step"]) == (1, 2)
    wanted = {
        "accuracy": 0.2,
        "entropy": 1.5,
        "engine_mismatch/mean": 0.25,
        "engine_mismatch/num_tokens": 1 + 2 + 3 + 4,  # so the rollout's version was the expected one
        "pg_loss": 3.5,
        "grad_norm": 35.0,
        "num_tokens": 2 + 3 + 4 + 5,
        "memory/training/trainer": 0.25,
    }
    assert {name: second[name] for name in wanted} == pytest.approx(wanted)
    assert [update["pg_loss"] for update in second["updates"]] == [3.0, 4.0]
    assert {"time/rollout", "time/logprobs", "time/update", "time/sync"} <= second.keys()
    assert [(sample["step"], sample["uid"]) for sample in records(tmp_path, "samples.jsonl")] == [
        (1, "s1/0"),
        (2, "s2/0"),
    ]


def test_the_learning_rate_is_the_last_updates_and_the_noise_gauge_the_firsts(
    control: dist.ProcessGroup, tmp_path: Path
) -> None:
    train(make_run(World(), control, tmp_path), first_step=0)
    second = records(tmp_path)[1]
    assert second["lr"] == pytest.approx(0.4)
    assert second["noise_gauge"] == pytest.approx(0.03)
    assert second["future_kl_std"] == pytest.approx(0.035)


def test_an_algorithm_without_future_kl_has_no_noise_gauge(control: dist.ProcessGroup, tmp_path: Path) -> None:
    world = World()
    train(make_run(world, control, tmp_path, algorithm="dapo", loss=PPOSettings()), first_step=0)
    assert "noise_gauge" not in records(tmp_path)[0]
    assert ("update", ["s1/0", "s1/1"], "dapo") in world.diary


def test_evaluations_and_checkpoints_keep_their_intervals_and_the_end_is_saved(
    control: dist.ProcessGroup, tmp_path: Path
) -> None:
    world = World()
    train(make_run(world, control, tmp_path, num_steps=7, eval_interval=2, save_interval=3), first_step=0)
    done = [entry for entry in world.diary if entry[0] in ("sync", "evaluate", "save")]
    assert done == [
        ("evaluate", 0),
        ("sync", 1),
        ("sync", 2),
        ("evaluate", 2),
        ("sync", 3),
        ("save", 3),
        ("sync", 4),
        ("evaluate", 4),
        ("sync", 5),
        ("sync", 6),
        ("evaluate", 6),
        ("save", 6),
        ("sync", 7),
        ("evaluate", 7),
        ("save", 7),
    ]


def test_the_last_step_is_evaluated_and_saved_once(control: dist.ProcessGroup, tmp_path: Path) -> None:
    world = World()
    train(make_run(world, control, tmp_path, num_steps=2, eval_interval=1, save_interval=1), first_step=0)
    assert [entry for entry in world.diary if entry[0] in ("evaluate", "save")] == [
        ("evaluate", 0),
        ("evaluate", 1),
        ("save", 1),
        ("evaluate", 2),
        ("save", 2),
    ]


# where a signal finds the run: "pause" 1, 3 lie before a step, 2, 4 after its generation
STOPS: list[tuple[tuple[str, int], int, int]] = [  # where, steps logged, the step that is saved
    (("evaluate", 1), 0, 0),
    (("pause", 1), 0, 0),
    (("collect", 1), 0, 0),
    (("pause", 2), 0, 0),
    (("pause", 3), 1, 1),
    (("collect", 2), 1, 1),
    (("pause", 4), 1, 1),
    (("evaluate", 2), 2, 2),
]


@pytest.mark.parametrize(("stop_at", "num_logged", "saved"), STOPS)
def test_a_run_that_is_asked_to_stop_saves_the_last_whole_step(
    control: dist.ProcessGroup, tmp_path: Path, stop_at: tuple[str, int], num_logged: int, saved: int
) -> None:
    world = World()
    world.stop_at = stop_at
    assert train(make_run(world, control, tmp_path, num_steps=5, eval_interval=2), first_step=0) is False
    assert world.diary[-1] == ("save", saved)
    assert [entry for entry in world.diary if entry[0] == "save"] == [("save", saved)]
    assert [record["step"] for record in records(tmp_path)] == list(range(1, num_logged + 1))
    assert world.engine_version == num_logged, "a step that was begun was not finished"


def test_a_run_that_gets_to_its_end_says_so(control: dist.ProcessGroup, tmp_path: Path) -> None:
    assert train(make_run(World(), control, tmp_path), first_step=0) is True


def test_an_evaluation_that_was_due_is_asked_for_again_on_resume(control: dist.ProcessGroup, tmp_path: Path) -> None:
    world = World()
    train(make_run(world, control, tmp_path, num_steps=5, eval_interval=2), first_step=0)
    for first_step, wanted in ((2, [2, 4, 5]), (3, [4, 5]), (5, [5])):
        world = World()
        run_dir = tmp_path / str(first_step)
        run_dir.mkdir()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()[:first_step]
        (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        world.engine_version = first_step
        run = make_run(world, control, run_dir, num_steps=5, eval_interval=2, resume_step=first_step)
        assert train(run, first_step=first_step)
        assert [entry[1] for entry in world.diary if entry[0] == "evaluate"] == wanted


def test_a_resumed_run_goes_on_with_the_next_step(control: dist.ProcessGroup, tmp_path: Path) -> None:
    train(make_run(World(), control, tmp_path, num_steps=2), first_step=0)
    world = World()
    world.engine_version = 2
    train(make_run(world, control, tmp_path, num_steps=3, resume_step=2), first_step=2)
    assert world.diary[0] == ("collect", 3)
    assert ("sync", 3) in world.diary
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
    assert records(tmp_path)[2]["engine_mismatch/num_tokens"] == 10


def test_a_finished_run_has_no_step_to_make(control: dist.ProcessGroup, tmp_path: Path) -> None:
    world = World()
    train(make_run(world, control, tmp_path, num_steps=2, resume_step=2), first_step=2)
    assert world.diary == [("evaluate", 2), ("save", 2)]  # which are made only where they are not there yet


def test_samples_of_older_weights_are_trained_on_but_not_compared(control: dist.ProcessGroup, tmp_path: Path) -> None:
    world = World()

    def with_surplus(step: int) -> Rollout:
        rollout = world.collect(step)
        stale = [
            replace(sequence, token_versions=np.where(sequence.loss_mask, step - 2, -1))
            for sequence in rollout.sequences[:2]
        ]
        return replace(rollout, sequences=[*stale, *rollout.sequences[2:]])

    train(make_run(world, control, tmp_path, collect=with_surplus), first_step=0)
    assert records(tmp_path)[1]["engine_mismatch/num_tokens"] == 3 + 4
    assert world.num_updates_done == 4


def test_an_engine_that_disagrees_stops_the_run_before_any_update(control: dist.ProcessGroup, tmp_path: Path) -> None:
    world = World()
    world.mismatch = 3.0
    with pytest.raises(EngineDisagrees, match=r"by 3\.000 on average, but --engine-mismatch-limit is 1\.0"):
        train(make_run(world, control, tmp_path), first_step=0)
    assert world.num_updates_done == 0
    assert not any(entry[0] in ("sync", "save") for entry in world.diary)


def test_a_failing_rollout_ends_the_run_with_its_own_error(control: dist.ProcessGroup, tmp_path: Path) -> None:
    world = World()

    def fail(step: int) -> Rollout:
        raise ValueError("the problems are too easy")

    with pytest.raises(ValueError, match="the problems are too easy"):
        train(make_run(world, control, tmp_path, collect=fail), first_step=0)
    assert world.diary == [("evaluate", 0)]


def test_recorded_rollouts_train_without_an_engine(control: dist.ProcessGroup, tmp_path: Path) -> None:
    world, replayed = World(), World()
    train(make_run(world, control, tmp_path / "live"), first_step=0)
    rollouts = {step: World().collect(step) for step in (1, 2)}
    run = make_run(
        replayed,
        control,
        tmp_path / "replay",
        collect=rollouts.__getitem__,
        start_training=lambda: None,
        sync_weights=lambda version: None,
        evaluate=lambda step: None,
    )
    train(run, first_step=0)
    asked_of_the_actor = [entry for entry in world.diary if entry[0] in ("old log-probs", "update", "save")]
    assert replayed.diary == asked_of_the_actor
    live, again = (records(tmp_path / name) for name in ("live", "replay"))
    assert [record["updates"] for record in live] == [record["updates"] for record in again]


def test_the_initial_weights_are_asked_only_for_a_kl_term(control: dist.ProcessGroup, tmp_path: Path) -> None:
    world = World()
    correction = CorrectionSettings(kl_coef=0.1)
    train(make_run(world, control, tmp_path, num_steps=1, correction=correction), first_step=0)
    asked = [entry for entry in world.diary if entry[0] in ("old log-probs", "reference log-probs", "update")]
    assert [entry[0] for entry in asked] == ["old log-probs", "reference log-probs", "update", "update"]
    assert asked[0][1] == asked[1][1]
    without = World()
    train(make_run(without, control, tmp_path / "without", num_steps=1), first_step=0)
    assert not any(entry[0] == "reference log-probs" for entry in without.diary)


def test_a_skipped_update_is_counted_and_has_no_part_in_the_means(control: dist.ProcessGroup, tmp_path: Path) -> None:
    world = World()
    world.skips = {1, 5, 6}  # the first of step 1, both of step 3
    train(make_run(world, control, tmp_path, num_steps=3), first_step=0)
    first, second, third = records(tmp_path)
    assert [record["num_skipped_updates"] for record in (first, second, third)] == [1, 0, 2]
    assert (first["pg_loss"], second["pg_loss"]) == (2.0, 3.5)
    assert "noise_gauge" not in first, "the update that would have shown it was skipped"
    assert "pg_loss" not in third
    assert third["lr"] == pytest.approx(0.6)
    assert len(third["updates"]) == 2
    assert world.engine_version == 3


def test_statistics_of_the_users_own_loss_do_not_take_the_names_of_a_steps_metrics(
    control: dist.ProcessGroup, tmp_path: Path
) -> None:
    world = World()
    world.own_statistics = {"step": 0.5, "entropy": -7.0, "accuracy": 9.0, "bonus": 3.0}
    train(make_run(world, control, tmp_path, num_steps=1), first_step=0)
    (record,) = records(tmp_path)
    assert (record["step"], record["entropy"], record["accuracy"], record["bonus"]) == (1, 1.5, 0.1, 3.0)
    assert [update["entropy"] for update in record["updates"]] == [-7.0, -7.0]


def test_a_statistic_of_some_updates_only_is_averaged_over_those(control: dist.ProcessGroup, tmp_path: Path) -> None:
    world = World()
    world.even_statistics = {"rare": 4.0}
    train(make_run(world, control, tmp_path, num_steps=1), first_step=0)
    (record,) = records(tmp_path)
    assert (record["rare"], record["pg_loss"]) == (4.0, 1.5)


def test_what_the_guards_say_is_shown_and_what_they_stop_is_not_saved(
    control: dist.ProcessGroup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World()

    settings = GuardSettings(entropy_floor=2.0, guard_noise_gauge="stop", noise_gauge_limit=0.025)
    run = make_run(world, control, tmp_path, num_steps=3, save_interval=1, guards=Guards(settings))
    with pytest.raises(GuardStopped, match=r"step 2: noise_gauge: .*0\.03"):
        train(run, first_step=0)
    assert "warning: step 1: entropy_collapse: the mean entropy is 1.5" in capsys.readouterr().err
    assert [entry for entry in world.diary if entry[0] == "save"] == [("save", 1)]
    first, second = records(tmp_path)
    assert (first["guards/noise_gauge"], first["guards/entropy_collapse"]) == (0.0, 1.0)
    assert second["guards/noise_gauge"] == 1.0, "the step that was stopped is on record"
