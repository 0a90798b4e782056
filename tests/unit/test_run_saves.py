"""What a run saves, where, and which of it it keeps, in the cases that lie between two runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoint_on_disk import save

from megatron_fipo import run
from megatron_fipo.actor import checkpoint_saver
from megatron_fipo.actor.retention import retire
from megatron_fipo.interruption import Signals
from megatron_fipo.trainer.exchange import StopRequested


def kept(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("step_*"))


def test_a_score_that_came_after_the_save_counts_and_one_that_was_saved_stays(tmp_path: Path) -> None:
    for step, score in ((1, None), (2, 0.5), (3, None), (4, 0.6)):
        current = save(tmp_path, step, score=score)
    later = {1: 0.9, 2: 1.0, 3: float("nan"), 9: 2.0}
    assert [path.name for path in retire(current, keep_last=1, keep_best=2, scores=later)] == [
        ".removing_step_0000003",
        ".removing_step_0000002",
    ]
    assert kept(tmp_path) == ["step_0000001", "step_0000004"]


@pytest.fixture
def stages_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Any]:
    """A run's stages on a real saver that writes small checkpoints; every call is the run started again."""

    def save_small(actor: Any, root: Path, step: int, state: Any, *, score: float | None) -> Path:
        return save(root, step, score=score)

    def log_evaluation(log: Any, step: int, results: list[float], output_dir: str) -> None:
        with Path(output_dir, "evaluations.jsonl").open("a") as file:
            file.writelines(json.dumps({"step": step, "accuracy": score}) + "\n" for score in results)

    monkeypatch.setattr(checkpoint_saver, "save_checkpoint", save_small)
    monkeypatch.setattr(run, "log_evaluation", log_evaluation)
    monkeypatch.setattr(run, "summary", lambda results: {"accuracy": results[0]})
    settings = SimpleNamespace(
        run=SimpleNamespace(
            save=str(tmp_path / "checkpoints"), output_dir=str(tmp_path), async_save=False, keep_last=1, keep_best=1
        ),
        rollout=SimpleNamespace(replay_rollouts=None),
    )
    (tmp_path / "evaluations.jsonl").touch()
    actor = SimpleNamespace(
        layout=SimpleNamespace(rank=0), groups=SimpleNamespace(control=SimpleNamespace(rank=lambda: 0))
    )
    log = SimpleNamespace(
        stage=lambda *_, **__: run.contextlib.nullcontext(), say=print, num_updates=0, flush_to_disk=print
    )
    signals = Signals()

    def make() -> Any:
        guards = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
        stages = run._Stages(settings, actor, None, None, guards, log, signals)  # type: ignore[arg-type]
        stages.rank_zero = SimpleNamespace(run=lambda function, interruptible=False: function())  # type: ignore[assignment]
        stages.rollout_side = SimpleNamespace(  # type: ignore[assignment]
            collector=SimpleNamespace(state_dict=dict), evaluate=lambda: [stages.score]
        )
        return stages

    return make


def test_the_best_checkpoint_is_kept_although_its_evaluation_was_abandoned(
    stages_of: Callable[[], Any], tmp_path: Path
) -> None:
    root = tmp_path / "checkpoints"
    stages = stages_of()

    def interrupted() -> None:
        raise StopRequested

    stages.rollout_side.evaluate = interrupted
    with pytest.raises(StopRequested):
        stages._evaluate(2)
    stages._save(2)  # as the loop does then
    assert json.loads((root / "step_0000002" / "run_state.json").read_text())["score"] is None

    stages = stages_of()  # goes on from step 2, and first makes the evaluation that is due there
    for step, score in ((2, 0.9), (4, 0.5)):
        stages.score = score
        stages._evaluate(step)
        if step > 2:
            stages._save(step)
    assert kept(root) == ["step_0000002", "step_0000004"]

    stages = stages_of()  # goes on from step 4, and knows of step 2 from the records
    stages.score = 0.4
    stages._evaluate(6)
    stages._save(6)
    assert kept(root) == ["step_0000002", "step_0000006"]


@pytest.mark.parametrize(("loaded_from", "written"), [("elsewhere", ["step_0000005"]), ("checkpoints", [])])
def test_a_run_that_has_no_step_left_saves_what_it_loaded_from_another_directory(
    stages_of: Callable[[], Any], tmp_path: Path, loaded_from: str, written: list[str]
) -> None:
    stages = stages_of()
    stages.rollout_side = None
    stages.restore(tmp_path / loaded_from / "step_0000005", {"step": 5, "trainer": {"collector": None, "guards": {}}})
    stages._save(5)  # as the loop does then
    assert kept(tmp_path / "checkpoints") == written
