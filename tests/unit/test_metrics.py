"""The log of a run: what is written, what a resumed run keeps, what a person sees."""

from __future__ import annotations

import json
import os
import pty
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_fipo.metrics import RunLogger, read_metrics, timings_table
from megatron_fipo.metrics.curves import draw_curves
from megatron_fipo.metrics.timings import StageClock


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests about curves.png wait for it to be drawn."""
    if "curves" not in request.node.name:
        monkeypatch.setattr("megatron_fipo.metrics.run_logger.draw_curves", lambda *_, **__: None)


def step_metrics(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "accuracy": 0.5,
        "score/mean": np.float32(0.25),
        "num_samples": np.int64(64),
        "num_tokens": 1000,
        "response_length/quantiles": [1.0, 2.5],
        "updates": [{"pg_loss": 0.1 * step, "entropy": 1.0}, {"pg_loss": 0.2 * step, "entropy": 2.0}],
    }


def run(directory: Path, steps: range, **options: Any) -> None:
    with RunLogger(directory, total_steps=10, **options) as logger:
        for step in steps:
            with logger.stage("rollout"):
                pass
            logger.log_step(step_metrics(step))
            logger.log_samples(step, [{"prompt": "1 + 1", "response": f"\u2028 {step}"}])
            logger.log_evaluation(step, {"accuracy": 0.1 * step})


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory)).Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]


def test_records_that_end_before_the_checkpoint_are_refused_and_kept(tmp_path: Path) -> None:
    run(tmp_path, range(1, 3))
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"metrics.jsonl ends with step 2, but the checkpoint .* has 3 steps"):
        RunLogger(tmp_path, total_steps=10, resume_step=3)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    run(tmp_path, range(3, 4), resume_step=2)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_records_are_flushed_to_the_disk_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    with RunLogger(tmp_path, total_steps=10) as logger:
        monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
        logger.flush_to_disk()
        names = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", ".")
        assert flushed == [(tmp_path / name).stat().st_ino for name in names]
    RunLogger(tmp_path, total_steps=10, rank=1).flush_to_disk()


def test_a_step_is_one_line_with_its_values_and_seconds(tmp_path: Path) -> None:
    run(tmp_path, range(1, 3))
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert [first["step"], second["step"]] == [1, 2]
    assert first["score/mean"] == 0.25
    assert first["num_samples"] == 64
    assert second["updates"] == [{"pg_loss": 0.2, "entropy": 1.0}, {"pg_loss": 0.4, "entropy": 2.0}]
    assert first["response_length/quantiles"] == [1.0, 2.5]
    assert first["time/step"] == first["time/rollout"] > 0
    assert first["tokens_per_s"] == 1000 / first["time/step"]


def test_values_survive_the_file_bit_for_bit(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    with RunLogger(tmp_path, total_steps=1) as logger:
        logger.log_step({"step": 1, "accuracy": value})
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["accuracy"] == value


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"grad_norm": float("nan")}, "metric 'grad_norm' is nan at step 1"),
        ({"updates": [{"pg_loss": float("inf")}]}, r"metric 'updates\[0\].pg_loss' is inf at step 1"),
        ({"accuracy": "high"}, "metric 'accuracy' is a str at step 1, but must be a number or a list"),
    ],
)
def test_what_is_no_finite_number_is_refused_by_name(tmp_path: Path, metrics: dict[str, Any], message: str) -> None:
    with RunLogger(tmp_path, total_steps=1) as logger, pytest.raises(ValueError, match=message):
        logger.log_step({"step": 1, **metrics})
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_tensorboard_counts_steps_and_updates_apart(tmp_path: Path) -> None:
    run(tmp_path, range(1, 3))
    assert scalars(tmp_path / "tensorboard", "accuracy") == [(1, 0.5), (2, 0.5)]
    assert scalars(tmp_path / "tensorboard", "eval/accuracy") == [(1, 0.1), (2, 0.2)]
    assert scalars(tmp_path / "tensorboard/updates", "pg_loss") == [(1, 0.1), (2, 0.2), (3, 0.2), (4, 0.4)]


def test_resume_forgets_what_a_later_dead_run_wrote(tmp_path: Path) -> None:
    run(tmp_path, range(1, 5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "accur')
    run(tmp_path, range(3, 5), resume_step=2, num_updates=4)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [record["step"] for record in read_metrics(tmp_path / "evaluations.jsonl")] == [1, 2, 3, 4]
    samples = read_metrics(tmp_path / "samples.jsonl")
    assert [(sample["step"], sample["response"]) for sample in samples] == [(s, f"\u2028 {s}") for s in range(1, 5)]
    assert [step for step, _ in scalars(tmp_path / "tensorboard", "accuracy")] == [1, 2, 3, 4]
    assert [step for step, _ in scalars(tmp_path / "tensorboard/updates", "pg_loss")] == list(range(1, 9))


def test_resume_into_an_empty_directory_starts_there(tmp_path: Path) -> None:
    run(tmp_path, range(3, 5), resume_step=2)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [3, 4]


def test_updates_are_counted_on_in_a_directory_that_holds_none(tmp_path: Path) -> None:
    run(tmp_path, range(3, 5), resume_step=2, num_updates=4)
    assert [step for step, _ in scalars(tmp_path / "tensorboard/updates", "pg_loss")] == [5, 6, 7, 8]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "accuracy": 0.5}')
    run(tmp_path, range(2, 3), resume_step=1)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_fresh_run_refuses_a_directory_that_holds_one(tmp_path: Path) -> None:
    run(tmp_path, range(1, 2))
    with pytest.raises(ValueError, match=r"metrics\.jsonl already holds the records of a run.*--output-dir"):
        RunLogger(tmp_path, total_steps=1)


@pytest.mark.parametrize("line", ['{"step": 2, "accur', "[2]", '{"accuracy": 1}', '{"step": "2"}'])
def test_a_bad_line_is_named_with_its_file(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        RunLogger(tmp_path, total_steps=3, resume_step=3)


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", range(1, 3), rank=1)
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_plain_lines_are_aligned_and_repeat_the_header(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with RunLogger(tmp_path, total_steps=100) as logger:
        for step in range(1, 42):
            logger.log_step(step_metrics(step))
    stdout, stderr = capfd.readouterr()
    lines = stderr.splitlines()
    assert stdout == ""
    assert [index for index, line in enumerate(lines) if "accuracy" in line] == [0, 21, 42]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert lines[1].split()[:5] == ["1/100", "+0.250", "0.500", "-", "1.500"]


def test_a_terminal_gets_a_live_table_and_stdout_stays_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = pty.openpty()
    shown: list[bytes] = []
    reader = threading.Thread(target=lambda: shown.extend(iter(lambda: read_terminal(ours), b"")))
    reader.start()
    with open(theirs, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        patched.setenv("TERM", "xterm")
        patched.setenv("COLUMNS", "120")
        with RunLogger(tmp_path, total_steps=2) as logger:
            with logger.stage("rollout"):
                logger.say("engine is up")
            logger.log_step({"step": 1, "accuracy": 0.625})
    reader.join()
    os.close(ours)
    assert capfd.readouterr().out == ""
    for text in (b"engine is up", b"0.625", b"step 1/2", b"time left"):
        assert text in b"".join(shown)


def read_terminal(descriptor: int) -> bytes:
    """What a terminal is given next; nothing at its end, which Linux reports as an error."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


def test_stages_charge_inner_time_to_the_inner_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("megatron_fipo.metrics.timings.time.monotonic", lambda: now[0])
    clock = StageClock()
    with clock.stage("start", part_of_step=False):
        now[0] += 8
    with clock.stage("rollout"):
        now[0] += 1
        with clock.stage("sync"):
            now[0] += 2
        now[0] += 4
    assert clock.totals == {"start": 8.0, "rollout": 5.0, "sync": 2.0}
    assert clock.take_step() == {"rollout": 5.0, "sync": 2.0}
    assert clock.take_step() == {}


def test_timings_table_adds_up(tmp_path: Path) -> None:
    table = timings_table({"rollout": 30.0, "update": 60.0}, total_s=100.0)
    rows = [line.split() for line in table.splitlines()]
    assert rows == [
        ["stage", "seconds", "share"],
        ["update", "60.0", "60.0%"],
        ["rollout", "30.0", "30.0%"],
        ["other", "10.0", "10.0%"],
        ["total", "100.0", "100.0%"],
    ]


def test_curves_are_drawn_for_whatever_was_logged(tmp_path: Path) -> None:
    draw_curves([{"step": 1}], [], tmp_path / "sparse.png")
    run(tmp_path, range(1, 3), influence_bounds=(1.0, 1.2))
    for name in ("sparse.png", "curves.png"):
        header = (tmp_path / name).read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(header[16:20], "big") >= 1000


def test_records_are_readable_as_they_are_written(tmp_path: Path) -> None:
    with RunLogger(tmp_path, total_steps=2) as logger:
        logger.log_step({"step": 1})
        assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


def test_texts_that_no_encoding_holds_survive_the_file_and_a_resume(tmp_path: Path) -> None:
    sample = {"response": "\ud800 in \u4e2d\u6587", "reward_error": "exception: ValueError: \udfff"}
    with RunLogger(tmp_path, total_steps=2) as log:
        log.log_step(step_metrics(1))
        log.log_samples(1, [sample])
    assert read_metrics(tmp_path / "samples.jsonl") == [{"step": 1, **sample}]
    assert "\u4e2d\u6587" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    RunLogger(tmp_path, total_steps=2, resume_step=1).close()
    assert read_metrics(tmp_path / "samples.jsonl") == [{"step": 1, **sample}]
