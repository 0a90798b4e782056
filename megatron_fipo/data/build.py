"""From the data settings to a training source and the evaluation problems, which share no question."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_fipo.config import require
from megatron_fipo.data.arithmetic import small_arithmetic
from megatron_fipo.data.files import (
    DEFAULT_DEDUP_KEY,
    FileFormat,
    ProblemFile,
    dataset_name,
    file_source,
    read_problem_file,
)
from megatron_fipo.data.gym import reasoning_gym_task
from megatron_fipo.data.source import ProblemSource, question_key
from megatron_fipo.data_config import DataSettings
from megatron_fipo.types import Problem

EVAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # stands in names of metrics, as NAME/avg@32
RESERVED_NAMES = ("accuracy", "response_length", "score")  # metrics of all evaluation data sets together
NUM_SHOWN = 3


def make_sources(settings: DataSettings, seed: int) -> tuple[ProblemSource, dict[str, list[Problem]], tuple[str, ...]]:
    """The training source, the evaluation problems by the data set's name, and lines for the user: what was left out.

    A task holds its own evaluation problems out of training, under the task's name; they do not depend on `seed`. A
    prompt file is evaluated on --eval-prompt-data, or on nothing when that is not given.

    Raises ValueError for an unknown task or parameter, an unreadable, malformed or empty file, a bad or repeated name,
    files that share a question, and an evaluation question with two ground truths.
    """
    if settings.task is None:
        return _from_files(settings, seed)
    if settings.task == "small_arithmetic":
        require(not settings.task_args, "--task-args", dict(settings.task_args), "empty: small_arithmetic has none")
        source, held_out = small_arithmetic(seed, settings.num_eval_problems)
    else:
        source, held_out = reasoning_gym_task(settings.task, settings.task_args, seed, settings.num_eval_problems)
    return source, {settings.task: held_out}, ()


def eval_paths(values: Sequence[str]) -> dict[str, str]:
    """`NAME=PATH` or `PATH` (named after the file) -> {name: path}. Raises ValueError naming --eval-prompt-data."""
    paths: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or "/" in name:  # a path that holds "=" further in
            name, path = dataset_name(value), value
        require(
            EVAL_NAME.fullmatch(name) is not None and name not in RESERVED_NAMES,
            "--eval-prompt-data",
            value,
            f"NAME=PATH with a name of letters, digits and _ . - that is none of {', '.join(RESERVED_NAMES)}; found "
            f"the name {name!r}",
        )
        require(path != "", "--eval-prompt-data", value, "NAME=PATH with a path")
        if name in paths:
            raise ValueError(
                f"--eval-prompt-data names {name!r} twice, {paths[name]} and {path}; give one of them another name: "
                "NAME=PATH"
            )
        paths[name] = path
    return paths


def read_evaluation(values: Sequence[str], file_format: FileFormat) -> tuple[dict[str, list[Problem]], tuple[str, ...]]:
    """The evaluation problems of each data set in `values` (see `eval_paths`), and lines for the user.

    Raises ValueError as `read_problem_file` does, and naming the rows of a question that has two ground truths: a
    benchmark is used whole or not at all.
    """
    held_out: dict[str, list[Problem]] = {}
    notes: list[str] = []
    for name, path in eval_paths(values).items():
        found = read_problem_file("--eval-prompt-data", path, file_format)
        if found.contradictions:
            raise ValueError(
                f"--eval-prompt-data {path}: {len(found.contradictions)} questions have more than one ground truth: "
                f"{rows_shown(found)}"
            )
        held_out[name] = found.problems
        notes += [note] if (note := found.note(file_format.dedup_key)) else []
    return held_out, tuple(notes)


def without_contradictions(found: ProblemFile) -> tuple[list[Problem], str | None]:
    """The problems whose question has one ground truth, and a line about the others (None: there are none)."""
    if not found.contradictions:
        return found.problems, None
    left_out = {number for numbers in found.contradictions for number in numbers}
    note = (
        f"{found.name}: {len(found.contradictions)} questions have more than one ground truth, their {len(left_out)} "
        f"problems are left out: {rows_shown(found)}"
    )
    return [kept.problem for kept in found.kept if kept.number not in left_out], note


def rows_shown(found: ProblemFile) -> str:
    """The rows of the first contradictions, for a message."""
    texts = [f"{found.place}s {' and '.join(map(str, numbers))}" for numbers in found.contradictions[:NUM_SHOWN]]
    more = len(found.contradictions) - NUM_SHOWN
    return "; ".join([*texts, f"{more} more"] if more > 0 else texts)


def _from_files(settings: DataSettings, seed: int) -> tuple[ProblemSource, dict[str, list[Problem]], tuple[str, ...]]:
    path, key = settings.prompt_data, settings.dedup_key
    assert path is not None, "a run without a task was parsed without a prompt file"
    file_format = FileFormat(settings.input_key, settings.label_key, settings.deduplicate, key)
    found = read_problem_file("--prompt-data", path, file_format)
    if settings.deduplicate and not found.has_key and key not in ("", DEFAULT_DEDUP_KEY):
        raise ValueError(f"--dedup-key is {key!r}, but no row of --prompt-data {path} has such a value")
    training, contradictions = without_contradictions(found)
    if not training:
        raise ValueError(f"--prompt-data {path} holds no problem to train on: {contradictions}")
    held_out, eval_notes = read_evaluation(settings.eval_prompt_data, file_format)
    for name, problems in held_out.items():
        _check_disjoint(path, training, name, problems)
    notes = [note for note in (found.note(key), contradictions) if note is not None]
    return file_source(path, training, seed, shuffle=settings.rollout_shuffle), held_out, (*notes, *eval_notes)


def _check_disjoint(path: str, training: list[Problem], name: str, held_out: list[Problem]) -> None:
    held_out_uids = {question_key(problem): problem.uid for problem in held_out}
    shared = [problem for problem in training if question_key(problem) in held_out_uids]
    if shared:
        first = shared[0]
        raise ValueError(
            f"--prompt-data {path} and the evaluation data set {name} must share no prompt, but {len(shared)} training "
            f"problems are evaluated on too, the first: {first.uid} = {held_out_uids[question_key(first)]}: "
            f"{question_key(first)[:200]!r}; tools/prepare_data.py convert --without makes a file without them"
        )
