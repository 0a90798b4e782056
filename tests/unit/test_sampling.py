"""Collecting a rollout batch with a fake engine: order, surplus, resume, rewards that fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_rollouts import (
    Engine,
    by_seed,
    calls_of,
    every_third_prompt_is_mixed,
    grade_right,
    make_collector,
    to_prompt,
    uids,
)

from megatron_fipo.config import BatchSettings, RolloutSettings
from megatron_fipo.data_config import DataSettings
from megatron_fipo.trainer.generation import RewardFailed, sampling_seed
from megatron_fipo.trainer.recording import group_to_dict
from megatron_fipo.trainer.sampling import collector_settings
from megatron_fipo.types import (
    Completion,
    GenerateRequest,
    GraderError,
    Group,
    Problem,
    Prompt,
    RewardResult,
    SamplingSettings,
)

NO_ERRORS = {f"num_reward_errors{kind}": 0 for kind in ("", "/exception", "/timeout", "/crash", "/memory")}


def as_text(groups: Sequence[Group]) -> str:
    return json.dumps([group_to_dict(group) for group in groups])


def test_the_batch_is_the_first_informative_groups_in_prompt_order() -> None:
    collector = make_collector(Engine(every_third_prompt_is_mixed))
    groups, metrics = collector.collect(step=1)
    assert uids(groups) == ["p1", "p4", "p7", "p10", "p13", "p16"]
    assert uids(collector.surplus) == ["p19", "p22"]
    assert metrics == {
        "num_gen_batches": 3,
        "num_generated_groups": 24,
        "num_generated_samples": 96,
        "num_generated_tokens": metrics["num_generated_tokens"],
        "num_continued_groups": 0,
        **NO_ERRORS,
        "time/rollout/generation": 3.0,
        "time/rollout/grading": 3.0,
        "groups_informative_fraction": 8 / 24,
        "groups_all_right_fraction": 8 / 24,
        "groups_all_wrong_fraction": 8 / 24,
        "groups_kept_fraction": 8 / 24,
        "generated_score/min": 0.0,
        "generated_score/max": 1.0,
        "num_surplus_groups": 2,
        "num_unfinished_groups": 0,
        "token_age/mean": 0.0,
        "token_age/max": 0.0,
    }
    assert [sample.uid for sample in groups[0].samples] == ["p1/0", "p1/1", "p1/2", "p1/3"]
    assert [sample.result.accuracy for sample in groups[0].samples] == [1.0, 0.0, 1.0, 0.0]


def test_surplus_groups_come_first_in_the_next_step_and_may_fill_it_alone() -> None:
    collector = make_collector(Engine(every_third_prompt_is_mixed), generation_batch_size=48)
    assert uids(collector.collect(step=1)[0]) == ["p1", "p4", "p7", "p10", "p13", "p16"]
    groups, metrics = collector.collect(step=2)
    assert uids(groups) == ["p19", "p22", "p25", "p28", "p31", "p34"]
    assert metrics == {
        "num_gen_batches": 0,
        "num_generated_groups": 0,
        "num_generated_samples": 0,
        "num_generated_tokens": 0,
        "num_continued_groups": 0,
        **NO_ERRORS,
        "time/rollout/generation": 0.0,
        "time/rollout/grading": 0.0,
        "num_surplus_groups": 4,
        "num_unfinished_groups": 0,
        "token_age/mean": 1.0,
        "token_age/max": 1.0,
    }
    assert uids(collector.collect(step=3)[0]) == ["p37", "p40", "p43", "p46", "p49", "p52"]


def test_nothing_generated_is_lost_or_trained_on_twice() -> None:
    collector = make_collector()
    trained = [group for step in range(1, 20) for group in collector.collect(step)[0]]
    accounted = uids(trained) + uids(collector.surplus)
    drawn = [request for call in calls_of(collector) for request in call]
    by_problem: dict[str, set[bool]] = {}
    for request in drawn:
        by_problem.setdefault(request.uid.split("/")[0], set()).add(by_seed(request))
    assert accounted == [uid for uid, found in by_problem.items() if found == {True, False}]
    assert len(accounted) < len(by_problem)
    sample_uids = [sample.uid for group in trained for sample in group.samples]
    assert len(set(sample_uids)) == len(sample_uids) == 19 * 6 * 4


def test_without_dynamic_sampling_a_batch_is_exactly_the_next_prompts() -> None:
    collector = make_collector(Engine(every_third_prompt_is_mixed), dynamic_sampling=False)
    groups, metrics = collector.collect(step=1)
    assert uids(groups) == [f"p{i}" for i in range(6)]
    assert (metrics["num_gen_batches"], metrics["num_generated_groups"], collector.surplus) == (1, 6, [])
    assert uids(collector.collect(step=2)[0]) == [f"p{i}" for i in range(6, 12)]


def test_a_batch_that_cannot_be_filled_says_what_was_drawn() -> None:
    collector = make_collector(Engine(lambda request: request.uid.startswith("p1/")), max_generation_batches=2)
    with pytest.raises(
        ValueError,
        match=r"after 2 generation batches \(--max-generation-batches\) of 8 prompts it has 0 of 6 groups; "
        r"of 16 groups 0 were informative, 1 all right, 15 all wrong",
    ):
        collector.collect(step=1)


def test_a_resumed_collector_continues_bit_for_bit() -> None:
    collector = make_collector(overlong_buffer_len=50)
    for step in (1, 2):
        collector.collect(step)
    assert collector.surplus
    saved = json.dumps(collector.state_dict())
    expected = [collector.collect(step) for step in (3, 4, 5)]
    resumed = make_collector(overlong_buffer_len=50)
    resumed.load_state_dict(json.loads(saved))
    for step, (groups, metrics) in zip((3, 4, 5), expected):
        found, found_metrics = resumed.collect(step)
        assert as_text(found) == as_text(groups)
        assert found_metrics == metrics
        for group, again in zip(groups, found):
            assert all(
                a.rollout_logprobs.tobytes() == b.rollout_logprobs.tobytes() and a.response_ids.dtype == np.int64
                for a, b in zip(group.samples, again.samples)
            )
    assert json.dumps(resumed.state_dict()) == json.dumps(collector.state_dict())


def test_a_state_of_another_shape_is_refused() -> None:
    collector = make_collector(Engine(every_third_prompt_is_mixed))
    collector.collect(step=1)
    saved = collector.state_dict()
    with pytest.raises(ValueError, match="--n-samples-per-prompt is 8, but must be 4, as in the checkpoint's surplus"):
        make_collector(n_samples_per_prompt=8).load_state_dict(saved)
    with pytest.raises(ValueError, match="must hold 'source' and 'waiting'"):
        collector.load_state_dict({"source": saved["source"]})
    with pytest.raises(ValueError, match="not a recorded group"):
        collector.load_state_dict({**saved, "waiting": [{"group": {"problem": {}}}]})
    with pytest.raises(ValueError, match=r"holds a \['something'\], but must hold a 'group' or 'unfinished'"):
        collector.load_state_dict({**saved, "waiting": [{"something": {}}]})


def test_every_request_has_a_seed_of_its_own_made_from_run_step_prompt_and_sample() -> None:
    collector = make_collector(dynamic_sampling=False)
    collector.collect(step=1)
    requests = calls_of(collector)[0]
    assert [request.seed for request in requests] == [
        sampling_seed(11, 1, f"p{i}", j) for i in range(6) for j in range(4)
    ]
    seeds = {
        sampling_seed(run, step, f"p{i}", j) for run in (1, 2) for step in (1, 2) for i in range(9) for j in range(9)
    }
    assert len(seeds) == 2 * 2 * 9 * 9
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sampling_seed(1, 2, "p", 3) == 1499382567  # pinned: a change breaks the resume of running experiments


def test_the_overlong_penalty_changes_the_reward_and_nothing_else() -> None:
    """Groups that only the penalty tells apart stay uninformative."""
    long_ones = {"p0/1", "p1/1"}

    def generate(requests: Sequence[GenerateRequest]) -> list[Completion]:
        lengths = [19 if request.uid in long_ones else 5 for request in requests]
        return [
            Completion(request.uid, np.full(n, ord(".")), np.zeros(n, np.float32), "length", 0)
            for request, n in zip(requests, lengths)
        ]

    def grade(responses: Sequence[str], *_: Any) -> list[RewardResult]:
        return [RewardResult(float(i == 4), float(i == 4), None) for i in range(len(responses))]

    collector = make_collector(
        generate,
        grader=grade,
        rollout_batch_size=1,
        generation_batch_size=2,
        overlong_buffer_len=4,
        overlong_penalty_factor=0.5,
        sampling=SamplingSettings(max_response_len=20),
    )
    groups, metrics = collector.collect(step=1)
    assert uids(groups) == ["p1"]
    assert [sample.reward for sample in groups[0].samples] == [1.0, -0.375, 0.0, 0.0]  # 3 of 4 tokens over, x 0.5
    assert [sample.result.score for sample in groups[0].samples] == [1.0, 0.0, 0.0, 0.0]
    assert [sample.result.accuracy for sample in groups[0].samples] == [1.0, 0.0, 0.0, 0.0]
    assert metrics["groups_all_wrong_fraction"] == 0.5


def test_a_failed_reward_stops_the_run_and_names_the_problem() -> None:
    def grade(responses: Sequence[str], *_: Any) -> list[RewardResult | GraderError]:
        verdicts: list[RewardResult | GraderError] = [RewardResult(1.0, 1.0, None) for _ in responses]
        verdicts[5] = GraderError("exception", "KeyError: 'x'")
        return verdicts

    collector = make_collector(grader=grade)
    with pytest.raises(RewardFailed, match=r"problem p1 \(sample p1/1\): exception: KeyError: 'x'"):
        collector.collect(step=1)


def test_graders_get_the_problems_extra_the_finish_reason_and_the_text_without_special_tokens() -> None:
    seen: list[tuple[str, str, Mapping[str, Any]]] = []

    def grade(
        responses: Sequence[str], truths: Sequence[str], extras: Sequence[Mapping[str, Any]]
    ) -> list[RewardResult]:
        seen.extend(zip(responses, truths, extras))
        return grade_right(responses, truths, extras)

    collector = make_collector(grader=grade, dynamic_sampling=False, sampling=SamplingSettings(max_response_len=7))
    groups, _ = collector.collect(step=1)
    samples = [sample for group in groups for sample in group.samples]
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for i, (sample, (text, truth, extra)) in enumerate(zip(samples, seen, strict=True)):
        assert extra == {"number": i // 4, "finish_reason": sample.finish_reason}
        assert (text, truth) == (sample.text, "right")
        assert len(sample.response_ids) == len(text) + (sample.finish_reason == "stop")


@pytest.mark.parametrize("spoil", [lambda c: c[1:], lambda c: [c[0], *c[:-1]], lambda c: [*c, c[0]]])
def test_an_engine_that_loses_or_repeats_answers_is_caught(
    spoil: Callable[[list[Completion]], list[Completion]],
) -> None:
    engine = Engine(by_seed)
    collector = make_collector(lambda requests: spoil(engine(requests)))
    with pytest.raises(AssertionError):
        collector.collect(step=1)


def test_settings_resolve_what_the_algorithm_decides() -> None:
    batch = BatchSettings(rollout_batch_size=8, n_samples_per_prompt=4, num_updates_per_rollout=2)
    rollout = RolloutSettings(rollout_max_response_len=100, overlong_buffer_len=20, over_sampling_batch_size=12)
    data = DataSettings(task="small_arithmetic", on_reward_error="drop")
    dapo = collector_settings("dapo", batch, rollout, data, seed=5)
    assert (dapo.dynamic_sampling, dapo.overlong_buffer_len, dapo.generation_batch_size) == (True, 20, 12)
    assert (dapo.seed, dapo.rollout_batch_size, dapo.n_samples_per_prompt) == (5, 8, 4)
    assert (dapo.on_reward_error, dapo.partial_rollout_len) == ("drop", None)
    assert dapo.sampling == SamplingSettings(max_response_len=100, temperature=1.0, top_p=1.0, top_k=-1)
    assert collector_settings("fipo", batch, rollout, data, seed=5) == dapo
    grpo = collector_settings("grpo", batch, replace(rollout, over_sampling_batch_size=None), data, seed=5)
    assert (grpo.dynamic_sampling, grpo.overlong_buffer_len, grpo.generation_batch_size) == (False, None, 8)
    explicit = replace(rollout, dynamic_sampling=False, overlong_penalty=False, overlong_buffer_len=200)
    assert collector_settings("fipo", batch, explicit, data, seed=5).overlong_buffer_len is None
    with pytest.raises(ValueError, match=r"--overlong-buffer-len is 200, but must be at most .*\(100\)"):
        collector_settings("fipo", batch, replace(rollout, overlong_buffer_len=200), data, seed=5)
    assert (
        collector_settings("fipo", batch, replace(rollout, partial_rollout_len=40), data, seed=5).partial_rollout_len
        == 40
    )


def test_a_problem_that_is_left_out_makes_room_for_the_next() -> None:
    def short_ones(problem: Problem) -> Prompt | None:
        return None if problem.extra["number"] % 2 else to_prompt(problem)

    collector = make_collector(to_prompt=short_ones, dynamic_sampling=False)
    assert uids(collector.collect(step=1)[0]) == [f"p{i}" for i in range(0, 12, 2)]
    assert uids(collector.collect(step=2)[0]) == [f"p{i}" for i in range(12, 24, 2)]


def test_a_source_of_nothing_but_problems_to_leave_out_is_an_error() -> None:
    collector = make_collector(to_prompt=lambda problem: None)
    with pytest.raises(ValueError, match=r"in a row were left out \(--on-long-prompt skip\).*--rollout-max-prompt-len"):
        collector.collect(step=1)


def failing_on(kinds: Mapping[str, str]) -> Callable[..., list[RewardResult | GraderError]]:
    """A grader that gives no verdict where `kinds` holds the sample's uid (of 4 per problem)."""

    def grade(
        responses: Sequence[str], truths: Sequence[str], extras: Sequence[Mapping[str, Any]]
    ) -> list[RewardResult | GraderError]:
        verdicts: list[RewardResult | GraderError] = list(grade_right(responses, truths, extras))
        for i, extra in enumerate(extras):
            kind = kinds.get(f"p{extra['number']}/{i % 4}")
            if kind is not None:
                verdicts[i] = GraderError(kind, "no verdict")  # type: ignore[arg-type]
        return verdicts

    return grade


def test_dropped_reward_errors_are_counted_by_kind_and_decide_nothing_about_their_group() -> None:
    # p1 and p4 are right, wrong, right, wrong; without its wrong samples p1 is uninformative, without one p4 is not
    kinds = {"p1/1": "timeout", "p1/3": "memory", "p4/0": "timeout", "p0/0": "crash"}
    collector = make_collector(
        Engine(every_third_prompt_is_mixed), grader=failing_on(kinds), on_reward_error="drop", rollout_batch_size=2
    )
    groups, metrics = collector.collect(step=1)
    assert uids(groups) == ["p4", "p7"]
    assert metrics["num_reward_errors"] == 4
    assert {name: metrics[name] for name in NO_ERRORS} == {
        **NO_ERRORS,
        "num_reward_errors": 4,
        "num_reward_errors/timeout": 2,
        "num_reward_errors/memory": 1,
        "num_reward_errors/crash": 1,
    }
    assert metrics["groups_all_right_fraction"] == 4 / 8  # p0, p3, p6, and p1 for what is known of it
    assert isinstance(groups[0].samples[0].result, GraderError)
    restored = make_collector(on_reward_error="drop", rollout_batch_size=2)
    collector.collect(step=2)
    restored.load_state_dict(json.loads(json.dumps(collector.state_dict())))
    assert as_text(restored.surplus) == as_text(collector.surplus)


def test_a_batch_of_which_nothing_could_be_graded_stops_the_run() -> None:
    kinds = {f"p{i}/{j}": "crash" for i in range(6) for j in range(4)}
    collector = make_collector(grader=failing_on(kinds), on_reward_error="drop", dynamic_sampling=False)
    with pytest.raises(RewardFailed, match="no response of the batch could be graded"):
        collector.collect(step=1)
    del kinds["p2/3"]
    again = make_collector(grader=failing_on(kinds), on_reward_error="drop", dynamic_sampling=False)
    assert again.collect(step=1)[1]["num_reward_errors"] == 23
