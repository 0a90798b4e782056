"""What stands for tokenizer, engine, grader and problems where a rollout batch is collected without any of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_fipo.data.source import SeededSource
from megatron_fipo.trainer.sampling import BatchCollector, CollectorSettings
from megatron_fipo.types import (
    Completion,
    GenerateRequest,
    Group,
    Problem,
    Prompt,
    RewardResult,
    SamplingSettings,
)

END = 0  # the end-of-turn token


class CharacterTokenizer:
    """One token per character; token 0 ends the turn."""

    chat_template = None
    bos_token = None
    added_tokens_decoder: Mapping[int, Any] = {}

    def encode(self, text: str, **options: Any) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return "".join(chr(token) for token in token_ids if token != END)

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str:
        raise AssertionError("plain prompts only")


@dataclass
class Engine:
    """Answers `right` or `wrong` as `is_right(request)` says, then dots up to a length drawn from the seed; gives the
    answers in the order in which they finish. Remembers what it was asked."""

    is_right: Callable[[GenerateRequest], bool]
    weight_version: int = 0

    def __post_init__(self) -> None:
        self.calls: list[list[GenerateRequest]] = []

    def __call__(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.calls.append(list(requests))
        completions = []
        for request in requests:
            rng = random.Random(request.seed)
            text = ("right" if self.is_right(request) else "wrong") + "." * int(rng.paretovariate(0.7))
            ids = [*map(ord, text), END][: request.sampling.max_response_len]
            logprobs = np.array([-rng.random() for _ in ids], dtype=np.float32)
            reason = "stop" if ids[-1] == END else "length"
            completions.append(Completion(request.uid, np.array(ids), logprobs, reason, self.weight_version))
        return sorted(completions, key=lambda completion: len(completion.token_ids))


class ScriptedEngine:
    """Draws the text that `text_of(uid)` holds, END after it, from where the request's prompt leaves off.

    A token's log-prob is -(version + its place / 1024), so that it tells who drew it and where.
    """

    def __init__(self, text_of: Callable[[str], str]) -> None:
        self.text_of = text_of
        self.weight_version = 0
        self.calls: list[list[GenerateRequest]] = []
        self.prompt_lengths: dict[str, int] = {}

    def __call__(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.calls.append(list(requests))
        completions = [self._completion(request) for request in requests]
        return sorted(completions, key=lambda completion: len(completion.token_ids))

    def _completion(self, request: GenerateRequest) -> Completion:
        script = np.array([*map(ord, self.text_of(request.uid)), END])
        start = len(request.prompt_ids) - self.prompt_lengths.setdefault(request.uid, len(request.prompt_ids))
        assert request.prompt_ids[len(request.prompt_ids) - start :].tolist() == script[:start].tolist(), request.uid
        ids = script[start : start + request.sampling.max_response_len]
        logprobs = -(self.weight_version + np.arange(start, start + len(ids)) / 1024).astype(np.float32)
        reason = "stop" if ids[-1] == END else "length"
        return Completion(request.uid, ids, logprobs, reason, self.weight_version)


def grade_right(
    responses: Sequence[str], ground_truths: Sequence[str], extras: Sequence[Mapping[str, Any]]
) -> list[RewardResult]:
    assert all(extra["finish_reason"] in ("stop", "length") for extra in extras)
    right = [float(response.startswith(truth)) for response, truth in zip(responses, ground_truths)]
    return [RewardResult(value, value, "right" if value else None) for value in right]


def by_seed(request: GenerateRequest) -> bool:
    return random.Random(request.seed + 1).random() < 0.15


def every_third_prompt_is_mixed(request: GenerateRequest) -> bool:
    """Prompt 0 has all right, 1 is mixed, 2 all wrong, and so on."""
    problem, sample = request.uid.split("/")
    kind = int(problem.removeprefix("p")) % 3
    return kind == 0 or (kind == 1 and int(sample) % 2 == 0)


SETTINGS = CollectorSettings(
    seed=11,
    rollout_batch_size=6,
    n_samples_per_prompt=4,
    generation_batch_size=8,
    max_generation_batches=10,
    dynamic_sampling=True,
    sampling=SamplingSettings(max_response_len=200),
    overlong_buffer_len=None,
    overlong_penalty_factor=1.0,
    on_reward_error="fail",
    partial_rollout_len=None,
)


def numbered_source() -> SeededSource:
    return SeededSource("numbered", lambda k: Problem(f"p{k}", f"question {k}", "right", extra={"number": k}))


def to_prompt(problem: Problem) -> Prompt:
    assert isinstance(problem.prompt, str)
    return Prompt(problem, np.array(CharacterTokenizer().encode(problem.prompt), dtype=np.int64))


def make_collector(
    generate: Callable[[Sequence[GenerateRequest]], Sequence[Completion]] | None = None,
    *,
    grader: Any = grade_right,
    to_prompt: Callable[[Problem], Prompt | None] = to_prompt,
    **changes: Any,
) -> BatchCollector:
    """A collector over numbered problems; its clock ticks once per look."""
    ticks = itertools.count()
    return BatchCollector(
        numbered_source(),
        Engine(by_seed) if generate is None else generate,
        CharacterTokenizer(),
        grader,
        replace(SETTINGS, **changes),
        to_prompt=to_prompt,
        clock=lambda: float(next(ticks)),
    )


def calls_of(collector: BatchCollector) -> list[list[GenerateRequest]]:
    assert isinstance(collector.generate, (Engine, ScriptedEngine))
    return collector.generate.calls


def uids(groups: Sequence[Group]) -> list[str]:
    return [group.prompt.problem.uid for group in groups]
