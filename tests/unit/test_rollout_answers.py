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
    read_checksums,
    read_completions,
    read_scores,
    request_ids,
    score_payload,
)
from megatron_fipo.types import GenerateRequest, SamplingSettings


def request(uid: str, prompt: list[int], seed: int = 5, length: int = 4) -> GenerateRequest:
    return GenerateRequest(uid, np.asarray(prompt, dtype=np.int64), SamplingSettings(length), seed)


REQUESTS = [request("a/0", [1, 2]), request("a/1", [1, 2]), request("b/0", [3])]


IDS = ["c-0", "c-1", "c-2"]
VOCAB_SIZE = 10


def good_answer() -> list[dict[str, Any]]:
    return [
        {
            "output_ids": ids,
            "meta_info": {
                "id": name,
                "finish_reason": reason,
                "prompt_tokens": len(asked.prompt_ids),
                "completion_tokens": len(ids),
                "weight_version": "3",
                "weight_versions": [{"version": "3", "start": 0, "end": len(ids)}],
                "output_token_logprobs": [[-0.5 * token, token, None] for token in ids],
            },
        }
        for asked, name, ids, reason in (
            (REQUESTS[0], "c-0", [4, 2], {"type": "stop", "matched": 2}),
            (REQUESTS[1], "c-1", [5, 6, 7, 8], {"type": "length", "length": 4}),
            (REQUESTS[2], "c-2", [9], {"type": "stop", "matched": 9}),
        )
    ]


def test_completions_come_back_in_request_order() -> None:
    first, second, third = read_completions(REQUESTS, IDS, good_answer(), 3, VOCAB_SIZE)
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
        (("output_ids",), None, "output_ids is 'None'"),
        (("meta_info", "output_token_logprobs", 1, 0), None, "log-prob at position 1 is None"),
        (("meta_info", "output_token_logprobs", 2, 0), float("nan"), "log-prob at position 2 is nan"),
        (("meta_info", "output_token_logprobs", 0, 0), float("-inf"), "log-prob at position 0 is -inf"),
        (("meta_info", "output_token_logprobs", 0, 1), 99, "do not belong"),
        (("meta_info", "finish_reason"), {"type": "abort", "message": "x"}, "finished by .*abort"),
        (("meta_info", "finish_reason"), None, "finish_reason is 'None'"),
        (("meta_info", "finish_reason"), {"type": "length", "length": 3}, "finished by .*nor the length 4"),
        (("meta_info", "finish_reason"), {"type": "stop", "matched": 7}, "finished by .*neither a stop at token 8"),
        (("meta_info", "finish_reason"), {"type": "stop", "matched": "NaN happened"}, "finished by .*NaN happened"),
        (("meta_info", "prompt_tokens"), 3, "prompt_tokens is 3, not 2"),
        (("meta_info", "completion_tokens"), 5, "completion_tokens is 5, not 4"),
        (("meta_info", "weight_version"), "2", "weight version 2, 3, not 3"),
        (("meta_info", "weight_versions", 0, "version"), "2", "weight version 2, 3, not 3"),
        (("meta_info", "weight_version"), "default", "weight version 3, default, not 3"),
        (("meta_info", "weight_versions"), "3", "weight_versions is 3, not a list"),
        (("meta_info", "weight_versions"), ["3"], "is '3', not a mapping"),
        (("meta_info", "output_token_logprobs", 0, 0), "-1", "log-prob at position 0 is -1"),
        (("meta_info", "output_token_logprobs", 0, 0), 0.5, "log-prob at position 0 is 0.5"),
        (("meta_info", "output_token_logprobs", 0, 0), False, "log-prob at position 0 is False"),
        (("meta_info", "output_token_logprobs", 0, 0), -1e31, "log-prob at position 0 is -1e"),
        (("meta_info", "output_token_logprobs", 0, 0), 10**400, "log-prob at position 0 is 1000"),
        (("meta_info", "output_token_logprobs", 0), 7, "a log-prob is 7"),
        (("meta_info", "output_token_logprobs", 0), [], r"a log-prob is \[\]"),
        (("meta_info", "output_token_logprobs", 0, 1), 2**70, "a log-prob is .*1180591620717411303424"),
        (("meta_info", "output_token_logprobs", 0, 1), -5, "a log-prob is .*-5"),
        (("meta_info", "output_token_logprobs"), None, "output_token_logprobs is 'None'"),
        (("meta_info", "id"), "c-0", "answer 1 is about request 'c-0', not 'c-1'"),
        (("meta_info", "id"), None, "answer 1 is about request 'None', not 'c-1'"),
        (("meta_info",), [], "meta_info is"),
        (("output_ids",), {}, "output_ids is"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(path: tuple[Any, ...], value: Any, message: str) -> None:
    answer = copy.deepcopy(good_answer())
    target: Any = answer[1]
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(BadAnswer, match=message):
        read_completions(REQUESTS, IDS, answer, 3, VOCAB_SIZE)


def test_a_token_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(BadAnswer, match="b/0: token 9 came back, but the model has 9"):
        read_completions(REQUESTS, IDS, good_answer(), 3, 9)


def test_a_missing_answer_is_refused() -> None:
    with pytest.raises(BadAnswer, match="2 answers came back to 3 requests"):
        read_completions(REQUESTS, IDS, good_answer()[:2], 3, VOCAB_SIZE)


@pytest.mark.parametrize("answer", [None, "text", 5, [None, None, None], ["a", "b", "c"], {}, [{}, {}, {}]])
def test_what_is_no_answer_at_all_is_refused(answer: Any) -> None:
    with pytest.raises(BadAnswer):
        read_completions(REQUESTS, IDS, answer, 3, VOCAB_SIZE)
    with pytest.raises(BadAnswer):
        read_scores([np.asarray([1])] * 3, IDS, answer, 3)
    with pytest.raises(BadAnswer):
        read_checksums(answer, 1)


def test_an_answer_that_was_given_twice_is_refused() -> None:
    first, second, _ = good_answer()
    with pytest.raises(BadAnswer, match="answer 2 is about request 'c-1', not 'c-2'"):
        read_completions(REQUESTS, IDS, [first, second, second], 3, VOCAB_SIZE)
    with pytest.raises(BadAnswer, match="answer 0 is about request 'c-1'"):
        read_completions(REQUESTS, IDS, [second, first, good_answer()[2]], 3, VOCAB_SIZE)
    assert set(request_ids(3)).isdisjoint(request_ids(3))


def test_checksums_of_every_rank_are_wanted() -> None:
    ranks = [{"checksums": {"w": "ab"}}, {"checksums": {"w": "cd"}}]
    assert read_checksums({"success": True, "ranks": ranks}, 2) == [{"w": "ab"}, {"w": "cd"}]
    for damaged in (ranks[:1], [ranks[0], {}], [ranks[0], {"checksums": {}}], [ranks[0], {"checksums": {"w": 1}}]):
        with pytest.raises(BadAnswer):
            read_checksums({"ranks": damaged}, 2)


def test_all_requests_go_into_one_call_with_their_own_settings() -> None:
    payload = generate_payload(REQUESTS, IDS, seeded=True)
    assert payload["input_ids"] == [[1, 2], [1, 2], [3]]
    assert payload["rid"] == IDS
    assert payload["return_logprob"]
    assert payload["sampling_params"][0] == {
        "max_new_tokens": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "sampling_seed": 5,
    }
    assert "sampling_seed" not in generate_payload(REQUESTS, IDS, seeded=False)["sampling_params"][0]


def test_only_shared_prompts_are_computed_ahead() -> None:
    payload = prefix_payload(REQUESTS)
    assert payload is not None
    assert payload["input_ids"] == [[1, 2]]
    assert payload["sampling_params"]["max_new_tokens"] == 0
    assert prefix_payload(REQUESTS[1:]) is None


def test_scores_are_aligned_to_the_predicting_position() -> None:
    ids = [np.asarray([4, 5, 6]), np.asarray([7])]
    names = ["c-0", "c-1"]
    assert score_payload(ids, names)["input_ids"] == [[4, 5, 6], [7]]

    def meta(name: str, triples: list[list[Any]]) -> dict[str, Any]:
        return {"meta_info": {"id": name, "weight_version": "3", "input_token_logprobs": triples}}

    answer = [meta("c-0", [[None, 4, None], [-1.0, 5, None], [-2.0, 6, None]]), meta("c-1", [[None, 7, None]])]
    first, second = read_scores(ids, names, answer, 3)
    assert first.tolist() == [-1.0, -2.0, 0.0]
    assert second.tolist() == [0.0]
    with pytest.raises(BadAnswer, match="weight version 3, not 4"):
        read_scores(ids, names, answer, 4)
    answer[0]["meta_info"]["input_token_logprobs"][2][1] = 8
    with pytest.raises(BadAnswer, match="sequence 0"):
        read_scores(ids, names, answer, 3)
