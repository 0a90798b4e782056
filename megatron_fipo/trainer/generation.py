"""From prompts to graded groups: requests with their seeds, what came back to them, and the verdicts.

Engine, tokenizer and grader are arguments, so that tests need none of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from megatron_fipo.data.prompts import Tokenizer
from megatron_fipo.data_config import OnRewardError
from megatron_fipo.types import (
    Completion,
    FinishReason,
    GenerateRequest,
    GraderError,
    Group,
    Prompt,
    RewardResult,
    Sample,
    SamplingSettings,
)

Generate = Callable[[Sequence[GenerateRequest]], Sequence[Completion]]
"""Draws one response per request; their order is free, the uid says which is which."""
Grader = Callable[[Sequence[str], Sequence[str], Sequence[Mapping[str, object]]], Sequence[RewardResult | GraderError]]
"""(responses, ground truths, extras) -> verdicts in the same order; GraderPool.grade is one."""


class RewardFailed(ValueError):
    """A grader gave no verdict on a response. It is never taken for a wrong answer."""


@dataclass(frozen=True, eq=False)
class Response:
    """What has been drawn of one sample so far, in one step or several. `finish_reason` None: it goes on."""

    uid: str
    token_ids: np.ndarray  # [R] int64
    logprobs: np.ndarray  # [R] fp32
    loss_mask: np.ndarray  # [R] bool
    token_versions: np.ndarray  # [R] int64
    finish_reason: FinishReason | None


def response_of(completion: Completion) -> Response:
    """A completion as a response that is finished; all its tokens are of one version."""
    num_tokens = len(completion.token_ids)
    assert completion.logprobs.shape == (num_tokens,), (completion.uid, completion.logprobs.shape, num_tokens)
    mask = np.ones(num_tokens, dtype=bool) if completion.loss_mask is None else completion.loss_mask
    assert mask.shape == (num_tokens,), (completion.uid, mask.shape, num_tokens)
    return Response(
        uid=completion.uid,
        token_ids=completion.token_ids.astype(np.int64),
        logprobs=completion.logprobs.astype(np.float32),
        loss_mask=mask,
        token_versions=np.full(num_tokens, completion.weight_version, dtype=np.int64),
        finish_reason=completion.finish_reason,
    )


def generate_groups(
    prompts: Sequence[Prompt], generate: Generate, *, sampling: SamplingSettings, num_samples: int, seed: int, step: int
) -> list[list[Completion]]:
    """`num_samples` completions of every prompt, [prompt][sample], however the engine orders its answers."""
    requests = [
        GenerateRequest(
            uid=sample_uid(prompt, i),
            prompt_ids=prompt.token_ids,
            sampling=sampling,
            seed=sampling_seed(seed, step, prompt.problem.uid, i),
        )
        for prompt in prompts
        for i in range(num_samples)
    ]
    completions = answers_to(requests, generate)
    return [completions[start : start + num_samples] for start in range(0, len(completions), num_samples)]


def answers_to(requests: Sequence[GenerateRequest], generate: Generate) -> list[Completion]:
    """One completion per request, in their order."""
    wanted = [request.uid for request in requests]
    assert len(set(wanted)) == len(wanted), "two requests share a uid"
    answers = generate(requests)
    completions = {completion.uid: completion for completion in answers}
    assert len(answers) == len(completions) == len(wanted), (len(answers), len(completions), len(wanted))
    assert completions.keys() == set(wanted), completions.keys() ^ set(wanted)
    return [completions[uid] for uid in wanted]


def sample_uid(prompt: Prompt, sample_index: int) -> str:
    """The uid of a prompt's sample, and of the request for it."""
    return f"{prompt.problem.uid}/{sample_index}"


def sampling_seed(seed: int, step: int, problem_uid: str, sample_index: int, num_drawn: int = 0) -> int:
    """The 31-bit seed of one request, a hash of all five; `num_drawn` tokens of the response are there already."""
    key = json.dumps([seed, step, problem_uid, sample_index, *([num_drawn] if num_drawn else [])]).encode()
    return int.from_bytes(sha256(key).digest()[:4]) & 0x7FFFFFFF


def grade_groups(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    tokenizer: Tokenizer,
    grader: Grader,
    *,
    on_error: OnRewardError,
) -> list[Group]:
    """The completions [prompt][sample] as graded groups; see `grade_responses`."""
    responses = [[response_of(completion) for completion in row] for row in completions]
    return grade_responses(prompts, responses, tokenizer, grader, on_error=on_error)


def grade_responses(
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[Response]],
    tokenizer: Tokenizer,
    grader: Grader,
    *,
    on_error: OnRewardError,
) -> list[Group]:
    """Finished responses [prompt][sample], decoded and graded. The reward is the score.

    A reward is given the problem's `extra` and `finish_reason`. Where it gives no verdict, `on_error` (as
    --on-reward-error) "fail" raises RewardFailed; "drop" leaves the GraderError as the sample's result.
    """
    pairs = [(prompt, response) for prompt, row in zip(prompts, responses, strict=True) for response in row]
    if not pairs:
        return []
    texts = [tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=True) for _, response in pairs]
    results = grader(
        texts,
        [prompt.problem.ground_truth for prompt, _ in pairs],
        [{**prompt.problem.extra, "finish_reason": response.finish_reason} for prompt, response in pairs],
    )
    samples = []
    for (prompt, response), text, result in zip(pairs, texts, results, strict=True):
        if on_error == "fail" and isinstance(result, GraderError):
            raise RewardFailed(
                f"the reward failed on problem {prompt.problem.uid} (sample {response.uid}): {result.kind}: "
                f"{result.message}; the response begins {text[:100]!r}. --on-reward-error drop learns nothing from "
                "such a response and goes on"
            )
        assert response.finish_reason is not None, f"{response.uid} is graded before it is finished"
        samples.append(
            Sample(
                uid=response.uid,
                response_ids=response.token_ids,
                rollout_logprobs=response.logprobs,
                loss_mask=response.loss_mask,
                token_versions=response.token_versions,
                finish_reason=response.finish_reason,
                text=text,
                result=result,
                reward=0.0 if isinstance(result, GraderError) else result.score,
            )
        )
    remaining = iter(samples)
    return [Group(prompt, tuple(next(remaining) for _ in row)) for prompt, row in zip(prompts, responses)]
