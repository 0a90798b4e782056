"""An engine's answer is believed only when all of it fits the requests."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from megatron_fipo.rollout.answers import (
    BadAnswer,
    generate_payload,
    prefix_payload,
    read_completions,
    read_scores,
    score_payload,
)
from megatron_fipo.types import GenerateRequest, SamplingSettings


def request(uid: str, prompt: list[int], seed: int = 5, length: int = 4) -> GenerateRequest:
    return GenerateRequest(uid, np.asarray(prompt, dtype=np.int64), SamplingSettings(length), seed)


REQUESTS = [request("a/0", [1, 2]), request("a/1", [1, 2]), request("b/0", [3])]


def good_answer() -> list[dict[str, Any]]:
    return [
        {
            "output_ids": ids,
            "meta_info": {
                "finish_reason": {"type": reason},
                "weight_version": "3",
                "weight_versions": [{"version": "3", "start": 0, "end": len(ids)}],
                "output_token_logprobs": [[-0.5 * token, token, None] for token in ids],
            },
        }
        for ids, reason in (([4, 2], "stop"), ([5, 6, 7, 8], "length"), ([9], "stop"))
    ]


def test_completions_come_back_in_request_order() -> None:
    first, second, third = read_completions(REQUESTS, good_answer(), 3)
    assert (first.uid, second.uid, third.uid) == ("a/0", "a/1", "b/0")
    assert first.token_ids.tolist() == [4, 2]
    assert first.token_ids.dtype == np.int64
    assert second.logprobs.tolist() == [-2.5, -3.0, -3.5, -4.0]
    assert second.logprobs.dtype == np.float32
    assert (first.finish_reason, second.finish_reason) == ("stop", "length")
    assert third.weight_version == 3


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("output_ids",), [], "a/1: no token"),
        (("output_ids",), [5, 6, 7, 8, 9], "5 tokens came back, at most 4"),
        (("output_ids",), [5, 6, 7], "4 log-probs do not belong to the 3 tokens"),
        (("output_ids",), None, "output_ids is None"),
        (("meta_info", "output_token_logprobs", 1, 0), None, "log-prob at position 1 is None"),
        (("meta_info", "output_token_logprobs", 2, 0), float("nan"), "log-prob at position 2 is nan"),
        (("meta_info", "output_token_logprobs", 0, 0), float("-inf"), "log-prob at position 0 is -inf"),
        (("meta_info", "output_token_logprobs", 0, 1), 99, "do not belong"),
        (("meta_info", "finish_reason"), {"type": "abort", "message": "x"}, "finished by .*abort"),
        (("meta_info", "weight_version"), "2", "weight version 2, 3, not 3"),
        (("meta_info", "weight_versions", 0, "version"), "2", "weight version 2, 3, not 3"),
        (("meta_info", "weight_version"), "default", "weight version 3, default, not 3"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(path: tuple[Any, ...], value: Any, message: str) -> None:
    answer = copy.deepcopy(good_answer())
    target: Any = answer[1]
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(BadAnswer, match=message):
        read_completions(REQUESTS, answer, 3)


def test_a_missing_answer_is_refused() -> None:
    with pytest.raises(BadAnswer, match="2 answers came back to 3 requests"):
        read_completions(REQUESTS, good_answer()[:2], 3)


def test_all_requests_go_into_one_call_with_their_own_settings() -> None:
    payload = generate_payload(REQUESTS, seeded=True)
    assert payload["input_ids"] == [[1, 2], [1, 2], [3]]
    assert payload["return_logprob"]
    assert payload["sampling_params"][0] == {
        "max_new_tokens": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "sampling_seed": 5,
    }
    assert "sampling_seed" not in generate_payload(REQUESTS, seeded=False)["sampling_params"][0]


def test_only_shared_prompts_are_computed_ahead() -> None:
    payload = prefix_payload(REQUESTS)
    assert payload is not None
    assert payload["input_ids"] == [[1, 2]]
    assert payload["sampling_params"]["max_new_tokens"] == 0
    assert prefix_payload(REQUESTS[1:]) is None


def test_scores_are_aligned_to_the_predicting_position() -> None:
    ids = [np.asarray([4, 5, 6]), np.asarray([7])]
    assert score_payload(ids)["input_ids"] == [[4, 5, 6], [7]]
    answer = [
        {"meta_info": {"input_token_logprobs": [[None, 4, None], [-1.0, 5, None], [-2.0, 6, None]]}},
        {"meta_info": {"input_token_logprobs": [[None, 7, None]]}},
    ]
    first, second = read_scores(ids, answer)
    assert first.tolist() == [-1.0, -2.0, 0.0]
    assert second.tolist() == [0.0]
    answer[0]["meta_info"]["input_token_logprobs"][2][1] = 8
    with pytest.raises(BadAnswer, match="sequence 0"):
        read_scores(ids, answer)
