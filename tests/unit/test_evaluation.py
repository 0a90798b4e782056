"""Evaluation with a fake engine: what is drawn, what is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from megatron_fipo.trainer.evaluation import Example, evaluate
from megatron_fipo.trainer.sampling import RewardFailed
from megatron_fipo.types import (
    Completion,
    GenerateRequest,
    GraderError,
    Problem,
    Prompt,
    RewardResult,
    SamplingSettings,
)

PROMPTS = [Prompt(Problem(f"p{i}", f"{i}?", str(i)), np.array([ord(str(i)), ord("?")])) for i in range(6)]


class CharacterTokenizer:
    chat_template = None
    bos_token = None
    added_tokens_decoder: Mapping[int, Any] = {}

    def encode(self, text: str, **options: Any) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        return "".join(chr(token) for token in token_ids if token)

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str:
        raise AssertionError("prompts come tokenised")


def generate(requests: Sequence[GenerateRequest]) -> list[Completion]:
    """Sample 0 repeats the question's digit and ends; sample 1 says 0 and goes on to the limit."""
    completions = []
    for request in requests:
        if request.uid.endswith("/0"):
            ids, reason = [int(request.prompt_ids[0]), 0], "stop"
        else:
            ids, reason = [ord("0")] * request.sampling.max_response_len, "length"
        logprobs = np.zeros(len(ids), np.float32)
        completions.append(Completion(request.uid, np.array(ids), logprobs, reason, 0))  # type: ignore[arg-type]
    return completions[::-1]


def grade(responses: Sequence[str], truths: Sequence[str], _: Any) -> list[RewardResult]:
    return [
        RewardResult(2.0 if response == truth else -1.0, float(response == truth), response)
        for response, truth in zip(responses, truths)
    ]


def test_every_response_counts_once_in_the_order_of_the_problems() -> None:
    sampling = SamplingSettings(max_response_len=5, temperature=0.0)
    result = evaluate(PROMPTS, generate, CharacterTokenizer(), grade, sampling=sampling, n_samples=2, seed=3)
    assert result.accuracies.tolist() == [[1.0, 0.0]] * 6
    assert result.accuracy == 0.5
    assert result.score == 0.5
    assert result.response_length == 3.5
    assert result.truncated_fraction == 0.5
    assert result.examples == tuple(Example(f"p{i}/0", f"{i}?", str(i), str(i), 1.0) for i in range(4))
    assert result.metrics() == {
        "eval/accuracy": 0.5,
        "eval/score/mean": 0.5,
        "eval/response_length/mean": 3.5,
        "eval/response_length/truncated_fraction": 0.5,
    }


def test_two_evaluations_draw_with_the_same_seeds() -> None:
    asked: list[list[GenerateRequest]] = []

    def remember(requests: Sequence[GenerateRequest]) -> list[Completion]:
        asked.append(list(requests))
        return generate(requests)

    sampling = SamplingSettings(max_response_len=5, temperature=1.0, top_p=0.7)
    for seed in (3, 3, 4):
        evaluate(PROMPTS, remember, CharacterTokenizer(), grade, sampling=sampling, n_samples=2, seed=seed)
    first, second, other = ([request.seed for request in requests] for requests in asked)
    assert first == second
    assert len({*first, *other}) == 24
    assert all(request.sampling == sampling for requests in asked for request in requests)


def test_nothing_to_evaluate_on_and_a_failed_reward_are_errors() -> None:
    sampling = SamplingSettings(max_response_len=5)
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        evaluate([], generate, CharacterTokenizer(), grade, sampling=sampling, n_samples=1, seed=3)

    def fail(responses: Sequence[str], *_: Any) -> list[GraderError]:
        return [GraderError("timeout", "no verdict after 1 s") for _ in responses]

    with pytest.raises(RewardFailed, match=r"problem p0 .*: timeout: no verdict after 1 s"):
        evaluate(PROMPTS, generate, CharacterTokenizer(), fail, sampling=sampling, n_samples=1, seed=3)
