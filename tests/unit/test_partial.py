"""Responses that take several steps: what is asked, how pieces join, what waits, and that nothing is lost."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from fake_rollouts import END, ScriptedEngine, calls_of, make_collector, to_prompt, uids

from megatron_fipo.trainer.generation import Response, sampling_seed
from megatron_fipo.trainer.partial import UnfinishedGroup, begun_group, joined, next_requests
from megatron_fipo.trainer.recording import group_to_dict
from megatron_fipo.trainer.sampling import BatchCollector
from megatron_fipo.types import Completion, GenerateRequest, Problem, SamplingSettings

SAMPLING = SamplingSettings(max_response_len=20)


def text_of(uid: str) -> str:
    """`right` or `wrong`, and a tail of dots: three in four responses are short, p0's second takes 17 tokens."""
    rng = random.Random(uid)
    verdict = "right" if int(uid.split("/")[1]) % 2 else "wrong"
    if uid == "p0/1":
        return verdict + "." * 11
    return verdict + "." * (rng.randrange(30) if rng.random() < 0.25 else 0)


def partial_collector(**changes: Any) -> BatchCollector:
    options: dict[str, Any] = {
        "partial_rollout_len": 8,
        "dynamic_sampling": False,
        "sampling": SAMPLING,
        "generation_batch_size": 14,
    }
    return make_collector(ScriptedEngine(text_of), **{**options, **changes})


def collected(collector: BatchCollector, step: int) -> tuple[Any, dict[str, float]]:
    """A step's groups under weights of version step - 1, as in the loop."""
    assert isinstance(collector.generate, ScriptedEngine)
    collector.generate.weight_version = step - 1
    return collector.collect(step)


def ends_within(request: GenerateRequest) -> bool:
    """Whether this piece is the response's last."""
    prompt = to_prompt(Problem("", f"question {request.uid[1:].partition('/')[0]}", "")).token_ids
    so_far = len(request.prompt_ids) - len(prompt)
    return min(len(text_of(request.uid)) + 1, 20) <= so_far + request.sampling.max_response_len


def sample_of(groups: Sequence[Any], uid: str) -> Any:
    return next(sample for group in groups for sample in group.samples if sample.uid == uid)


def test_an_over_long_response_is_continued_in_the_next_steps_under_their_weights() -> None:
    collector = partial_collector(generation_batch_size=20)  # enough groups that no step needs a second batch
    steps = {step: collected(collector, step) for step in (1, 2, 3)}
    assert "p0" not in uids(steps[1][0]) + uids(steps[2][0])
    groups, metrics = steps[3]
    assert uids(groups)[0] == "p0"  # the oldest group comes first once it is finished
    sample = sample_of(groups, "p0/1")
    assert sample.text == "right" + "." * 11
    assert sample.response_ids.tolist() == [*map(ord, sample.text), END]
    assert sample.token_versions.tolist() == [0] * 8 + [1] * 8 + [2]
    versions = np.array([0] * 8 + [1] * 8 + [2])
    assert sample.rollout_logprobs.tolist() == (-(versions + np.arange(17) / 1024).astype(np.float32)).tolist()
    assert (sample.finish_reason, sample.result.accuracy) == ("stop", 1.0)
    short = sample_of(groups, "p0/0")  # waited for the others as it was
    assert set(short.token_versions.tolist()) == {0}
    assert metrics["token_age/max"] == 2.0
    asked = {request.uid: request for request in calls_of(collector)[-1]} | {
        request.uid: request for call in calls_of(collector) for request in call if request.uid == "p0/1"
    }
    last = asked["p0/1"]
    prompt = to_prompt(Problem("p0", "question 0", "")).token_ids
    assert last.prompt_ids.tolist() == [*prompt.tolist(), *sample.response_ids[:16].tolist()]
    assert last.seed == sampling_seed(11, 3, "p0", 1, 16)
    assert last.sampling.max_response_len == 4  # 20 in all


def test_no_call_adds_more_than_the_limit_to_a_response_and_each_continues_all() -> None:
    collector = partial_collector(max_generation_batches=30)
    for step in range(1, 12):
        before = {r.uid for group in collector.unfinished for r in group.responses if r.finish_reason is None}
        first_call = len(calls_of(collector))
        collected(collector, step)
        for call in calls_of(collector)[first_call:]:
            asked = {request.uid for request in call}
            assert len(asked) == len(call)
            assert all(request.sampling.max_response_len <= 8 for request in call)
            assert before <= asked
            goes_on = {request.uid for request in call if not ends_within(request)}
            before = goes_on
        assert before == {r.uid for group in collector.unfinished for r in group.responses if r.finish_reason is None}
        for group in collector.unfinished:
            assert all(len(r.token_ids) in (8, 16) for r in group.responses if r.finish_reason is None)
            # at most ceil(20 / 8) = 3 steps for any response: two behind it, and one to come
            assert min(r.token_versions.min() for r in group.responses) >= step - 2


def test_only_the_full_length_makes_a_response_truncated() -> None:
    collector = partial_collector(max_generation_batches=30)
    samples = [s for step in range(1, 30) for group in collected(collector, step)[0] for s in group.samples]
    for sample in samples:
        whole = [*map(ord, text_of(sample.uid)), END]
        assert sample.response_ids.tolist() == whole[:20]
        assert sample.finish_reason == ("length" if len(whole) > 20 else "stop")
        assert sample.loss_mask.all()
    assert {sample.finish_reason for sample in samples} == {"length", "stop"}
    assert max(len(set(sample.token_versions.tolist())) for sample in samples) == 3


@pytest.mark.parametrize("dynamic_sampling", [False, True])
@pytest.mark.parametrize("resume_at", [(), (2, 5, 6)])
def test_every_sample_drawn_is_trained_on_once_or_uninformative_or_waits(
    dynamic_sampling: bool, resume_at: tuple[int, ...]
) -> None:
    def number(uid: str) -> int:
        return int(uid[1:].partition("/")[0])

    def text(uid: str) -> str:
        return text_of(uid).replace("wrong", "right") if number(uid) % 3 == 0 else text_of(uid)

    def make() -> BatchCollector:
        return make_collector(
            ScriptedEngine(text),
            partial_rollout_len=8,
            dynamic_sampling=dynamic_sampling,
            sampling=SAMPLING,
            max_generation_batches=30,
        )

    collector = make()
    trained: list[Any] = []
    drawn: set[str] = set()
    tokens_drawn = 0.0
    for step in range(1, 16):
        if step in resume_at:
            saved = json.dumps(collector.state_dict())
            engine = collector.generate
            collector = make()
            collector.generate = engine  # it knows where the prompts end; the collector starts from the state alone
            collector.load_state_dict(json.loads(saved))
            assert json.dumps(collector.state_dict()) == saved
        calls = len(calls_of(collector))
        groups, metrics = collected(collector, step)
        trained += groups
        drawn |= {request.uid for call in calls_of(collector)[calls:] for request in call}
        tokens_drawn += metrics["num_generated_tokens"]
    trained_uids = [sample.uid for group in trained for sample in group.samples]
    surplus_uids = [sample.uid for group in collector.surplus for sample in group.samples]
    unfinished_uids = [r.uid for group in collector.unfinished for r in group.responses]
    accounted = trained_uids + surplus_uids + unfinished_uids
    assert len(trained_uids) == 15 * 6 * 4
    assert len(accounted) == len(set(accounted))
    lost = drawn - set(accounted)
    assert {number(uid) % 3 for uid in lost} == ({0} if dynamic_sampling else set())  # the uninformative ones
    assert len(lost) == 4 * len({number(uid) for uid in lost})
    held = sum(len(s.response_ids) for g in [*trained, *collector.surplus] for s in g.samples)
    held += sum(group.num_tokens for group in collector.unfinished)
    held += sum(min(len(text(uid)) + 1, 20) for uid in lost)
    assert tokens_drawn == held


def test_a_resumed_run_goes_on_bit_for_bit_with_unfinished_groups() -> None:
    collector = partial_collector(dynamic_sampling=True)
    for step in (1, 2):
        collected(collector, step)
    assert collector.unfinished
    assert collector.surplus
    saved = json.dumps(collector.state_dict())
    resumed = partial_collector(dynamic_sampling=True)
    resumed.load_state_dict(json.loads(saved))
    assert isinstance(resumed.generate, ScriptedEngine)
    assert isinstance(collector.generate, ScriptedEngine)
    resumed.generate.prompt_lengths = collector.generate.prompt_lengths
    for step in (3, 4, 5):
        (groups, metrics), (again, metrics_again) = collected(collector, step), collected(resumed, step)
        assert metrics_again["num_generated_tokens"] == metrics["num_generated_tokens"]
        for group, other in zip(groups, again, strict=True):
            for a, b in zip(group.samples, other.samples, strict=True):
                assert (a.uid, a.text, a.finish_reason, a.result) == (b.uid, b.text, b.finish_reason, b.result)
                assert a.rollout_logprobs.tobytes() == b.rollout_logprobs.tobytes()
                assert a.token_versions.tobytes() == b.token_versions.tobytes()
                assert (b.loss_mask.dtype, b.token_versions.dtype) == (np.bool_, np.int64)
    assert json.dumps(collector.state_dict()) == json.dumps(resumed.state_dict())


@pytest.mark.parametrize("call", [1, 2])  # of the engines, within the step: it breaks off there
def test_a_step_that_is_abandoned_and_made_again_is_the_step_that_would_have_been(call: int) -> None:
    undisturbed, collector = partial_collector(), partial_collector()
    for one in (undisturbed, collector):
        collected(one, 1)
    position, calls = collector.position(), 0
    generate = collector.generate

    def interrupted(requests: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return generate(requests)

    collector.generate = interrupted
    assert isinstance(generate, ScriptedEngine)
    generate.weight_version = 1
    with contextlib.suppress(KeyboardInterrupt):
        collector.collect(2)
    assert calls >= 1
    collector.go_back(position)
    collector.generate = generate
    for step in (2, 3):
        wanted, found = collected(undisturbed, step), collected(collector, step)
        assert [group_to_dict(group) for group in found[0]] == [group_to_dict(group) for group in wanted[0]]
    assert json.dumps(collector.state_dict()) == json.dumps(undisturbed.state_dict())


def test_the_batch_is_full_and_in_prompt_order_and_few_groups_wait() -> None:
    collector = partial_collector(max_generation_batches=30)
    waiting, batches = [], []
    for step in range(1, 60):
        groups, metrics = collected(collector, step)
        numbers = [int(uid[1:]) for uid in uids(groups)]
        assert numbers == sorted(numbers)
        assert len(numbers) == 6
        left = [int(uid[1:]) for uid in uids(collector.surplus)]
        assert not left or numbers[-1] < min(left)
        waiting.append(metrics["num_surplus_groups"] + metrics["num_unfinished_groups"])
        batches.append(metrics["num_gen_batches"])
    assert max(waiting) <= 40
    assert np.mean(waiting[10:]) <= 12
    assert np.mean(batches) < 3


def test_a_batch_that_needs_unfinished_groups_gets_them_in_the_same_step() -> None:
    collector = partial_collector(partial_rollout_len=2, generation_batch_size=7)
    groups, metrics = collected(collector, 1)
    assert len(groups) == 6
    assert metrics["num_gen_batches"] > 2
    assert all(set(sample.token_versions.tolist()) == {0} for group in groups for sample in group.samples)
    pieces = [request for call in calls_of(collector) for request in call if request.uid == groups[0].samples[0].uid]
    assert len({request.seed for request in pieces}) == len(pieces) > 1


def test_a_step_that_its_generation_batches_do_not_fill_is_an_error_that_names_the_flag() -> None:
    collector = partial_collector(partial_rollout_len=2, max_generation_batches=2)
    with pytest.raises(
        ValueError,
        match=r"after 2 generation batches .* has 0 of 6 groups; .* 14 groups are unfinished. --partial-rollout-len is "
        "2: raise it, or --max-generation-batches",
    ):
        collected(collector, 1)


def test_without_the_flag_an_unfinished_group_of_a_checkpoint_is_finished_in_one_step() -> None:
    collector = partial_collector()
    collected(collector, 1)
    waiting = uids(collector.unfinished)
    assert "p0" in waiting
    resumed = partial_collector(partial_rollout_len=None)
    resumed.load_state_dict(json.loads(json.dumps(collector.state_dict())))
    resumed.generate = collector.generate
    groups, _ = collected(resumed, 2)
    assert set(waiting) - set(uids(resumed.surplus)) <= set(uids(groups))
    assert resumed.unfinished == []
    assert sample_of(groups, "p0/1").token_versions.tolist() == [0] * 8 + [1] * 9


def test_a_state_that_no_step_could_go_on_from_is_refused() -> None:
    collector = partial_collector()
    collected(collector, 1)
    saved = json.loads(json.dumps(collector.state_dict()))
    with pytest.raises(ValueError, match=r"--rollout-max-response-len is 8, but must be > 8"):
        partial_collector(sampling=SamplingSettings(8), partial_rollout_len=None).load_state_dict(saved)
    entry = next(entry["unfinished"] for entry in saved["waiting"] if "unfinished" in entry)
    entry["responses"][0]["loss_mask"].append(1)
    with pytest.raises(ValueError, match="unequal numbers of tokens"):
        partial_collector().load_state_dict(saved)
    del entry["responses"][0]["token_versions"]
    with pytest.raises(ValueError, match="not an unfinished group: KeyError: 'token_versions'"):
        partial_collector().load_state_dict(saved)


@cache
def begun() -> UnfinishedGroup:
    return begun_group(to_prompt(Problem("q", "?", "")), 2)


def piece(uid: str, num_tokens: int, reason: Any, version: int) -> Completion:
    return Completion(uid, np.arange(num_tokens), np.zeros(num_tokens, np.float32), reason, version)


@pytest.mark.parametrize(
    ("num_tokens", "reason", "finish_reason"),
    [
        (5, "length", None),
        (5, "stop", "stop"),  # ended on the last token that was asked for
        (3, "stop", "stop"),
        (3, "length", "length"),  # the engine's own limit: it would give no more
    ],
)
def test_a_response_goes_on_only_when_it_has_all_that_was_asked_and_room_for_more(
    num_tokens: int, reason: str, finish_reason: str | None
) -> None:
    requests = next_requests(begun(), sampling=SAMPLING, partial_len=5, seed=1, step=1)
    group = joined(begun(), {"q/0": (requests[0], piece("q/0", num_tokens, reason, 7))}, 20)
    assert group.responses[0].finish_reason == finish_reason
    assert group.responses[0].token_versions.tolist() == [7] * num_tokens
    assert group.responses[1].finish_reason is None
    assert not group.is_finished


def test_the_last_piece_is_as_long_as_there_is_room() -> None:
    none = begun().responses[0]
    nearly_full = Response("q/0", np.arange(18), np.zeros(18, np.float32), np.ones(18, bool), np.zeros(18, int), None)
    group = UnfinishedGroup(begun().prompt, (nearly_full, none))
    requests = next_requests(group, sampling=SAMPLING, partial_len=5, seed=1, step=1)
    assert [request.sampling.max_response_len for request in requests] == [2, 5]
    full = joined(group, {"q/0": (requests[0], piece("q/0", 2, "length", 1))}, 20)
    assert full.responses[0].finish_reason == "length"
