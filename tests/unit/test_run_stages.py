"""How a run ends, by what stopped it and whether there is something to go on from."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fipo import run
from megatron_fipo.trainer.exchange import RankZeroFailed


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


@pytest.mark.parametrize(("received", "wanted"), [([15], KeyboardInterrupt), ([], RankZeroFailed)])
def test_a_run_that_saves_nothing_is_interrupted_and_not_requeued(
    monkeypatch: pytest.MonkeyPatch, received: list[int], wanted: type[BaseException]
) -> None:
    monkeypatch.setattr(run, "train", lambda _, first_step: False)
    with pytest.raises(wanted):
        run._Stages.train(stages(received=received, saver=None), 0)


def test_a_run_that_saves_is_not_finished_but_its_state_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[str] = []
    monkeypatch.setattr(run, "train", lambda _, first_step: False)
    saver = SimpleNamespace(finish=lambda: finished.append("saved"))
    assert run._Stages.train(stages(received=[15], saver=saver), 0) is False
    assert finished == ["saved"]
