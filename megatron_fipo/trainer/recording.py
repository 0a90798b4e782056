"""Groups of samples as JSON and back, exactly: for recorded rollouts and for the surplus groups of a checkpoint.

A recorded step is one JSONL file: a header with the number of groups, then a group per line.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fipo.types import Group, Problem, Prompt, RewardResult, Sample

FORMAT = 1


def write_rollouts(directory: str, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> Path:
    """Write the groups that a step trains on, and the metrics of how they came about; returns the file.

    The file appears under its name only when it is complete, and replaces an older recording of the step.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    path = _path(directory, step)
    header = {"format": FORMAT, "step": step, "num_groups": len(groups), "metrics": dict(metrics)}
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        for line in (header, *map(group_to_dict, groups)):
            file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
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
    with path.open(encoding="utf-8") as file:
        lines = [_parsed(path, number, line) for number, line in enumerate(file, start=1)]
    if not lines or lines[0].get("format") != FORMAT or lines[0].get("step") != step:
        raise ValueError(f"{path}, line 1: found no header of format {FORMAT} for step {step}")
    header, *bodies = lines
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
    return {
        "problem": {**asdict(group.prompt.problem), "extra": dict(group.prompt.problem.extra)},
        "prompt_ids": group.prompt.token_ids.tolist(),
        "samples": [_sample_to_dict(sample) for sample in group.samples],
    }


def group_from_dict(data: Mapping[str, Any]) -> Group:
    """The group that `group_to_dict` wrote, equal in every bit. Raises ValueError for anything else."""
    try:
        problem = dict(data["problem"])
        if not isinstance(problem["prompt"], str):
            problem["prompt"] = tuple(problem["prompt"])
        prompt = Prompt(Problem(**problem), np.array(data["prompt_ids"], dtype=np.int64))
        return Group(prompt, tuple(_sample_from_dict(sample) for sample in data["samples"]))
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a recorded group: {type(error).__name__}: {error}") from error


def _sample_to_dict(sample: Sample) -> dict[str, Any]:
    assert sample.rollout_logprobs.dtype == np.float32, sample.rollout_logprobs.dtype
    return {
        "uid": sample.uid,
        "response_ids": sample.response_ids.tolist(),
        "rollout_logprobs": sample.rollout_logprobs.tolist(),
        "finish_reason": sample.finish_reason,
        "weight_version": sample.weight_version,
        "text": sample.text,
        "result": asdict(sample.result),
        "reward": sample.reward,
    }


def _sample_from_dict(data: Mapping[str, Any]) -> Sample:
    response_ids = np.array(data["response_ids"], dtype=np.int64)
    rollout_logprobs = np.array(data["rollout_logprobs"], dtype=np.float32)
    if response_ids.ndim != 1 or response_ids.shape != rollout_logprobs.shape:
        raise ValueError(f"sample {data['uid']!r} has unequal numbers of tokens and log-probs")
    arrays = {"response_ids": response_ids, "rollout_logprobs": rollout_logprobs}
    return Sample(**{**data, **arrays, "result": RewardResult(**data["result"])})


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


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error.msg}): it is cut off or damaged") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}, line {number}: found {type(data).__name__}, wanted an object")
    return data
