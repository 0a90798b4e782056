"""Groups of samples as JSON and back, exactly: for recorded rollouts and for the groups that a checkpoint holds.

A recorded step is one JSONL file: a header with the number of groups, a group per line, and at the end the SHA-256 of
all lines before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fipo.types import GraderError, Group, Problem, Prompt, RewardResult, Sample

FORMAT = 3
OLDER_FORMATS = {1: "which says of every token who drew it", 2: "which ends with a checksum"}  # what came after each


def write_rollouts(directory: str, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> Path:
    """Write the groups that a step trains on, and the metrics of how they came about; returns the file.

    The file appears under its name only when it is complete, and replaces an older recording of the step. What a killed
    process leaves unfinished is overwritten when the step is made again. Raises ValueError naming the file when it
    cannot be written.
    """
    path = _path(directory, step)
    header = {"format": FORMAT, "step": step, "num_groups": len(groups), "metrics": dict(metrics)}
    unfinished = path.with_name(f"{path.name}.tmp")
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8") as file:
            for record in (header, *map(group_to_dict, groups)):
                line = json.dumps(record) + "\n"
                digest.update(line.encode())
                file.write(line)
            file.write(json.dumps({"sha256": digest.hexdigest()}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise ValueError(f"--record-rollouts: {path} cannot be written: {error}") from error
    finally:  # a signal may end it anywhere
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return path


def read_rollouts(directory: str, step: int) -> tuple[tuple[Group, ...], dict[str, float]]:
    """The groups and metrics that `write_rollouts` wrote for a step.

    Raises ValueError, naming --replay-rollouts or the file and line, when the step was not recorded or the file is
    damaged.
    """
    path = _path(directory, step)
    if not path.is_file():
        raise ValueError(
            f"--replay-rollouts is {directory!r}, which holds no step {step} (it holds {_steps(directory)})"
        )
    content = path.read_bytes()
    lines = [_parsed(path, number, line) for number, line in enumerate(content.splitlines(), start=1)]
    found_format = lines[0].get("format") if lines else None
    if isinstance(found_format, int) and found_format in OLDER_FORMATS:
        raise ValueError(
            f"{path} is of format {found_format}, but must be of format {FORMAT}, {OLDER_FORMATS[found_format]}: "
            "record the rollouts anew with --record-rollouts"
        )
    is_header = bool(lines) and {"format", "step", "num_groups", "metrics"} <= lines[0].keys()
    if not is_header or (lines[0]["format"], lines[0]["step"]) != (FORMAT, step):
        raise ValueError(f"{path}, line 1: found no header of format {FORMAT} for step {step}")
    last_line = content.rfind(b"\n", 0, -1) + 1
    wanted = json.dumps({"sha256": hashlib.sha256(content[:last_line]).hexdigest()}) + "\n"
    if content[last_line:] != wanted.encode():
        raise ValueError(f"{path} was changed or cut off: its last line is not the SHA-256 of what stands before it")
    header, *bodies = lines[:-1]
    if len(bodies) != header["num_groups"]:
        raise ValueError(
            f"{path} holds {len(bodies)} groups, but its header says {header['num_groups']}: it is cut off"
        )
    groups = []
    for number, body in enumerate(bodies, start=2):
        try:
            groups.append(group_from_dict(body))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return tuple(groups), header["metrics"]


def group_to_dict(group: Group) -> dict[str, Any]:
    """The group in JSON types. A float32 becomes the float64 of the same value, so nothing is rounded."""
    return {**prompt_to_dict(group.prompt), "samples": [_sample_to_dict(sample) for sample in group.samples]}


def group_from_dict(data: Mapping[str, Any]) -> Group:
    """The group that `group_to_dict` wrote, equal in every bit. Raises ValueError for anything else."""
    try:
        return Group(prompt_from_dict(data), tuple(_sample_from_dict(sample) for sample in data["samples"]))
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a recorded group: {type(error).__name__}: {error}") from error


def prompt_to_dict(prompt: Prompt) -> dict[str, Any]:
    """The prompt in JSON types."""
    return {
        "problem": {**asdict(prompt.problem), "extra": dict(prompt.problem.extra)},
        "prompt_ids": prompt.token_ids.tolist(),
    }


def prompt_from_dict(data: Mapping[str, Any]) -> Prompt:
    """The prompt that `prompt_to_dict` wrote; other entries of `data` are ignored. Raises KeyError or TypeError."""
    problem = dict(data["problem"])
    if not isinstance(problem["prompt"], str):
        problem["prompt"] = tuple(problem["prompt"])
    return Prompt(Problem(**problem), np.array(data["prompt_ids"], dtype=np.int64))


def bools(values: Sequence[int]) -> np.ndarray:
    """[R] bool from 0 and 1. Raises ValueError for any other value."""
    array = np.array(values, dtype=np.int64)
    if not np.isin(array, (0, 1)).all():
        raise ValueError("a loss mask holds something else than 0 and 1")
    return array.astype(bool)


def require_equal_lengths(uid: str, *arrays: np.ndarray) -> None:
    """Raise ValueError unless all are one-dimensional and of one length."""
    if any(array.ndim != 1 or array.shape != arrays[0].shape for array in arrays):
        raise ValueError(f"sample {uid!r} has unequal numbers of tokens, log-probs, mask entries or versions")


def _sample_to_dict(sample: Sample) -> dict[str, Any]:
    assert sample.rollout_logprobs.dtype == np.float32, sample.rollout_logprobs.dtype
    is_graded = isinstance(sample.result, RewardResult)
    return {
        "uid": sample.uid,
        "response_ids": sample.response_ids.tolist(),
        "rollout_logprobs": sample.rollout_logprobs.tolist(),
        "loss_mask": sample.loss_mask.astype(int).tolist(),
        "token_versions": sample.token_versions.tolist(),
        "finish_reason": sample.finish_reason,
        "text": sample.text,
        "result" if is_graded else "error": asdict(sample.result),
        "reward": sample.reward,
    }


def _sample_from_dict(data: Mapping[str, Any]) -> Sample:
    arrays: dict[str, np.ndarray] = {
        "response_ids": np.array(data["response_ids"], dtype=np.int64),
        "rollout_logprobs": np.array(data["rollout_logprobs"], dtype=np.float32),
        "loss_mask": bools(data["loss_mask"]),
        "token_versions": np.array(data["token_versions"], dtype=np.int64),
    }
    require_equal_lengths(data["uid"], *arrays.values())
    result = RewardResult(**data["result"]) if "result" in data else GraderError(**data["error"])
    rest = {name: value for name, value in data.items() if name not in ("result", "error")}
    return Sample(**{**rest, **arrays, "result": result})


def _path(directory: str, step: int) -> Path:
    return Path(directory) / f"step_{step:06d}.jsonl"


def _steps(directory: str) -> str:
    names = (
        [re.fullmatch(r"step_([0-9]+)\.jsonl", name) for name in os.listdir(directory)]
        if os.path.isdir(directory)
        else []
    )
    steps = sorted(int(name.group(1)) for name in names if name)
    return f"{len(steps)} steps from {steps[0]} to {steps[-1]}" if steps else "none"


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, an integer of thousands of digits
        raise ValueError(f"{path}, line {number}: not JSON ({error}): it is cut off or damaged") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}, line {number}: found {type(data).__name__}, wanted an object")
    return data
