"""Rank 0's problems, tokenizer and graders: opened, and checked as far as possible, before an engine starts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from megatron_fipo.arguments import Settings
from megatron_fipo.config import require
from megatron_fipo.data import make_sources
from megatron_fipo.data.prompts import PromptEncoder, PromptFormat, PromptTooLong, fitting_prompt
from megatron_fipo.data.source import ProblemSource, SeededSource
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.data_config import OnLongPrompt
from megatron_fipo.rewards import GraderPool, reward_name
from megatron_fipo.types import Problem, Prompt

NUM_FIRST_CHECKED = 32  # of a task, which has no end
COMPARING_REWARDS = ("dapo_math", "exact", "math_verify", "small_arithmetic")
MAX_CHECKED = 50_000  # of a file: about 15 s


@dataclass(frozen=True, eq=False)
class Problems:
    """What a run trains and is evaluated on. A context manager: leaving it ends the grader's processes.

    `held_out` has the evaluation problems of each data set by its name, none when there is no evaluation. `notes` are
    lines for the user about what was found in the data.
    """

    source: ProblemSource
    held_out: Mapping[str, list[Problem]]
    tokenizer: Any
    graders: GraderPool
    encoder: PromptEncoder
    max_prompt_len: int
    on_long_prompt: OnLongPrompt
    notes: tuple[str, ...] = ()
    _counts: dict[str, int] = field(default_factory=lambda: {"num_prompts_skipped": 0, "num_prompts_truncated": 0})

    def prompt(self, problem: Problem) -> Prompt | None:
        """The problem as token ids; None when it has more than `max_prompt_len` and such problems are left out.

        Raises ValueError when it cannot be rendered (see `PromptEncoder.encode`), and PromptTooLong when it has too
        many tokens and may neither be left out nor cut.
        """
        ids = self.encoder.encode(problem)
        if len(ids) > self.max_prompt_len:
            if self.on_long_prompt == "skip":
                self._counts["num_prompts_skipped"] += 1
                return None
            is_training = id(problem) not in self._held_out_ids
            self._counts["num_prompts_truncated"] += is_training and self.on_long_prompt == "truncate-left"
        return fitting_prompt(problem, ids, self.max_prompt_len, truncate=self.on_long_prompt == "truncate-left")

    def prompt_counts(self) -> dict[str, int]:
        """How often `prompt` left a training problem out, and cut one, since the start."""
        return dict(self._counts)

    @functools.cached_property
    def _held_out_ids(self) -> frozenset[int]:
        return frozenset(id(problem) for problems in self.held_out.values() for problem in problems)

    def __enter__(self) -> Problems:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.graders.close()


def open_problems(settings: Settings) -> Problems:
    """Read the data, load the tokenizer, start the graders. Rank 0 only.

    The held-out problems and those of training (of a file all, up to MAX_CHECKED; of a task the first
    NUM_FIRST_CHECKED) are tokenized, so that a prompt that cannot be used is found now. Raises ValueError naming flag
    or file: unusable data, no tokenizer, no such reward, prompts that are too long where that is an error.
    """
    data = settings.data
    source, held_out, encoder, notes = read_problems(settings)
    return Problems(
        source,
        held_out,
        encoder.tokenizer,
        GraderPool(reward_name(data), timeout_s=data.reward_timeout_s, memory_bytes=data.reward_memory_mb * 2**20),
        encoder,
        settings.rollout.rollout_max_prompt_len,
        data.on_long_prompt,
        notes,
    )


def read_problems(
    settings: Settings,
) -> tuple[ProblemSource, dict[str, list[Problem]], PromptEncoder, tuple[str, ...]]:
    """What `open_problems` finds before it starts the graders: source, held_out, encoder and notes of `Problems`."""
    data = settings.data
    source, held_out, notes = make_sources(data, settings.run.seed)
    require_ground_truths(reward_name(data), source, held_out)
    tokenizer = load_tokenizer(settings.run.hf_checkpoint)
    encoder = PromptEncoder(tokenizer, PromptFormat(data.apply_chat_template, data.prompt_template, data.system_prompt))
    length_notes = check_prompts(
        encoder, source, held_out, settings.rollout.rollout_max_prompt_len, data.on_long_prompt
    )
    return source, held_out, encoder, (*notes, *length_notes)


def require_ground_truths(reward: str, source: ProblemSource, held_out: Mapping[str, Sequence[Problem]]) -> None:
    """Raise ValueError when a reward that compares with the ground truth is to compare with a blank one.

    It would call a blank answer right. A judge of the user's own may do without.
    """
    if reward not in COMPARING_REWARDS:
        return
    training, _ = _checkable(source)
    blank = [
        problem.uid
        for problems in (training, *held_out.values())
        for problem in problems
        if not problem.ground_truth.strip()
    ]
    require(
        not blank,
        "--label-key",
        ", ".join(blank[:3]),
        f"a column without blanks: {len(blank)} problems have no ground truth for {reward}",
    )


def check_prompts(
    encoder: PromptEncoder,
    source: ProblemSource,
    held_out: Mapping[str, Sequence[Problem]],
    max_prompt_len: int,
    on_long_prompt: OnLongPrompt,
) -> tuple[str, ...]:
    """Tokenize what can be known of a run's prompts; lines for the user about those that are too long.

    Raises ValueError for a prompt that cannot be rendered, and PromptTooLong for long ones under `error`, for a long
    evaluation prompt under `skip` (a benchmark is used whole), and when no training prompt would be left.
    """
    notes: list[str] = []
    for name, problems in held_out.items():
        too_long = _too_long(encoder, problems, max_prompt_len)
        if too_long and on_long_prompt != "truncate-left":
            raise PromptTooLong(
                f"evaluation data set {name}: {_described(too_long, len(problems), max_prompt_len)}; evaluation "
                "problems are never left out: raise it, or cut them with --on-long-prompt truncate-left"
            )
        if too_long:
            notes.append(
                f"evaluation data set {name}: {_described(too_long, len(problems), max_prompt_len)}: truncated"
            )
    training, extent = _checkable(source)
    too_long = _too_long(encoder, training, max_prompt_len)
    if too_long:
        described = f"training{extent}: {_described(too_long, len(training), max_prompt_len)}"
        if on_long_prompt == "error":
            raise PromptTooLong(f"{described}; raise it, or choose --on-long-prompt skip or truncate-left")
        if on_long_prompt == "skip" and len(too_long) == len(training):
            raise PromptTooLong(f"{described}, so --on-long-prompt skip leaves none to train on")
        notes.append(f"{described}: {'left out' if on_long_prompt == 'skip' else 'truncated'}")
    return tuple(notes)


def _checkable(source: ProblemSource) -> tuple[Sequence[Problem], str]:
    """All problems of a file, or the next ones of a source without end, which stays where it is; and a word for it."""
    if isinstance(source, SeededSource) and source.problems is not None:
        if len(source.problems) <= MAX_CHECKED:
            return source.problems, ""
        return source.problems[:MAX_CHECKED], f", the first {MAX_CHECKED} problems of {len(source.problems)}"
    position = source.state_dict()
    first = [source.next_problem() for _ in range(NUM_FIRST_CHECKED)]
    source.load_state_dict(position)
    return first, f", the first {NUM_FIRST_CHECKED} problems"


def _too_long(encoder: PromptEncoder, problems: Sequence[Problem], max_prompt_len: int) -> list[tuple[Problem, int]]:
    """The problems of more tokens than that, with how many they have."""
    lengths = ((problem, len(encoder.encode(problem))) for problem in problems)
    return [(problem, length) for problem, length in lengths if length > max_prompt_len]


def _described(too_long: Sequence[tuple[Problem, int]], num_problems: int, max_prompt_len: int) -> str:
    problem, length = max(too_long, key=lambda entry: entry[1])
    return (
        f"{len(too_long)} of {num_problems} prompts have more tokens than --rollout-max-prompt-len ({max_prompt_len}), "
        f"the longest {length}: problem {problem.uid}"
    )
