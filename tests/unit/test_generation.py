"""Requests and verdicts, and the user's own generation: found, awaited, and believed only when all of it fits."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fake_rollouts import CharacterTokenizer, Engine, by_seed, grade_right, make_collector, to_prompt

from megatron_fipo.trainer.custom_generation import checked_completions, custom_generation
from megatron_fipo.trainer.generation import RewardFailed, generate_groups, grade_groups
from megatron_fipo.trainer.rollout_batch import make_train_sequences
from megatron_fipo.types import Completion, GenerateRequest, GraderError, Problem, SamplingSettings
from megatron_fipo.user_function import load_user_function

FLAG = "--custom-generate-function-path"
TOOL = [ord(character) for character in "<42>"]
REQUESTS = [GenerateRequest(f"p/{i}", np.array([1, 2]), SamplingSettings(6), i) for i in range(2)]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An importable module of a user's."""
    made = ModuleType("users_generation")
    monkeypatch.setitem(sys.modules, "users_generation", made)
    return made


def with_a_tool(first: Completion, second: Completion, limit: int) -> Completion:
    """What the policy drew, a tool's answer, and what the policy drew then."""
    ids = np.concatenate([first.token_ids, TOOL, second.token_ids])[:limit]
    mask = np.concatenate([np.ones(len(first.token_ids)), np.zeros(len(TOOL)), np.ones(len(second.token_ids))])
    logprobs = np.concatenate([first.logprobs, np.full(len(TOOL), -9.0), second.logprobs])
    return Completion(
        first.uid,
        ids,
        logprobs[:limit].astype(np.float32),
        "length" if len(ids) == limit else "stop",
        first.weight_version,
        mask[:limit].astype(bool),
    )


def shorter(request: GenerateRequest, length: int) -> GenerateRequest:
    return replace(request, sampling=replace(request.sampling, max_response_len=length))


def two_turns(requests: Sequence[GenerateRequest], generate: Any, tokenizer: Any) -> list[Completion]:
    first = {c.uid: c for c in generate([shorter(request, 5) for request in requests])}
    asked = [
        replace(
            shorter(request, 7), prompt_ids=np.concatenate([request.prompt_ids, first[request.uid].token_ids, TOOL])
        )
        for request in requests
    ]
    second = {c.uid: c for c in generate(asked)}
    return [with_a_tool(first[r.uid], second[r.uid], r.sampling.max_response_len) for r in reversed(requests)]


async def two_turns_async(requests: Sequence[GenerateRequest], generate: Any, tokenizer: Any) -> list[Completion]:
    async def one(request: GenerateRequest) -> Completion:
        (first,) = await generate([shorter(request, 5)])
        await asyncio.sleep(0)
        prompt_ids = np.concatenate([request.prompt_ids, first.token_ids, TOOL])
        (second,) = await generate([replace(shorter(request, 7), prompt_ids=prompt_ids)])
        return with_a_tool(first, second, request.sampling.max_response_len)

    return list(await asyncio.gather(*(one(request) for request in requests)))


@pytest.mark.parametrize("function", [two_turns, two_turns_async])
def test_a_users_function_with_a_tool_runs_from_prompts_to_sequences(module: ModuleType, function: Any) -> None:
    module.rollout = function  # type: ignore[attr-defined]
    engine = Engine(by_seed)
    generate = custom_generation("users_generation:rollout", engine, CharacterTokenizer())
    collector = make_collector(generate, dynamic_sampling=False, rollout_batch_size=3, on_reward_error="drop")
    groups, metrics = collector.collect(step=1)
    sequences = make_train_sequences(groups, older_tokens="mask")
    assert len(sequences) == 12
    assert metrics["num_generated_tokens"] == sum(len(s.response_ids) for g in groups for s in g.samples)
    for group in groups:
        for sample in group.samples:
            assert sample.response_ids[5:9].tolist() == TOOL
            assert sample.loss_mask.tolist() == [True] * 5 + [False] * 4 + [True] * (len(sample.response_ids) - 9)
            assert sample.rollout_logprobs[5:9].tolist() == [0.0] * 4
            assert "<42>" in sample.text
    for sequence in sequences:
        start = len(sequence.token_ids) - 1 - len(sequence.loss_mask[np.argmax(sequence.loss_mask) : -1])
        assert sequence.loss_mask[start : start + 10].tolist() == [True] * 5 + [False] * 4 + [True]
        assert sequence.token_versions[start + 5 : start + 9].tolist() == [-1] * 4
    again = make_collector(generate, dynamic_sampling=False, rollout_batch_size=3).collect(step=1)[0]
    assert [s.text for g in again for s in g.samples] == [s.text for g in groups for s in g.samples]


def good(uid: str = "p/0", **changes: Any) -> Completion:
    whole = Completion(
        uid,
        np.arange(4),
        np.array([-1, -1, -9, -1], np.float32),
        "stop",
        0,
        np.array([True, True, False, True]),
    )
    return replace(whole, **changes)


def test_good_completions_come_back_in_request_order_with_no_logprob_where_nothing_was_drawn() -> None:
    unmasked = np.array([-1, -1, np.nan, -1], np.float64)
    first, second = checked_completions("m:f", REQUESTS, [good("p/1", loss_mask=None), good(logprobs=unmasked)])
    assert (first.uid, second.uid) == ("p/0", "p/1")
    assert first.logprobs.tolist() == [-1, -1, 0, -1]
    assert (first.logprobs.dtype, first.token_ids.dtype) == (np.float32, np.int64)
    assert second.loss_mask is not None
    assert second.loss_mask.all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda: None, "returned a NoneType, but must return a list of Completion"),
        (lambda: [good(), "text"], "a list that holds a str"),
        (lambda: [good()], "returned 1 completions to 2 requests.*missing: p/1, unasked: none"),
        (lambda: [good(), good()], "returned 2 completions.*missing: p/1"),
        (lambda: [good(), good("x")], "missing: p/1, unasked: x"),
        (lambda: [good(), good("p/1"), good("x")], "returned 3 completions to 2 requests"),
    ],
)
def test_completions_that_do_not_answer_the_requests_are_refused(spoil: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{FLAG} m:f.*{message}"):
        checked_completions("m:f", REQUESTS, spoil())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": np.arange(7)}, "it has 7 tokens, but at most 6 are allowed, a tool's included"),
        ({"token_ids": np.zeros((2, 2), int)}, r"token_ids have shape \(2, 2\)"),
        ({"token_ids": np.arange(4.0)}, "token_ids are float64"),
        ({"token_ids": np.array([1, 2, -3, 4])}, "a token id is -3"),
        ({"logprobs": np.zeros(3, np.float32)}, r"logprobs have shape \(3,\), but must be \[4\]"),
        ({"logprobs": np.array([0, np.nan, 0, 0], np.float32)}, "a drawn token is not finite"),
        ({"logprobs": np.array([0, 0, 0, -np.inf], np.float32)}, "a drawn token is not finite"),
        ({"logprobs": np.array([0.5, 0, 0, 0], np.float32)}, r"a log-prob is 0\.5, but must be <= 0"),
        ({"logprobs": np.zeros(4, int)}, "logprobs are int64"),
        ({"loss_mask": np.ones(4, int)}, "loss_mask is int64, but must be bool"),
        ({"loss_mask": np.ones(3, bool)}, r"loss_mask has shape \(3,\)"),
        ({"loss_mask": np.zeros(4, bool)}, "must have drawn at least one token"),
        ({"token_ids": np.zeros(0, int), "logprobs": np.zeros(0, np.float32), "loss_mask": None}, "at least one"),
        ({"finish_reason": "abort"}, "finish_reason is 'abort'"),
        ({"weight_version": None}, "weight_version is None"),
    ],
)
def test_a_completion_that_cannot_be_trained_on_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{FLAG} m:f: completion p/0: .*{message}"):
        checked_completions("m:f", REQUESTS, [good(**changes), good("p/1")])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("users_generation", "must be module:function"),
        (":rollout", "must be module:function"),
        (".users_generation:rollout", "must be module:function"),
        ("users_generation:", "must be module:function"),
        ("no_such_module.at_all:rollout", "the module 'no_such_module.at_all' is not importable"),
        ("users_generation:nothing", "has no function 'nothing'"),
        ("users_generation:number", "has no function 'number'"),
    ],
)
def test_a_function_that_is_not_there_is_named_with_its_flag(module: ModuleType, path: str, message: str) -> None:
    module.number = 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=f"{FLAG} is '{path}', but .*{message}"):
        load_user_function(FLAG, path)


def test_what_a_users_module_cannot_import_itself_is_not_hidden(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import absent_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="absent_dependency"):
        load_user_function(FLAG, "needs_more:rollout")


def test_what_an_async_function_asks_at_once_goes_to_the_engines_together(module: ModuleType) -> None:
    module.rollout = two_turns_async  # type: ignore[attr-defined]
    engine = Engine(by_seed)
    generate = custom_generation("users_generation:rollout", engine, CharacterTokenizer())
    requests = [replace(request, sampling=SamplingSettings(50)) for request in REQUESTS]
    assert [completion.uid for completion in generate(requests)] == ["p/0", "p/1"]
    assert [[request.uid for request in call] for call in engine.calls] == [["p/0", "p/1"], ["p/0", "p/1"]]


def test_requests_of_one_uid_never_meet_in_one_call_and_each_gets_its_own_answer(module: ModuleType) -> None:
    async def rollout(requests: Sequence[GenerateRequest], generate: Any, tokenizer: Any) -> list[Completion]:
        one, more = await asyncio.gather(generate([shorter(requests[0], 3)]), generate(requests))
        assert [len(completion.token_ids) for completion in one] == [3]
        assert [len(completion.token_ids) for completion in more] == [6, 6]
        return more

    module.rollout = rollout  # type: ignore[attr-defined]
    engine = Engine(by_seed)
    custom_generation("users_generation:rollout", engine, CharacterTokenizer())(REQUESTS)
    assert [[request.uid for request in call] for call in engine.calls] == [["p/0"], ["p/0", "p/1"]]


def test_a_task_that_gives_up_waiting_holds_up_no_other(module: ModuleType) -> None:
    async def rollout(requests: Sequence[GenerateRequest], generate: Any, tokenizer: Any) -> list[Completion]:
        impatient = asyncio.create_task(generate(requests[:1]))
        patient = asyncio.create_task(generate(requests[1:]))
        await asyncio.sleep(0)
        impatient.cancel()
        with pytest.raises(ValueError, match="two share a uid"):
            await generate([requests[0], requests[0]])
        return [*await generate(requests[:1]), *await patient]

    module.rollout = rollout  # type: ignore[attr-defined]
    generate = custom_generation("users_generation:rollout", Engine(by_seed), CharacterTokenizer())
    assert [completion.uid for completion in generate(REQUESTS)] == ["p/0", "p/1"]


def test_an_engines_failure_reaches_every_caller_of_an_async_function(module: ModuleType) -> None:
    async def rollout(requests: Sequence[GenerateRequest], generate: Any, tokenizer: Any) -> list[Completion]:
        raised = await asyncio.gather(*(generate([request]) for request in requests), return_exceptions=True)
        assert [str(error) for error in raised] == ["engine lost"] * 2
        raise raised[0]

    def lost(requests: Sequence[GenerateRequest]) -> list[Completion]:
        raise RuntimeError("engine lost")

    module.rollout = rollout  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="engine lost"):
        custom_generation("users_generation:rollout", lost, CharacterTokenizer())(REQUESTS)


def test_an_error_of_the_users_function_reaches_the_caller(module: ModuleType) -> None:
    async def rollout(*_: Any) -> list[Completion]:
        raise KeyError("tool")

    module.rollout = rollout  # type: ignore[attr-defined]
    generate = custom_generation("users_generation:rollout", Engine(by_seed), CharacterTokenizer())
    with pytest.raises(KeyError, match="tool"):
        generate(REQUESTS)


def test_reward_errors_fail_or_stay_as_told() -> None:
    prompts = [to_prompt(Problem("p", "question", "right"))]
    completions = generate_groups(prompts, Engine(by_seed), sampling=SamplingSettings(9), num_samples=3, seed=1, step=1)

    def grade(*arguments: Any) -> list[Any]:
        return [*grade_right(*arguments)[:-1], GraderError("crash", "signal 9")]

    with pytest.raises(RewardFailed, match=r"problem p \(sample p/2\): crash: signal 9.*--on-reward-error drop"):
        grade_groups(prompts, completions, CharacterTokenizer(), grade, on_error="fail")
    (group,) = grade_groups(prompts, completions, CharacterTokenizer(), grade, on_error="drop")
    assert group.samples[2].result == GraderError("crash", "signal 9")
    assert group.samples[2].reward == 0.0
    assert group.samples[2].loss_mask.all()
    assert grade_groups([], [], CharacterTokenizer(), grade, on_error="fail") == []
