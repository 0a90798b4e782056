"""Damage to the other files that a run reads: recordings, an evaluation's responses, metrics, safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_table import FaultTable
from files.damage import flipped, flips, replaced, truncations
from safetensors.torch import save_file

from megatron_fipo.metrics.records import open_records, read_metrics
from megatron_fipo.trainer.evaluation_file import ResponseFile, blocks_of
from megatron_fipo.trainer.evaluation_result import EvaluatedProblem, EvaluatedResponse
from megatron_fipo.trainer.recording import read_rollouts, write_rollouts
from megatron_fipo.types import Group, Problem, Prompt, RewardResult, Sample
from megatron_fipo.weights.hf_files import HFWeights

SETTINGS = {"--seed": 1, "--eval-temperature": 0.7}
PROMPTS = [Prompt(Problem(f"p:{i}", "?", "1"), np.array([1])) for i in range(3)]


def damages(content: bytes, *, upto: int | None = None) -> dict[str, bytes]:
    """Every truncation, and 64 flips of the first `upto` bytes."""
    found = {f"cut off, {where}": content[:size] for where, size in truncations(len(content)).items()}
    size = len(content) if upto is None else upto
    return found | {f"byte {at}, bit {bit}": flipped(content, at, bit) for at, bit in flips(size)}


def outcome_of(function: Callable[[], Any]) -> str:
    try:
        return f"read: {function()!r}"
    except ValueError as error:
        return f"refused: {error}"


def record_each(
    faults: FaultTable, path: Path, read: Callable[[], Any], harmless: str, found: Mapping[str, bytes], about: str = ""
) -> None:
    """Count each damage to `path`: refused with its name, or read as what begins with `harmless`."""
    for name, content in found.items():
        with replaced(path, content):
            outcome = outcome_of(read)
        ok = outcome.startswith(harmless) or (outcome.startswith("refused") and (about or path.name) in outcome)
        kind = "record cut off" if name.startswith("cut") else "bit flip in a record"
        faults.record(kind, f"{path.name}, {name}", outcome[:300], ok)
        assert ok, (name, outcome)


def test_a_damaged_recording_is_refused(tmp_path: Path, faults: FaultTable) -> None:
    sample = Sample(
        uid="p:0/0",
        response_ids=np.arange(9),
        rollout_logprobs=np.linspace(-3, -0.1, 9, dtype=np.float32),
        loss_mask=np.ones(9, dtype=bool),
        token_versions=np.zeros(9, dtype=np.int64),
        finish_reason="stop",
        text="some text",
        result=RewardResult(1.0, 1.0, "1"),
        reward=1.0,
    )
    path = write_rollouts(str(tmp_path), 3, [Group(prompt, (sample, sample)) for prompt in PROMPTS], {"accuracy": 0.5})
    record_each(
        faults, path, lambda: read_rollouts(str(tmp_path), 3), "no damage is harmless", damages(path.read_bytes())
    )


def responses(directory: Path) -> ResponseFile:
    return ResponseFile(directory, SETTINGS, blocks_of({"set": PROMPTS}, 1), 2)


def num_finished(directory: Path) -> int:
    with responses(directory) as file:
        return len(file.finished)


def test_a_damaged_response_is_refused_or_drawn_again(tmp_path: Path, faults: FaultTable) -> None:
    answers = tuple(EvaluatedResponse(f"answer {i}", 7, "stop", 1.0, 1.0, "1") for i in range(2))
    with responses(tmp_path) as file:
        for prompt in PROMPTS:
            file.append([EvaluatedProblem(prompt.problem.uid, "?", "1", answers)])
    path = tmp_path / "responses.jsonl"
    content = path.read_bytes()
    for name, damaged in damages(content).items():
        path.write_bytes(damaged)
        outcome = outcome_of(lambda: num_finished(tmp_path))
        left = path.read_bytes()
        # what is left out is cut off, and drawn again
        drawn_again = outcome.startswith("read: ") and content.startswith(left) and left != content
        ok = drawn_again or ("refused" in outcome and str(path) in outcome)
        kind = "record cut off" if name.startswith("cut") else "bit flip in a record"
        faults.record(kind, f"{path.name}, {name}", outcome[:300], ok)
        assert ok, (name, outcome)
    path.write_bytes(content)
    settings = tmp_path / "evaluation_settings.json"
    record_each(
        faults,
        settings,
        lambda: num_finished(tmp_path),
        "no damage is harmless",
        damages(settings.read_bytes()),
        str(tmp_path),
    )


def test_damaged_metrics_are_refused_or_keep_their_steps(tmp_path: Path, faults: FaultTable) -> None:
    """No number in them is trained on: what counts is which steps there are."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "accuracy": i / 10}) + "\n" for i in range(1, 6)))

    def resumed() -> list[int]:
        open_records(path, resume_step=5).close()
        return [record["step"] for record in read_metrics(path)]

    harmless = "read: [1, 2, 3, 4, 5]"
    found = damages(path.read_bytes())
    cut = {name: content for name, content in found.items() if name.startswith("cut")}
    flips_found = {name: content for name, content in found.items() if name not in cut}
    record_each(faults, path, resumed, harmless, flips_found)
    record_each(faults, path, resumed, "read: [", cut)  # whole lines up to the cut


def test_damaged_safetensors_are_refused(tmp_path: Path, faults: FaultTable) -> None:
    """Their format has no checksum: of flips, those in the header are looked for."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(40, 8), "b": torch.zeros(3)}, path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")

    def read() -> list[tuple[str, list[int], str]]:
        weights = HFWeights(tmp_path)
        return [(name, list(weights.shape(name)), str(weights.read(name).dtype)) for name in weights.names]

    whole = outcome_of(read)
    found = damages(content, upto=header)
    for name, damaged in found.items():
        with replaced(path, damaged):
            outcome = outcome_of(read)
        # another name or type is another model's: refused when it is compared with config.json
        ok = (
            outcome.startswith("refused")
            or (not name.startswith("cut") and outcome != whole)
            or _is_space(name, content)
        )
        kind = "record cut off" if name.startswith("cut") else "bit flip in a record"
        faults.record(kind, f"{path.name}, {name}", outcome[:300], ok)
        assert ok, (name, outcome)


def _is_space(name: str, content: bytes) -> bool:
    """Padding and the remark "format" mean nothing."""
    at = int(name.split(",", maxsplit=1)[0].removeprefix("byte "))
    start = content.find(b'"__metadata__"')
    return content[at : at + 1] == b" " or (start <= at < content.find(b"}", start) + 1)


@pytest.mark.parametrize("name", ["evaluation_settings.json"])
def test_deleted_settings_of_an_evaluation_are_missed(tmp_path: Path, faults: FaultTable, name: str) -> None:
    answers = tuple(EvaluatedResponse(f"answer {i}", 7, "stop", 1.0, 1.0, "1") for i in range(2))
    with responses(tmp_path) as file:
        file.append([EvaluatedProblem("p:0", "?", "1", answers)])
    with replaced(tmp_path / name, None):
        outcome = outcome_of(lambda: num_finished(tmp_path))
    ok = "refused" in outcome and name in outcome
    faults.record("record cut off", f"{name} deleted", outcome, ok)
    assert ok, outcome
