"""reasoning-gym's data sets as endless sources. Each problem is a function of the data set's seed and an index.

The grader builds the same problem again from what `Problem.extra` carries (megatron_fipo.rewards.gym), because some
verifiers depend on the data set's parameters and on Python types that JSON does not keep.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

from megatron_fipo.config import require
from megatron_fipo.data.source import SeededSource, question_key, stable_hash
from megatron_fipo.types import Problem

BLOCK_SIZE = 500  # problems per data set object; the next block has another seed, so the stream never ends
# These draw from Python sets of strings, whose order changes from process to process unless PYTHONHASHSEED is fixed.
HASH_ORDERED_TASKS = ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
OWN_PARAMETERS = ("seed", "size")  # of every data set; the source decides them
LIST_TASKS = "python -c \"import reasoning_gym.factory as f; print(*sorted(f.DATASETS), sep='\\n')\""


def reasoning_gym_task(
    task: str, task_args: Mapping[str, Any], seed: int, num_eval_problems: int
) -> tuple[SeededSource, list[Problem]]:
    """The training source and the held-out problems of a reasoning-gym data set.

    The held-out problems depend on the task, its parameters and their number, not on the seed; the source skips every
    problem that asks the same as one of them.

    Raises ValueError for an unknown task, unknown or invalid parameters, a task that is not reproducible under
    Python's randomised string hashes, and a task that has too few different problems.
    """
    check_task(task, task_args)
    held_out = _held_out(task, task_args, num_eval_problems)
    held_out_keys = {question_key(problem) for problem in held_out}

    @functools.lru_cache(maxsize=1)
    def block(number: int) -> tuple[int, Any]:
        dataset_seed = stable_hash("training", task, seed, number)
        return dataset_seed, make_dataset(task, task_args, dataset_seed)

    def problem_at(k: int) -> Problem | None:
        dataset_seed, dataset = block(k // BLOCK_SIZE)
        problem = _problem(task, task_args, dataset_seed, dataset, k % BLOCK_SIZE)
        return None if question_key(problem) in held_out_keys else problem

    arguments = json.dumps(dict(task_args), sort_keys=True)
    description = f"task {task} {arguments}, seed {seed}, {num_eval_problems} held out"
    return SeededSource(description, problem_at), held_out


def check_task(task: str, task_args: Mapping[str, Any]) -> None:
    """Raise ValueError, naming --task or --task-args, for a task that cannot be built."""
    datasets = _datasets()
    if task not in datasets:
        close = difflib.get_close_matches(task, [*datasets, "small_arithmetic"], n=1)
        suggestion = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"--task is {task!r}, which is no task{suggestion}; wanted: small_arithmetic or a reasoning-gym data set, "
            f"listed by {LIST_TASKS}"
        )
    known = [f.name for f in dataclasses.fields(datasets[task][1]) if f.name not in OWN_PARAMETERS]
    unknown = [name for name in task_args if name not in known]
    require(not unknown, "--task-args", unknown, f"made of the parameters of {task}: {', '.join(known)}")
    require(
        task not in HASH_ORDERED_TASKS or os.environ.get("PYTHONHASHSEED", "random") != "random",
        "--task",
        task,
        "run with PYTHONHASHSEED=0 in the environment: its problems depend on the order of Python sets",
    )
    make_dataset(task, task_args, seed=0)


def make_dataset(task: str, task_args: Mapping[str, Any], seed: int) -> Any:
    """The reasoning-gym data set. Raises ValueError naming --task-args when it refuses the parameters."""
    dataset_class, config_class = _datasets()[task]
    try:
        return dataset_class(config_class(**task_args, seed=seed, size=BLOCK_SIZE))
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"--task-args is {dict(task_args)!r}, which {task} refuses: {error or type(error).__name__}"
        ) from error


def _datasets() -> dict[str, tuple[Any, Any]]:
    """reasoning-gym's table of data set and parameter classes, imported on first use: it takes more than a second."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f"--task needs the package reasoning-gym for every task but small_arithmetic: {error}"
        ) from error
    return DATASETS


def _held_out(task: str, task_args: Mapping[str, Any], num_problems: int) -> list[Problem]:
    found: dict[str, Problem] = {}
    num_blocks = 2 + 10 * num_problems // BLOCK_SIZE
    for number in range(num_blocks):
        dataset_seed = stable_hash("evaluation", task, number)
        dataset = make_dataset(task, task_args, dataset_seed)
        for index in range(BLOCK_SIZE):
            problem = _problem(task, task_args, dataset_seed, dataset, index)
            found.setdefault(question_key(problem), problem)
            if len(found) == num_problems:
                return list(found.values())
    raise ValueError(
        f"--num-eval-problems is {num_problems}, but {num_blocks * BLOCK_SIZE} problems of {task} with --task-args "
        f"{dict(task_args)!r} hold only {len(found)} different ones"
    )


def _problem(task: str, task_args: Mapping[str, Any], dataset_seed: int, dataset: Any, index: int) -> Problem:
    try:
        entry = dataset[index]
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"--task-args is {dict(task_args)!r}, with which {task} makes no problem: {error or type(error).__name__}"
        ) from error
    return Problem(
        uid=f"{task}:{dataset_seed}:{index}",
        prompt=entry["question"],
        ground_truth="" if entry["answer"] is None else str(entry["answer"]),
        extra={
            "task": task,
            "parameters": {**task_args, "seed": dataset_seed, "size": BLOCK_SIZE},
            "index": index,
        },
    )
