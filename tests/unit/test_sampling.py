"""Collecting a rollout batch with a fake engine: order, surplus, resume, rewards, sequences and metrics."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from megatron_fipo.config import BatchSettings, RolloutSettings
from megatron_fipo.data.source import SeededSource
from megatron_fipo.data_config import DataSettings
from megatron_fipo.trainer.recording import group_to_dict
from megatron_fipo.trainer.sampling import (
    BatchCollector,
    CollectorSettings,
    RewardFailed,
    collector_settings,
    make_train_sequences,
    rollout_metrics,
    sampling_seed,
)
from megatron_fipo.types import (
    Completion,
    GenerateRequest,
    GraderError,
    Group,
    Problem,
    Prompt,
    RewardResult,
    Sample,
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
    apply_chat_template=False,
    max_prompt_len=100,
    sampling=SamplingSettings(max_response_len=200),
    overlong_buffer_len=None,
    overlong_penalty_factor=1.0,
)


def numbered_source() -> SeededSource:
    return SeededSource("numbered", lambda k: Problem(f"p{k}", f"question {k}", "right", extra={"number": k}))


def make_collector(is_right: Callable[[GenerateRequest], bool] = by_seed, **changes: Any) -> BatchCollector:
    ticks = itertools.count()
    return BatchCollector(
        numbered_source(),
        Engine(is_right),
        CharacterTokenizer(),
        grade_right,
        replace(SETTINGS, **changes),
        clock=lambda: float(next(ticks)),
    )


def uids(groups: Sequence[Group]) -> list[str]:
    return [group.prompt.problem.uid for group in groups]


def as_text(groups: Sequence[Group]) -> str:
    return json.dumps([group_to_dict(group) for group in groups])


def calls_of(collector: BatchCollector) -> list[list[GenerateRequest]]:
    assert isinstance(collector.generate, Engine)
    return collector.generate.calls


def test_the_batch_is_the_first_informative_groups_in_prompt_order() -> None:
    collector = make_collector(every_third_prompt_is_mixed)
    groups, metrics = collector.collect(step=1)
    assert uids(groups) == ["p1", "p4", "p7", "p10", "p13", "p16"]
    assert uids(collector.surplus) == ["p19", "p22"]
    assert metrics == {
        "num_gen_batches": 3,
        "num_generated_groups": 24,
        "num_generated_samples": 96,
        "num_generated_tokens": metrics["num_generated_tokens"],
        "time/rollout/generation": 3.0,
        "time/rollout/grading": 3.0,
        "groups_informative_fraction": 8 / 24,
        "groups_all_right_fraction": 8 / 24,
        "groups_all_wrong_fraction": 8 / 24,
        "num_surplus_groups": 2,
    }
    assert [sample.uid for sample in groups[0].samples] == ["p1/0", "p1/1", "p1/2", "p1/3"]
    assert [sample.result.accuracy for sample in groups[0].samples] == [1.0, 0.0, 1.0, 0.0]


def test_surplus_groups_come_first_in_the_next_step_and_may_fill_it_alone() -> None:
    collector = make_collector(every_third_prompt_is_mixed, generation_batch_size=48)
    assert uids(collector.collect(step=1)[0]) == ["p1", "p4", "p7", "p10", "p13", "p16"]
    groups, metrics = collector.collect(step=2)
    assert uids(groups) == ["p19", "p22", "p25", "p28", "p31", "p34"]
    assert metrics == {
        "num_gen_batches": 0,
        "num_generated_groups": 0,
        "num_generated_samples": 0,
        "num_generated_tokens": 0,
        "time/rollout/generation": 0.0,
        "time/rollout/grading": 0.0,
        "num_surplus_groups": 4,
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


def test_long_responses_are_trained_on_as_often_as_they_are_drawn() -> None:
    """First come, first served would train on far shorter groups than were drawn: the lengths have a long tail."""
    collector = make_collector(max_generation_batches=20)
    trained = [group for step in range(1, 40) for group in collector.collect(step)[0]]

    def longest(group: Group) -> int:
        return max(len(sample.response_ids) for sample in group.samples)

    drawn = [*trained, *collector.surplus]
    per_call = len(calls_of(collector)[0]) // SETTINGS.n_samples_per_prompt
    batches = [[g for g in drawn if int(uids([g])[0][1:]) // per_call == i] for i in range(len(calls_of(collector)))]
    first_come = [group for batch in batches for group in sorted(batch, key=longest)[: len(batch) // 2]]
    mean_drawn = np.mean([longest(group) for group in drawn])
    assert np.mean([longest(group) for group in first_come]) < 0.6 * mean_drawn
    assert np.mean([longest(group) for group in trained]) == pytest.approx(mean_drawn, rel=0.05)


def test_without_dynamic_sampling_a_batch_is_exactly_the_next_prompts() -> None:
    collector = make_collector(every_third_prompt_is_mixed, dynamic_sampling=False)
    groups, metrics = collector.collect(step=1)
    assert uids(groups) == [f"p{i}" for i in range(6)]
    assert (metrics["num_gen_batches"], metrics["num_generated_groups"], collector.surplus) == (1, 6, [])
    assert uids(collector.collect(step=2)[0]) == [f"p{i}" for i in range(6, 12)]


def test_a_batch_that_cannot_be_filled_says_what_was_drawn() -> None:
    collector = make_collector(lambda request: request.uid.startswith("p1/"), max_generation_batches=2)
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
    collector = make_collector(every_third_prompt_is_mixed)
    collector.collect(step=1)
    saved = collector.state_dict()
    with pytest.raises(ValueError, match="--n-samples-per-prompt is 8, but must be 4, as in the checkpoint's surplus"):
        make_collector(n_samples_per_prompt=8).load_state_dict(saved)
    with pytest.raises(ValueError, match="must hold 'source' and 'surplus'"):
        collector.load_state_dict({"source": saved["source"]})
    with pytest.raises(ValueError, match="not a recorded group"):
        collector.load_state_dict({**saved, "surplus": [{"problem": {}}]})


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

    collector = BatchCollector(
        numbered_source(),
        generate,
        CharacterTokenizer(),
        grade,
        replace(
            SETTINGS,
            rollout_batch_size=1,
            generation_batch_size=2,
            overlong_buffer_len=4,
            overlong_penalty_factor=0.5,
            sampling=SamplingSettings(max_response_len=20),
        ),
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

    collector = make_collector()
    collector.grader = grade
    with pytest.raises(RewardFailed, match=r"problem p1 \(sample p1/1\): exception: KeyError: 'x'"):
        collector.collect(step=1)


def test_graders_get_the_problems_extra_the_finish_reason_and_the_text_without_special_tokens() -> None:
    seen: list[tuple[str, str, Mapping[str, Any]]] = []

    def grade(
        responses: Sequence[str], truths: Sequence[str], extras: Sequence[Mapping[str, Any]]
    ) -> list[RewardResult]:
        seen.extend(zip(responses, truths, extras))
        return grade_right(responses, truths, extras)

    collector = make_collector(dynamic_sampling=False, sampling=SamplingSettings(max_response_len=7))
    collector.grader = grade
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
    collector = make_collector()
    engine = Engine(by_seed)
    collector.generate = lambda requests: spoil(engine(requests))
    with pytest.raises(AssertionError):
        collector.collect(step=1)


def make_group(rewards: Sequence[float], lengths: Sequence[int], prompt_ids: Sequence[int] = (7, 8, 9)) -> Group:
    prompt = Prompt(Problem("p", "?", ""), np.array(prompt_ids))
    samples = [
        Sample(
            uid=f"p/{i}",
            response_ids=np.arange(100, 100 + n),
            rollout_logprobs=-np.arange(1, n + 1, dtype=np.float32),
            finish_reason="stop",
            weight_version=3 + i,
            text="",
            result=RewardResult(score=reward * 2, accuracy=float(reward > 0), answer=None),
            reward=reward,
        )
        for i, (reward, n) in enumerate(zip(rewards, lengths))
    ]
    return Group(prompt, tuple(samples))


def test_sequences_hold_advantage_and_logprobs_where_the_response_is_predicted() -> None:
    first, second, empty = make_train_sequences([make_group([1.0, -1.0, 0.0], [2, 4, 0])])
    assert first.uid == "p/0"
    assert first.token_ids.tolist() == [7, 8, 9, 100, 101]
    assert first.loss_mask.tolist() == [False, False, True, True, False]
    assert first.rollout_logprobs.tolist() == [0.0, 0.0, -1.0, -2.0, 0.0]
    advantage = np.float32(1.0 / (1.0 + 1e-6))  # mean 0, standard deviation (ddof 1) 1
    assert first.advantages.tolist() == [0.0, 0.0, advantage, advantage, 0.0]
    assert second.advantages.tolist() == [0.0, 0.0, *[-advantage] * 4, 0.0]
    assert second.loss_mask.tolist() == [False, False, True, True, True, True, False]
    assert (first.weight_version, second.weight_version) == (3, 4)
    assert empty.token_ids.tolist() == [7, 8, 9]
    assert not empty.loss_mask.any()
    assert (first.token_ids.dtype, first.loss_mask.dtype) == (np.int64, np.bool_)
    assert first.advantages.dtype == first.rollout_logprobs.dtype == np.float32


def test_metrics_have_the_authors_names_and_definitions() -> None:
    groups = [make_group([1.0, -1.0], [10, 30]), make_group([0.0, 0.0], [2, 8], prompt_ids=[1])]
    metrics = rollout_metrics(groups, max_response_len=30)
    a = 1.0 / (np.sqrt(2.0) + 1e-6)
    token_mean = (10 * a - 30 * a) / 50
    expected = {
        "num_samples": 4,
        "accuracy": 0.25,
        "score/mean": 0.0,
        "score/max": 2.0,
        "score/min": -2.0,
        "reward/mean": 0.0,
        "reward/max": 1.0,
        "reward/min": -1.0,
        "advantage/mean": token_mean,
        "advantage/max": a,
        "advantage/min": -a,
        "advantage/token_mean": token_mean,
        "return/mean": token_mean,
        "return/max": a,
        "return/min": -a,
        "response_length/mean": 12.5,
        "response_length/max": 30.0,
        "response_length/min": 2.0,
        "response_length/median": 9.0,
        "response_length/q25": 6.5,
        "response_length/q75": 15.0,
        "response_length/clip_ratio": 0.25,
        "prompt_length/mean": 2.0,
    }
    assert metrics == pytest.approx(expected, abs=1e-12)


def test_settings_resolve_what_the_algorithm_decides() -> None:
    batch = BatchSettings(rollout_batch_size=8, n_samples_per_prompt=4, num_updates_per_rollout=2)
    rollout = RolloutSettings(rollout_max_response_len=100, overlong_buffer_len=20, over_sampling_batch_size=12)
    data = DataSettings(task="small_arithmetic", apply_chat_template=True)
    dapo = collector_settings("dapo", batch, rollout, data, seed=5)
    assert (dapo.dynamic_sampling, dapo.overlong_buffer_len, dapo.generation_batch_size) == (True, 20, 12)
    assert (dapo.seed, dapo.rollout_batch_size, dapo.n_samples_per_prompt, dapo.apply_chat_template) == (5, 8, 4, True)
    assert dapo.sampling == SamplingSettings(max_response_len=100, temperature=1.0, top_p=1.0, top_k=-1)
    assert collector_settings("fipo", batch, rollout, data, seed=5) == dapo
    grpo = collector_settings("grpo", batch, replace(rollout, over_sampling_batch_size=None), data, seed=5)
    assert (grpo.dynamic_sampling, grpo.overlong_buffer_len, grpo.generation_batch_size) == (False, None, 8)
    explicit = replace(rollout, dynamic_sampling=False, overlong_penalty=False, overlong_buffer_len=200)
    assert collector_settings("fipo", batch, explicit, data, seed=5).overlong_buffer_len is None
    with pytest.raises(ValueError, match=r"--overlong-buffer-len is 200, but must be at most .*\(100\)"):
        collector_settings("fipo", batch, replace(rollout, overlong_buffer_len=200), data, seed=5)
