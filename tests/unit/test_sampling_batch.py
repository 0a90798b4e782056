"""What is made of a rollout batch: the sequences, with their masks, and the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_fipo.ops.future_kl import future_kl
from megatron_fipo.trainer.rollout_batch import is_informative, make_train_sequences, rollout_metrics
from megatron_fipo.types import GraderError, Group, Problem, Prompt, RewardResult, Sample

NO_VERDICT = GraderError("timeout", "10 s")


def make_group(rewards: Sequence[float], lengths: Sequence[int], prompt_ids: Sequence[int] = (7, 8, 9)) -> Group:
    prompt = Prompt(Problem("p", "?", ""), np.array(prompt_ids))
    samples = [
        Sample(
            uid=f"p/{i}",
            response_ids=np.arange(100, 100 + n),
            rollout_logprobs=-np.arange(1, n + 1, dtype=np.float32),
            loss_mask=np.ones(n, dtype=bool),
            token_versions=np.full(n, 3 + i),
            finish_reason="stop",
            text="",
            result=RewardResult(score=reward * 2, accuracy=float(reward > 0), answer=None),
            reward=reward,
        )
        for i, (reward, n) in enumerate(zip(rewards, lengths))
    ]
    return Group(prompt, tuple(samples))


def with_sample(group: Group, index: int, **changes: Any) -> Group:
    samples = list(group.samples)
    samples[index] = replace(samples[index], **changes)
    return replace(group, samples=tuple(samples))


def test_sequences_hold_advantage_and_logprobs_where_the_response_is_predicted() -> None:
    first, second, empty = make_train_sequences([make_group([1.0, -1.0, 0.0], [2, 4, 0])], older_tokens="mask")
    assert first.uid == "p/0"
    assert first.token_ids.tolist() == [7, 8, 9, 100, 101]
    assert first.loss_mask.tolist() == [False, False, True, True, False]
    assert first.rollout_logprobs.tolist() == [0.0, 0.0, -1.0, -2.0, 0.0]
    advantage = np.float32(1.0 / (1.0 + 1e-6))  # mean 0, standard deviation (ddof 1) 1
    assert first.advantages.tolist() == [0.0, 0.0, advantage, advantage, 0.0]
    assert second.advantages.tolist() == [0.0, 0.0, *[-advantage] * 4, 0.0]
    assert second.loss_mask.tolist() == [False, False, True, True, True, True, False]
    assert first.token_versions.tolist() == [-1, -1, 3, 3, -1]
    assert second.token_versions.tolist() == [-1, -1, 4, 4, 4, 4, -1]
    assert empty.token_ids.tolist() == [7, 8, 9]
    assert not empty.loss_mask.any()
    assert (first.token_ids.dtype, first.loss_mask.dtype, first.token_versions.dtype) == (np.int64, np.bool_, np.int64)
    assert first.advantages.dtype == first.rollout_logprobs.dtype == np.float32


@pytest.mark.parametrize(
    ("older_tokens", "versions", "trained"),
    [
        ("mask", [3, 3, 5, 5], [0, 0, 1, 1]),
        ("mask", [3, 4, 4, 5], [0, 0, 0, 1]),
        ("correct", [3, 3, 5, 5], [1, 1, 1, 1]),
        ("mask", [3, 3, 3, 3], [1, 1, 1, 1]),  # a surplus group's: old, but of one version
    ],
)
def test_tokens_of_older_weights_than_the_responses_newest_are_masked_unless_corrected(
    older_tokens: Any, versions: list[int], trained: list[int]
) -> None:
    group = with_sample(make_group([1.0, -1.0], [4, 3]), 0, token_versions=np.array(versions))
    first, second = make_train_sequences([group], older_tokens=older_tokens)
    mask = np.array([0, 0, *trained, 0], dtype=bool)
    assert first.loss_mask.tolist() == mask.tolist()
    assert first.token_versions.tolist() == np.where(mask, [-1, -1, *versions, -1], -1).tolist()
    assert first.rollout_logprobs.tolist() == np.where(mask, [0, 0, -1, -2, -3, -4, 0], 0).tolist()
    assert (first.advantages != 0).tolist() == mask.tolist()
    assert second.loss_mask.sum() == 3
    assert rollout_metrics([group], 10)["num_partial_samples"] == (len(set(versions)) > 1)


def test_a_tools_tokens_are_a_hole_that_neither_mask_nor_version_fills() -> None:
    hole = np.array([True, True, False, False, True])
    versions = np.array([4, 4, 9, 9, 4])  # what a tool's tokens say does not count
    group = with_sample(make_group([1.0, -1.0], [5, 3]), 0, loss_mask=hole, token_versions=versions)
    first, _ = make_train_sequences([group], older_tokens="mask")
    assert first.token_ids.tolist() == [7, 8, 9, 100, 101, 102, 103, 104]
    assert first.loss_mask.tolist() == [False, False, *hole.tolist(), False]
    assert first.rollout_logprobs.tolist() == [0, 0, -1, -2, 0, 0, -5, 0]
    assert first.token_versions.tolist() == [-1, -1, 4, 4, -1, -1, 4, -1]
    metrics = rollout_metrics([group], 5)
    assert metrics["response_length/max"] == 5
    a = 1 / np.sqrt(2)
    assert metrics["advantage/token_mean"] == pytest.approx((3 * a - 3 * a) / 6, abs=1e-12)
    assert metrics["num_partial_samples"] == 0


def test_future_kl_passes_over_a_hole_and_not_from_one_sequence_into_another() -> None:
    hole = np.array([True, False, False, True])
    group = with_sample(make_group([1.0, -1.0], [4, 2], prompt_ids=[7]), 0, loss_mask=hole)
    sequences = make_train_sequences([group], older_tokens="mask")
    mask = torch.from_numpy(np.concatenate([sequence.loss_mask for sequence in sequences]))
    deltas = torch.full(mask.shape, 8.0, dtype=torch.float64)  # the masked ones must not show
    deltas[mask] = torch.tensor([1.0, 2.0, 4.0, 16.0], dtype=torch.float64)
    offsets = torch.tensor([0, 5, 8], dtype=torch.int32)
    found = future_kl(deltas, mask, 1.0, cu_seqlens=offsets)  # a half-life of one token: gamma is 1/2
    # positions 0 and 3 of the first sequence carry 1 and 2, three tokens apart; 0 and 1 of the second 4 and 16
    assert found[mask].tolist() == [1 + 2 / 8, 2.0, 4 + 16 / 2, 16.0]
    assert found[4] == 0.0


def test_a_sample_without_a_verdict_takes_no_part_but_counts_as_a_sequence() -> None:
    group = with_sample(make_group([1.0, -1.0, 9.0, 0.0], [2, 3, 4, 5]), 2, result=NO_VERDICT, reward=0.0)
    sequences = make_train_sequences([group], older_tokens="mask")
    expected = make_train_sequences([make_group([1.0, -1.0, 0.0], [2, 3, 5])], older_tokens="mask")
    assert len(sequences) == 4
    assert not sequences[2].loss_mask.any()
    assert not sequences[2].advantages.any()
    for found, wanted in zip([sequences[0], sequences[1], sequences[3]], expected):
        assert found.advantages.tolist() == wanted.advantages.tolist()
        assert found.loss_mask.tolist() == wanted.loss_mask.tolist()
    metrics = rollout_metrics([group], 10)
    wanted = rollout_metrics([make_group([1.0, -1.0, 0.0], [2, 3, 5])], 10)
    for name in ("accuracy", "score/mean", "reward/max", "reward/mean", "advantage/token_mean", "advantage/max"):
        assert metrics[name] == pytest.approx(wanted[name], abs=1e-12), name
    assert (metrics["num_samples"], metrics["response_length/mean"]) == (4, 3.5)


def test_fewer_than_two_verdicts_teach_nothing() -> None:
    group = with_sample(make_group([1.0, -1.0], [2, 3]), 1, result=NO_VERDICT, reward=0.0)
    assert not is_informative(group)
    sequences = make_train_sequences([group], older_tokens="mask")
    assert [sequence.advantages.any() for sequence in sequences] == [False, False]
    assert [int(sequence.loss_mask.sum()) for sequence in sequences] == [2, 0]
    none = with_sample(group, 0, result=NO_VERDICT, reward=0.0)
    assert not is_informative(none)
    with pytest.raises(ValueError, match="none of the batch's responses could be graded"):
        rollout_metrics([none], 10)


def test_a_group_with_verdicts_that_differ_is_informative_whatever_else_failed() -> None:
    group = with_sample(make_group([1.0, -1.0, 1.0], [2, 3, 4]), 0, result=NO_VERDICT, reward=0.0)
    assert is_informative(group)
    assert not is_informative(with_sample(group, 1, result=NO_VERDICT, reward=0.0))


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
        "truncation_rate": 0.0,
        "num_partial_samples": 0,
        "prompt_length/mean": 2.0,
    }
    assert metrics == pytest.approx(expected, abs=1e-12)


def test_truncation_is_told_by_the_finish_reason_and_not_by_the_length() -> None:
    group = with_sample(make_group([1.0, -1.0, 0.0, 0.0], [30, 8, 4, 4]), 1, finish_reason="length")
    metrics = rollout_metrics([group], 30)  # the first ends on its very last token
    assert (metrics["truncation_rate"], metrics["response_length/clip_ratio"]) == (0.25, 0.25)


def test_accuracies_that_differ_by_rounding_are_equal() -> None:
    group = make_group([1.0, 1.0], [3, 3])
    for index, accuracy in enumerate((0.3, 0.1 + 0.2)):
        group = with_sample(group, index, result=RewardResult(1.0, accuracy, None))
    assert not is_informative(group)
