"""How a run ends, by what stopped it and whether there is something to go on from."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fipo import run
from megatron_fipo.actor.checkpoint_files import CheckpointError
from megatron_fipo.actor.finite_weights import BrokenWeights
from megatron_fipo.checks import holds_checkpoints
from megatron_fipo.interruption import Signals
from megatron_fipo.rollout.engine import EngineError
from megatron_fipo.trainer.exchange import StopRequested


def stages(*, received: list[int], saver: Any) -> Any:
    """What `_Stages.train` asks of itself, in a run without engines that a signal stops."""
    return SimpleNamespace(
        hybrid=None,
        saver=saver,
        signals=SimpleNamespace(received=received, ending=lambda: None, defer=lambda: None),
        log=SimpleNamespace(stage=lambda name, part_of_step: nullcontext()),
        settings=SimpleNamespace(run=SimpleNamespace(export_hf=None)),
        _as_run=lambda: None,
        _say_what_is_saved=lambda: None,
    )


def test_a_run_that_saves_nothing_is_interrupted_and_not_requeued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "train", lambda _, first_step: False)
    with pytest.raises(KeyboardInterrupt):
        run._Stages.train(stages(received=[15], saver=None), 0)


def test_a_run_that_saves_is_not_finished_but_its_state_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[str] = []
    monkeypatch.setattr(run, "train", lambda _, first_step: False)
    saver = SimpleNamespace(finish=lambda: finished.append("saved"))
    assert run._Stages.train(stages(received=[15], saver=saver), 0) is False
    assert finished == ["saved"]


def test_a_signal_that_comes_while_the_ranks_agree_waits_for_the_next_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks have just agreed to go on: a rank that stopped alone would wait for them for ever."""
    signals = Signals()

    def largest(mine: int, control: Any) -> int:
        signals.received.append(signal.SIGUSR1)
        return mine

    monkeypatch.setattr(run, "largest", largest)
    self: Any = SimpleNamespace(saver=None, signals=signals, control=None)
    run._Stages._pause(self)
    with pytest.raises(StopRequested):
        run._Stages._pause(self)


def test_a_pause_stops_for_what_another_rank_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    self: Any = SimpleNamespace(saver=None, signals=Signals(), control=None)
    monkeypatch.setattr(run, "largest", lambda mine, control: signal.SIGTERM)
    with pytest.raises(StopRequested):
        run._Stages._pause(self)
    assert self.signals.first == signal.SIGTERM


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_ends_on_all_ranks_first_commits_what_is_being_written(fails: bool) -> None:
    """Its error is the one that is raised, and not what became of the checkpoint."""
    said: list[str] = []

    def finish() -> None:
        said.append("finish")
        if fails:
            raise CheckpointError("no space left")

    self = stages(received=[], saver=SimpleNamespace(finish=finish))
    self.log.say = said.append
    self._commit_what_is_written = lambda: run._Stages._commit_what_is_written(self)
    for outcome in ("returned", "raised"):
        error = EngineError("no engine") if outcome == "returned" else BrokenWeights("NaN")

        def sync(version: int, error: Exception = error) -> Exception:
            if isinstance(error, BrokenWeights):
                raise error
            return error

        self.hybrid = SimpleNamespace(sync_weights=sync)
        with pytest.raises(type(error)):
            run._Stages._sync(self, 3)
    warnings = ["WARNING: the last checkpoint was not written: no space left"] if fails else []
    assert said == ["finish", *warnings] * 2


def test_another_models_checkpoint_is_refused_before_a_record_is_dropped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def touched(*_: Any) -> None:
        raise AssertionError("the records were opened")

    @dataclass
    class Shape:
        num_layers: int = 2

    saved = {"step": 1, "model": {"num_layers": 3}, "trainer": run.NOTHING_DONE}
    monkeypatch.setattr(run, "initialize_distributed", lambda *_, **__: None)
    monkeypatch.setattr(run, "_checkpoint_to_resume", lambda settings, say: tmp_path)
    monkeypatch.setattr(run, "read_run_state", lambda directory: saved)
    monkeypatch.setattr(run, "_open_log", touched)
    settings: Any = SimpleNamespace(run=SimpleNamespace(distributed_timeout_minutes=1, train_iters=5), notes=())
    checked: Any = SimpleNamespace(layout=None, device=None, arch=Shape())
    signals: Any = None
    stack: Any = SimpleNamespace(callback=lambda function: None)
    with pytest.raises(CheckpointError, match=r"num_layers is 3, but this run's .* is 2"):
        run._run(settings, checked, None, signals, stack)


def test_only_directories_count_as_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "step_000001.jsonl").touch()  # a recorded rollout
    assert not holds_checkpoints(str(tmp_path))
    (tmp_path / "step_0000001").mkdir()
    assert holds_checkpoints(str(tmp_path))
