"""The responses of an evaluation on disk: whole blocks are kept, anything else is dropped or refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fipo.trainer.evaluation_file import RESPONSES_FILE, Block, ResponseFile, blocks_of
from megatron_fipo.trainer.evaluation_result import EvaluatedProblem, EvaluatedResponse
from megatron_fipo.types import Problem, Prompt

TOOL = Path(__file__).resolve().parents[2] / "tools" / "evaluate.py"
NUM_SAMPLES = 2
SETTINGS = {"--seed": 1, "--eval-temperature": 1.0, "model.safetensors (SHA-256)": "ab"}
DATA_SETS = {
    name: [Prompt(Problem(f"{name}:{i}", "?", str(i)), np.array([i])) for i in range(size)]
    for name, size in (("small", 3), ("other", 2))
}
BLOCKS = blocks_of(DATA_SETS, 2)


def answered(block: Block) -> list[EvaluatedProblem]:
    """A block's problems with texts that try a line-based file."""
    return [
        EvaluatedProblem(
            prompt.problem.uid,
            "prompt of " + prompt.problem.uid,
            prompt.problem.ground_truth,
            (
                EvaluatedResponse("one\ntwo\u2028\x00\ud800", 3, "stop", 1.0, 2.0, "42"),
                EvaluatedResponse("", 9, "length", 0.0, None, None, "timeout: no verdict"),
            ),
        )
        for prompt in block.prompts
    ]


def opened(directory: Path, settings: dict[str, Any] = SETTINGS) -> ResponseFile:
    return ResponseFile(directory, settings, BLOCKS, NUM_SAMPLES)


def write(directory: Path, num_blocks: int) -> bytes:
    with opened(directory) as file:
        for block in BLOCKS[:num_blocks]:
            file.append(answered(block))
    return (directory / RESPONSES_FILE).read_bytes()


def test_blocks_keep_the_order_and_do_not_cross_data_sets() -> None:
    uids = [(block.data_set, [prompt.problem.uid for prompt in block.prompts]) for block in BLOCKS]
    assert uids == [("small", ["small:0", "small:1"]), ("small", ["small:2"]), ("other", ["other:0", "other:1"])]


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path, 2)
    with opened(tmp_path) as file:
        assert [list(problems) for problems in file.finished] == [answered(block) for block in BLOCKS[:2]]
        assert [problem.uid for problem in file.problems("small")] == ["small:0", "small:1", "small:2"]
        assert file.problems("other") == []
        file.append(answered(BLOCKS[2]))
        assert file.problems("other") == answered(BLOCKS[2])
    assert (tmp_path / RESPONSES_FILE).read_bytes() == write(tmp_path / "straight", 3)


def test_cut_off_anywhere_the_file_goes_on_from_its_last_whole_block(tmp_path: Path) -> None:
    whole = write(tmp_path, 3)
    ends = [0, *np.cumsum([len(write(tmp_path / f"{i}", i + 1)) - len(write(tmp_path / f"{i}x", i)) for i in range(3)])]
    path = tmp_path / RESPONSES_FILE
    near_ends = {end + shift for end in ends for shift in (-1, 0, 1)}
    for size in sorted({*range(1, len(whole), 53), *near_ends} & {*range(1, len(whole))}):
        path.write_bytes(whole[:size])
        with opened(tmp_path) as file:
            kept = len(file.finished)
        assert ends[kept] <= size < [*ends, len(whole) + 1][kept + 1]
        assert path.read_bytes() == whole[: ends[kept]]
    path.write_bytes(whole[: ends[1] + 5])
    with opened(tmp_path) as file:
        for block in BLOCKS[len(file.finished) :]:
            file.append(answered(block))
    assert path.read_bytes() == whole


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    before = write(tmp_path, 1)
    other = {**SETTINGS, "--eval-temperature": 0.6, "--eval-top-k": 5}
    with pytest.raises(ValueError, match=r"--eval-temperature is 1.0 there and 0.6 here; --eval-top-k is None there"):
        opened(tmp_path, other)
    assert (tmp_path / RESPONSES_FILE).read_bytes() == before
    many = {f"--flag-{i}": i for i in range(9)}
    with pytest.raises(ValueError, match="9 more"):
        opened(tmp_path, many)


def test_settings_without_a_response_may_change(tmp_path: Path) -> None:
    write(tmp_path, 0)
    with opened(tmp_path, {**SETTINGS, "--seed": 2}):
        pass
    assert json.loads((tmp_path / "evaluation_settings.json").read_text())["--seed"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [lines[1], *lines[1:]], r":1 is the response .*0', 1\), but .*0', 0\) belongs there"),
        (lambda lines: [b"{}\n", *lines[1:]], ":1: not a response"),
        (lambda lines: [b"[1]\n", *lines[1:]], ":1: not a response"),
        (lambda lines: [lines[0].replace(b'"answer"', b'"reply"'), *lines[1:]], ":1 holds .*reply"),
        (lambda lines: [lines[0].replace(b'"stop"', b'"stap"'), *lines[1:]], ":1 was changed: its sha256 is"),
        (lambda lines: [lines[0].replace(b": ", b":  ", 1), *lines[1:]], ":1 was changed: its sha256 is"),
        (lambda lines: [*lines, lines[-1]], ":11: more responses than the evaluation has"),
    ],
)
def test_a_file_that_was_edited_is_refused_with_the_line(tmp_path: Path, change: Any, message: str) -> None:
    lines = write(tmp_path, 3).splitlines(keepends=True)
    (tmp_path / RESPONSES_FILE).write_bytes(b"".join(change(lines)))
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


def test_responses_without_settings_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "evaluation_settings.json").unlink()
    with pytest.raises(ValueError, match=r"no evaluation_settings.json that says how they were drawn"):
        opened(tmp_path)


def test_two_evaluations_do_not_write_to_one_directory(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(ValueError, match="is being written by another evaluation"):
        opened(tmp_path)
    with opened(tmp_path):
        pass


def test_the_settings_tell_apart_prompts_that_reach_the_reward_with_other_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = importlib.util.spec_from_file_location("evaluate_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, tool)  # where its dataclasses look for it
    spec.loader.exec_module(tool)

    def digest(extra: dict[str, Any]) -> str:
        return tool._digest_of_prompts([Prompt(Problem("a:1", "?", "1", extra=extra), np.array([1]))])

    assert digest({"metadata": {"x": 1, "y": 2}}) == digest({"metadata": {"y": 2, "x": 1}})
    assert digest({"metadata": {"x": 1, "y": 2}}) != digest({"metadata": {"x": 1, "y": 3}})
