"""Rank 0's problems, tokenizer and graders: opened, and checked as far as possible, before an engine starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_fipo.arguments import Settings
from megatron_fipo.data import make_sources, tokenize_problem
from megatron_fipo.data.source import ProblemSource
from megatron_fipo.rewards import GraderPool, reward_name
from megatron_fipo.types import Problem, Prompt

NUM_FIRST_CHECKED = 32


@dataclass(frozen=True, eq=False)
class Problems:
    """What a run trains and is evaluated on. A context manager: leaving it ends the grader's processes."""

    source: ProblemSource
    held_out: list[Problem]
    tokenizer: Any
    graders: GraderPool
    apply_chat_template: bool
    max_prompt_len: int

    def prompt(self, problem: Problem) -> Prompt:
        """The problem as token ids. Raises ValueError when they are too many, or none (see `tokenize_problem`)."""
        return tokenize_problem(
            problem, self.tokenizer, apply_chat_template=self.apply_chat_template, max_prompt_len=self.max_prompt_len
        )

    def __enter__(self) -> Problems:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.graders.close()


def open_problems(settings: Settings) -> Problems:
    """Read the data, load the tokenizer, start the graders. Rank 0 only.

    The held-out problems and the first NUM_FIRST_CHECKED of training are tokenized, so that a prompt that cannot be
    used is most often found now. Raises ValueError naming flag or file: unusable data, no tokenizer, no such reward.
    """
    data = settings.data
    source, held_out = make_sources(data, settings.run.seed)
    reward = reward_name(data)
    problems = Problems(
        source,
        held_out,
        _load_tokenizer(settings.run.hf_checkpoint),
        GraderPool(reward, timeout_s=data.reward_timeout_s, memory_bytes=data.reward_memory_mb * 2**20),
        data.apply_chat_template,
        settings.rollout.rollout_max_prompt_len,
    )
    try:
        for problem in [*held_out, *_first(source)]:
            problems.prompt(problem)
    except BaseException:
        problems.graders.close()
        raise
    return problems


def _first(source: ProblemSource) -> list[Problem]:
    """The next problems of a source, which stays where it is."""
    position = source.state_dict()
    first = [source.next_problem() for _ in range(NUM_FIRST_CHECKED)]
    source.load_state_dict(position)
    return first


def _load_tokenizer(directory: str) -> Any:
    from transformers import AutoTokenizer

    if not any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(
            f"--hf-checkpoint is {directory!r}, which holds no tokenizer: tokenizer.json, tokenizer.model or "
            "vocab.json is wanted"
        )
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"the tokenizer in --hf-checkpoint {directory!r} cannot be loaded: {reason[0]}") from error
