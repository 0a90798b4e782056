"""Which responses get trained on when their lengths have a long tail: a simulation with finishing times.

A token takes one unit of time, so a group has finished when its longest response has. Filling a batch with the groups
that finish first, and leaving the rest, trains on shorter responses than the policy gives; filling it in prompt order
does not, whether or not a response may take several steps.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from fake_rollouts import ScriptedEngine, grade_right, make_collector

from megatron_fipo.types import Group, SamplingSettings

GROUP_SIZE, BATCH_SIZE, NUM_STEPS, WARM_UP = 4, 8, 400, 10
MAX_LEN, PARTIAL_LEN = 400, 100


def length_of(uid: str) -> int:
    """Tokens of that sample's response: a Pareto tail of exponent 1.1 from 10 up, cut at MAX_LEN."""
    rng = np.random.default_rng(zlib.crc32(uid.encode()))
    return min(int(10 * (1 + rng.pareto(1.1))), MAX_LEN)


def text_of(uid: str) -> str:
    """A response of `length_of` tokens with its END, right in half of the cases."""
    length = length_of(uid)
    return ("r" if zlib.crc32(uid[::-1].encode()) % 2 else "w") + "." * (length - 2) + "." * (length == MAX_LEN)


@dataclass(frozen=True)
class Estimate:
    """A mean over groups of the groups' mean response length, and its standard error."""

    mean: float
    error: float


def estimate(group_means: Sequence[float]) -> Estimate:
    return Estimate(float(np.mean(group_means)), float(np.std(group_means, ddof=1) / np.sqrt(len(group_means))))


@cache
def population() -> Estimate:
    """What the policy gives: many prompts that no batch below holds."""
    return estimate([float(np.mean(lengths_of(f"other{i}"))) for i in range(20_000)])


def lengths_of(problem: str) -> list[int]:
    return [length_of(f"{problem}/{j}") for j in range(GROUP_SIZE)]


def mean_length(group: Group) -> float:
    return float(np.mean([len(sample.response_ids) for sample in group.samples]))


def first_come() -> Estimate:
    """Twice the batch is begun in every step; the first half to finish is trained on, the other half thrown away."""
    kept = []
    for step in range(NUM_STEPS):
        begun = [lengths_of(f"p{i}") for i in range(2 * BATCH_SIZE * step, 2 * BATCH_SIZE * (step + 1))]
        kept += sorted(begun, key=max)[:BATCH_SIZE]  # max: when its last response ends
    return estimate([float(np.mean(lengths)) for lengths in kept])


def in_prompt_order(**changes: Any) -> list[list[Group]]:
    """The batches that the collector makes of the same problems."""

    def grade(responses: Sequence[str], ground_truths: Sequence[str], extras: Sequence[Mapping[str, Any]]) -> Any:
        return grade_right(responses, ["r"] * len(responses), extras)

    collector = make_collector(
        ScriptedEngine(text_of),
        grader=grade,
        rollout_batch_size=BATCH_SIZE,
        n_samples_per_prompt=GROUP_SIZE,
        generation_batch_size=2 * BATCH_SIZE,
        max_generation_batches=30,
        sampling=SamplingSettings(max_response_len=MAX_LEN),
        **changes,
    )
    return [list(collector.collect(step)[0]) for step in range(1, NUM_STEPS + 1)]


def test_first_come_filling_favours_short_responses() -> None:
    found, wanted = first_come(), population()
    assert found.mean < 0.6 * wanted.mean
    assert found.mean + 20 * found.error < wanted.mean


@pytest.mark.parametrize("partial_rollout_len", [None, PARTIAL_LEN])
@pytest.mark.parametrize("dynamic_sampling", [False, True])
def test_filling_in_prompt_order_does_not(dynamic_sampling: bool, partial_rollout_len: int | None) -> None:
    batches = in_prompt_order(dynamic_sampling=dynamic_sampling, partial_rollout_len=partial_rollout_len)
    # at first the longest responses of partial rollouts are yet to come; from then on as many come in as go out
    groups = [group for batch in batches[WARM_UP:] for group in batch]
    found, wanted = estimate([mean_length(group) for group in groups]), population()
    assert abs(found.mean - wanted.mean) < found.error + wanted.error
    assert len(groups) == (NUM_STEPS - WARM_UP) * BATCH_SIZE
    if partial_rollout_len is not None:
        is_continued = [len(sample.response_ids) > PARTIAL_LEN for group in groups for sample in group.samples]
        assert np.mean(is_continued) > 0.04
