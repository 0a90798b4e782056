"""From the data settings to a training source and the evaluation problems, which share no question."""

from __future__ import annotations

from megatron_fipo.config import require
from megatron_fipo.data.arithmetic import small_arithmetic
from megatron_fipo.data.files import file_source, read_problems
from megatron_fipo.data.gym import reasoning_gym_task
from megatron_fipo.data.source import ProblemSource, question_key
from megatron_fipo.data_config import DataSettings
from megatron_fipo.types import Problem


def make_sources(settings: DataSettings, seed: int) -> tuple[ProblemSource, list[Problem]]:
    """The training source and the evaluation problems.

    A task holds its own evaluation problems out of training; they do not depend on `seed`. A prompt file is evaluated
    on --eval-prompt-data, or on nothing when that is not given.

    Raises ValueError for an unknown task or parameter, an unreadable, malformed or empty file, and for files that
    share a question.
    """
    if settings.task is None:
        return _from_files(settings, seed)
    if settings.task == "small_arithmetic":
        require(not settings.task_args, "--task-args", dict(settings.task_args), "empty: small_arithmetic has none")
        return small_arithmetic(seed, settings.num_eval_problems)
    return reasoning_gym_task(settings.task, settings.task_args, seed, settings.num_eval_problems)


def _from_files(settings: DataSettings, seed: int) -> tuple[ProblemSource, list[Problem]]:
    assert settings.prompt_data is not None, "DataSettings allows no run with neither a task nor a prompt file"
    training = read_problems("--prompt-data", settings.prompt_data, settings.input_key, settings.label_key)
    held_out: list[Problem] = []
    if settings.eval_prompt_data is not None:
        held_out = read_problems(
            "--eval-prompt-data", settings.eval_prompt_data, settings.input_key, settings.label_key
        )
        _check_disjoint(settings.prompt_data, training, settings.eval_prompt_data, held_out)
    return file_source(settings.prompt_data, training, seed, shuffle=settings.rollout_shuffle), held_out


def _check_disjoint(training_path: str, training: list[Problem], eval_path: str, held_out: list[Problem]) -> None:
    held_out_uids = {question_key(problem): problem.uid for problem in held_out}
    shared = [problem for problem in training if question_key(problem) in held_out_uids]
    if shared:
        first = shared[0]
        raise ValueError(
            f"--prompt-data {training_path} and --eval-prompt-data {eval_path} must share no prompt, but {len(shared)} "
            f"training problems are evaluated on too, the first: {first.uid} = {held_out_uids[question_key(first)]}: "
            f"{question_key(first)[:200]!r}"
        )
