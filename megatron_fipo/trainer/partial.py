"""Responses that one step does not finish: what to ask next, how a continuation joins, and their way to JSON and back.

A response is drawn in pieces of at most --partial-rollout-len tokens, one per generation batch, each under its step's
weights and with a seed of its own. Its group waits until all of its responses are finished, and is then graded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_fipo.trainer.generation import Response, response_of, sample_uid, sampling_seed
from megatron_fipo.trainer.recording import bools, prompt_from_dict, prompt_to_dict, require_equal_lengths
from megatron_fipo.types import Completion, GenerateRequest, Prompt, SamplingSettings


@dataclass(frozen=True, eq=False)
class UnfinishedGroup:
    """A prompt and its G responses as far as they were drawn; some of them go on."""

    prompt: Prompt
    responses: tuple[Response, ...]

    @property
    def is_finished(self) -> bool:
        """Whether it can be graded."""
        return all(response.finish_reason is not None for response in self.responses)

    @property
    def num_tokens(self) -> int:
        """Response tokens that it holds."""
        return sum(len(response.token_ids) for response in self.responses)


def begun_group(prompt: Prompt, num_samples: int) -> UnfinishedGroup:
    """A prompt whose responses have no token yet."""
    none = np.zeros(0, dtype=np.int64)
    return UnfinishedGroup(
        prompt,
        tuple(
            Response(
                uid=sample_uid(prompt, i),
                token_ids=none,
                logprobs=none.astype(np.float32),
                loss_mask=none.astype(bool),
                token_versions=none,
                finish_reason=None,
            )
            for i in range(num_samples)
        ),
    )


def next_requests(
    group: UnfinishedGroup, *, sampling: SamplingSettings, partial_len: int | None, seed: int, step: int
) -> list[GenerateRequest]:
    """Requests for the next piece of every response that goes on: its prompt is the group's and what it has so far.

    The piece has at most `partial_len` tokens (None: no such limit) and leads up to `sampling.max_response_len`.
    """
    requests = []
    for i, response in enumerate(group.responses):
        if response.finish_reason is not None:
            continue
        num_drawn = len(response.token_ids)
        rest = sampling.max_response_len - num_drawn
        assert rest > 0, f"{response.uid} is full, and yet unfinished"
        requests.append(
            GenerateRequest(
                uid=response.uid,
                prompt_ids=np.concatenate([group.prompt.token_ids, response.token_ids]),
                sampling=replace(sampling, max_response_len=rest if partial_len is None else min(partial_len, rest)),
                seed=sampling_seed(seed, step, group.prompt.problem.uid, i, num_drawn),
            )
        )
    return requests


def joined(
    group: UnfinishedGroup, answers: Mapping[str, tuple[GenerateRequest, Completion]], max_response_len: int
) -> UnfinishedGroup:
    """The group with the pieces in `answers` (by uid) at the ends of its responses.

    A response goes on if its piece is as long as was asked for, yet the whole is shorter than `max_response_len`.
    """
    return replace(
        group,
        responses=tuple(
            response if response.uid not in answers else _joined(response, *answers[response.uid], max_response_len)
            for response in group.responses
        ),
    )


def unfinished_to_dict(group: UnfinishedGroup) -> dict[str, Any]:
    """The group in JSON types, exactly."""
    responses = [
        {
            "uid": response.uid,
            "token_ids": response.token_ids.tolist(),
            "logprobs": response.logprobs.tolist(),
            "loss_mask": response.loss_mask.astype(int).tolist(),
            "token_versions": response.token_versions.tolist(),
            "finish_reason": response.finish_reason,
        }
        for response in group.responses
    ]
    return {**prompt_to_dict(group.prompt), "responses": responses}


def unfinished_from_dict(data: Mapping[str, Any]) -> UnfinishedGroup:
    """The group that `unfinished_to_dict` wrote, equal in every bit. Raises ValueError for anything else."""
    try:
        return UnfinishedGroup(
            prompt_from_dict(data), tuple(_response_from_dict(response) for response in data["responses"])
        )
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not an unfinished group: {type(error).__name__}: {error}") from error


def _joined(response: Response, request: GenerateRequest, completion: Completion, max_response_len: int) -> Response:
    piece = response_of(completion)
    num_asked, num_drawn = request.sampling.max_response_len, len(piece.token_ids)
    assert num_drawn <= num_asked, (response.uid, num_drawn, num_asked)
    goes_on = (
        piece.finish_reason == "length"
        and num_drawn == num_asked
        and len(response.token_ids) + num_drawn < max_response_len
    )
    return Response(
        uid=response.uid,
        token_ids=np.concatenate([response.token_ids, piece.token_ids]),
        logprobs=np.concatenate([response.logprobs, piece.logprobs]),
        loss_mask=np.concatenate([response.loss_mask, piece.loss_mask]),
        token_versions=np.concatenate([response.token_versions, piece.token_versions]),
        finish_reason=None if goes_on else piece.finish_reason,
    )


def _response_from_dict(data: Mapping[str, Any]) -> Response:
    response = Response(
        uid=data["uid"],
        token_ids=np.array(data["token_ids"], dtype=np.int64),
        logprobs=np.array(data["logprobs"], dtype=np.float32),
        loss_mask=bools(data["loss_mask"]),
        token_versions=np.array(data["token_versions"], dtype=np.int64),
        finish_reason=data["finish_reason"],
    )
    require_equal_lengths(
        response.uid, response.token_ids, response.logprobs, response.loss_mask, response.token_versions
    )
    return response
