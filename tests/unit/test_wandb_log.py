"""Weights & Biases, with a stand-in for its package: what it is told, what it is named, and that it may fail."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.metrics import RunLogger, read_metrics
from megatron_fipo.metrics.wandb_log import import_wandb

RUN = {"wandb_project": "reasoning"}


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests about curves.png wait for it to be drawn."""
    if "curves" not in request.node.name:
        monkeypatch.setattr("megatron_fipo.metrics.run_logger.draw_curves", lambda *_, **__: None)


class FakeError(Exception):
    """wandb.Error."""


class FakeWandb:
    """The part of the wandb package that is used, keeping a diary. It is its own run."""

    Error = FakeError

    def __init__(self, *, init_fails: bool = False, fails_after: int | None = None, how: type[Exception] = OSError):
        self.init_fails, self.fails_after, self.how = init_fails, fails_after, how
        self.inits: list[dict[str, Any]] = []
        self.axes: dict[str, str | None] = {}
        self.logged: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []

    def Settings(self, **options: Any) -> dict[str, Any]:
        return options

    def Histogram(self, np_histogram: tuple[list[float], list[float]]) -> tuple[str, list[float], list[float]]:
        return ("histogram", *np_histogram)

    def init(self, **options: Any) -> FakeWandb:
        self.inits.append(options)
        if self.init_fails:
            raise FakeError("No API key configured")
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        assert name not in self.axes
        self.axes[name] = step_metric

    def log(self, values: dict[str, Any]) -> None:
        if self.fails_after is not None and len(self.logged) >= self.fails_after:
            raise self.how("gone")
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


def write(directory: Path, fake: FakeWandb, steps: range, **options: Any) -> None:
    with RunLogger(directory, total_steps=9, wandb_module=fake, **{**RUN, **options}) as logger:
        for step in steps:
            logger.log_step(
                {
                    "step": step,
                    "accuracy": 0.5,
                    "histograms": {"reward": [1.0, -1.0]},
                    "updates": [{"pg_loss": 0.25, "f_histogram": {"edges": [0, 1], "counts": [2]}}] * 2,
                }
            )
            logger.log_evaluation(step, {"accuracy": 0.75})


def test_steps_updates_and_evaluations_have_their_own_axes(tmp_path: Path) -> None:
    fake = FakeWandb()
    write(tmp_path / "run7", fake, range(1, 3), config={"algorithm": "fipo"})
    (init,) = fake.inits
    assert (init["project"], init["name"], init["config"]) == ("reasoning", "run7", {"algorithm": "fipo"})
    assert (init["dir"], init["resume"]) == (str(tmp_path / "run7"), "allow")
    step, update, _, evaluation = fake.logged[:4]
    assert (step["step"], step["accuracy"]) == (1, 0.5)
    assert step["histograms/reward"] == ("histogram", [1.0, 1.0], [-1.0, 0.0, 1.0])
    assert update == {
        "update": 1,
        "updates/pg_loss": 0.25,
        "updates/histograms/f": ("histogram", [2.0], [0.0, 1.0]),
    }
    assert evaluation == {"step": 1, "eval/accuracy": 0.75}
    assert [entry["update"] for entry in fake.logged if "update" in entry] == [1, 2, 3, 4]
    assert {fake.axes[name] for name in ("accuracy", "eval/accuracy", "histograms/reward", "time/step")} == {"step"}
    assert {fake.axes[name] for name in ("updates/pg_loss", "updates/histograms/f")} == {"update"}
    assert fake.exit_codes == [0]


def test_a_resumed_run_goes_on_under_its_id_and_a_fresh_one_has_another(tmp_path: Path) -> None:
    first, second, other = FakeWandb(), FakeWandb(), FakeWandb()
    write(tmp_path / "a", first, range(1, 3))
    write(tmp_path / "a", second, range(2, 4), resume_step=1, num_updates=2)
    write(tmp_path / "b", other, range(1, 2), wandb_exp_name="mine")
    ids = [fake.inits[0]["id"] for fake in (first, second, other)]
    assert ids[0] == ids[1] == (tmp_path / "a/wandb_id").read_text().strip()
    assert ids[2] != ids[0]
    assert other.inits[0]["name"] == "mine"
    assert second.logged[1]["update"] == 3


def test_a_run_that_failed_is_finished_as_failed(tmp_path: Path) -> None:
    fake = FakeWandb()
    with (
        pytest.raises(KeyError),
        RunLogger(tmp_path, total_steps=1, wandb_module=fake, **RUN),  # type: ignore[arg-type]
    ):
        raise KeyError
    assert fake.exit_codes == [1]


@pytest.mark.parametrize("how", [FakeError, ConnectionResetError])
def test_training_goes_on_when_it_fails_later_and_says_so_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], how: type[Exception]
) -> None:
    fake = FakeWandb(fails_after=2, how=how)
    write(tmp_path, fake, range(1, 4))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert len(fake.logged) == 2
    assert (
        capfd.readouterr().err.count(f"Weights & Biases failed, and this run logs no more to it: {how.__name__}") == 1
    )


def test_being_refused_at_the_start_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--wandb-project is 'reasoning', but .* No API key configured .*offline"):
        write(tmp_path, FakeWandb(init_fails=True), range(1, 2))


def test_a_missing_package_is_named_with_the_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"--wandb-project is 'reasoning', but .* pip install wandb"):
        import_wandb("reasoning")
    with pytest.raises(ValueError, match="pip install wandb"):
        RunLogger(tmp_path, total_steps=1, wandb_project="reasoning")


def test_nothing_is_imported_or_logged_unasked(tmp_path: Path) -> None:
    before = "wandb" in sys.modules
    write(tmp_path / "zero", FakeWandb(), range(1, 2), wandb_project=None)
    assert ("wandb" in sys.modules) == before
    fake = FakeWandb()
    write(tmp_path / "one", fake, range(1, 2), rank=1)
    assert fake.inits == []
    assert not (tmp_path / "zero/wandb_id").exists()
