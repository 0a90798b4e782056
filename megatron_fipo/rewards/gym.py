"""reasoning-gym's own verifiers, on the problem built again from its data set, parameters and index."""

from __future__ import annotations

import functools
import json
from typing import Any

from megatron_fipo.rewards.unsilenced import unsilenced
from megatron_fipo.types import RewardResult

OPENING_TAG, CLOSING_TAG = "<answer>", "</answer>"


def reasoning_gym(
    response: str,
    ground_truth: str,
    *,
    task: str,
    parameters: dict[str, Any],
    index: int,
    **extra: Any,
) -> RewardResult:
    """The score that the data set `task`, made with `parameters` (its seed and size too), gives the answer to its
    problem `index`. The answer is the last <answer>...</answer> of the response, else all of it.

    `score` is the verifier's, between 0 and 1, partial credit included; `accuracy` is 1 only for full marks.
    Several verifiers evaluate the answer as Python: a grader process confines what that can do (confinement.py).
    Raises ValueError when the problem built here is not the one that was asked (its answer differs); MemoryError and
    RecursionError also where the verifier catches them.
    """
    dataset, entry = _entry(task, json.dumps(parameters, sort_keys=True), index)
    expected = "" if entry["answer"] is None else str(entry["answer"])
    if expected != ground_truth:
        raise ValueError(
            f"problem {index} of {task} with {parameters} has the answer {expected[:80]!r} here and "
            f"{ground_truth[:80]!r} where it was asked: the task is not reproducible"
        )
    tagged = _last_tagged(response)
    answer = response.strip() if tagged is None else tagged
    with unsilenced({base.__module__ for base in type(dataset).__mro__}):
        score = float(dataset.score_answer(answer, entry))
    return RewardResult(score, float(score >= 1.0), answer or None)


def _last_tagged(response: str) -> str | None:
    """What the last match of <answer>(.*?)</answer> holds, in linear time: tags without an end make the regular
    expression quadratic."""
    end = response.rfind(CLOSING_TAG)
    while end >= 0:
        end_before = response.rfind(CLOSING_TAG, 0, end)
        start = response.find(OPENING_TAG, end_before + len(CLOSING_TAG) if end_before >= 0 else 0, end)
        if start >= 0:
            return response[start + len(OPENING_TAG) : end].strip()
        end = end_before
    return None


@functools.lru_cache(maxsize=256)
def _entry(task: str, parameters: str, index: int) -> tuple[Any, dict[str, Any]]:
    """Data set and problem; kept, because the samples of one prompt are graded one after the other."""
    dataset = _dataset(task, parameters)
    return dataset, dataset[index]


@functools.lru_cache(maxsize=4)
def _dataset(task: str, parameters: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **json.loads(parameters))
