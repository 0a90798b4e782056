"""A run's prompts, checked at the start: what is too long is refused, left out or cut, and counted."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_fipo.data.files import file_source
from megatron_fipo.data.prompts import PromptEncoder, PromptFormat
from megatron_fipo.data.source import SeededSource
from megatron_fipo.data_config import OnLongPrompt
from megatron_fipo.problems import NUM_FIRST_CHECKED, Problems, check_prompts, require_ground_truths
from megatron_fipo.types import Problem


class Characters:
    """A tokenizer of one token per character."""

    chat_template = None
    bos_token = None
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(character) for character in text]


ENCODER = PromptEncoder(Characters(), PromptFormat())  # type: ignore[arg-type]


def problems_of(*lengths: int) -> list[Problem]:
    return [Problem(f"f:{i}", ("abcdefgh" * 9)[:length], "") for i, length in enumerate(lengths)]


def opened(training: list[Problem], held_out: list[Problem], on_long_prompt: OnLongPrompt, limit: int = 5) -> Problems:
    source = file_source("f", training, 1, shuffle=False)
    sets = {"bench": held_out}
    notes = check_prompts(ENCODER, source, sets, limit, on_long_prompt)
    return Problems(source, sets, ENCODER.tokenizer, None, ENCODER, limit, on_long_prompt, notes)  # type: ignore[arg-type]


def test_a_long_prompt_far_down_a_file_is_found_at_the_start() -> None:
    message = (
        r"^training: 2 of 102 prompts have more tokens than --rollout-max-prompt-len \(5\), the longest 7: "
        "problem f:101; raise it, or choose --on-long-prompt skip or truncate-left"
    )
    with pytest.raises(ValueError, match=message):
        opened(problems_of(*[5] * 100, 6, 7), [], "error")
    assert opened(problems_of(*[5] * 100), [], "error").notes == ()


def test_long_prompts_are_left_out_by_choice_and_counted() -> None:
    training = problems_of(5, 6, 7)
    problems = opened(training, problems_of(5), "skip")
    assert problems.notes == (
        "training: 2 of 3 prompts have more tokens than --rollout-max-prompt-len (5), the longest 7: problem f:2: "
        "left out",
    )
    assert problems.prompt_counts() == {"num_prompts_skipped": 0, "num_prompts_truncated": 0}
    prompts = [problems.prompt(problem) for problem in training * 2]
    assert [prompt is None for prompt in prompts] == [False, True, True] * 2
    assert problems.prompt_counts() == {"num_prompts_skipped": 4, "num_prompts_truncated": 0}


def test_long_prompts_lose_their_beginning_by_choice_and_are_counted() -> None:
    training, held_out = problems_of(5, 7), problems_of(8)
    problems = opened(training, held_out, "truncate-left")
    assert [note.rpartition(": ")[2] for note in problems.notes] == ["truncated", "truncated"]
    texts = ["".join(map(chr, problems.prompt(problem).token_ids)) for problem in [*training, *held_out]]  # type: ignore[union-attr]
    assert texts == ["abcde", "cdefg", "defgh"]
    assert problems.prompt_counts() == {"num_prompts_skipped": 0, "num_prompts_truncated": 1}  # training's alone


@pytest.mark.parametrize("on_long_prompt", ["error", "skip"])
def test_a_benchmark_is_never_cut_short(on_long_prompt: OnLongPrompt) -> None:
    with pytest.raises(
        ValueError,
        match=r"^evaluation data set bench: 1 of 2 prompts .*; evaluation problems are never left out: raise",
    ):
        opened(problems_of(5), problems_of(5, 6), on_long_prompt)


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"2 of 2 prompts .*, so --on-long-prompt skip leaves none to train on"):
        opened(problems_of(6, 7), [], "skip")


def test_of_an_endless_source_the_first_are_checked_and_it_stays_where_it_is() -> None:
    drawn: list[int] = []

    def problem_at(k: int) -> Problem:
        drawn.append(k)
        return Problem(str(k), "x" * (3 + (k == 31)), "")

    source = SeededSource("endless", problem_at)
    (note,) = check_prompts(ENCODER, source, {}, 3, "skip")
    assert note.startswith("training, the first 32 problems: 1 of 32 prompts have more tokens")
    assert drawn == list(range(NUM_FIRST_CHECKED))
    assert source.next_problem().uid == "0"


def test_a_blank_ground_truth_is_refused_where_a_reward_compares_with_it() -> None:
    training = [Problem("f:1", "a", "4"), Problem("f:2", "b", " ")]
    source = file_source("f", training, 1, shuffle=False)
    with pytest.raises(ValueError, match=r"--label-key is 'f:2', .*1 problems have no ground truth for dapo_math"):
        require_ground_truths("dapo_math", source, {})
    with pytest.raises(ValueError, match=r"--label-key is 'f:0'"):
        require_ground_truths("exact", file_source("f", training[:1], 1, shuffle=False), {"bench": problems_of(3)})
    require_ground_truths("own:judge", source, {})
    require_ground_truths("reasoning_gym", source, {})
