"""Balanced shares of sequences: an exact partition, the same anywhere, and how even it is."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.ops.balance import balanced_partition, sequence_flops

MAX_LEN, HIDDEN = 20480, 5120

COSTS = st.one_of(
    st.lists(st.integers(0, 20), min_size=1, max_size=60),
    st.lists(st.integers(0, 10**15), min_size=1, max_size=60),
    st.lists(st.sampled_from([0, 1, 7, 10**6]), min_size=1, max_size=60),
)


def lognormal_lengths(num: int, sigma: float, *, mean: float = 4000.0, seed: int = 0) -> list[int]:
    """Response lengths as rollouts have them: a long tail, cut at the limit."""
    rng = random.Random(seed)
    mu = math.log(mean) - sigma**2 / 2
    return [max(1, min(MAX_LEN, round(rng.lognormvariate(mu, sigma)))) for _ in range(num)]


def share_totals(costs: list[int], num_shares: int) -> list[int]:
    return [sum(costs[item] for item in share) for share in balanced_partition(costs, num_shares)]


def max_over_mean(costs: list[int], num_shares: int) -> float:
    totals = share_totals(costs, num_shares)
    return max(totals) * num_shares / sum(totals)


def test_a_sequences_cost_is_linear_in_its_tokens_and_quadratic_in_its_pairs() -> None:
    assert sequence_flops(1, 4) == 12 * 4 + 2
    assert sequence_flops(1000, 4096) == 12 * 4096 * 1000 + 2 * 1000**2
    assert sequence_flops(6 * 512, 512) == 2 * 12 * 512 * 6 * 512  # as much attention as weights
    assert sequence_flops(0, 512) == 0


@settings(max_examples=150, deadline=None)
@given(costs=COSTS, data=st.data())
def test_shares_are_an_even_partition(costs: list[int], data: st.DataObject) -> None:
    num_shares = data.draw(st.integers(1, len(costs)))
    shares = balanced_partition(costs, num_shares)
    assert len(shares) == num_shares
    assert all(shares)
    assert sorted(item for share in shares for item in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    heaviest = max(sum(costs[item] for item in share) for share in shares)
    assert heaviest * num_shares <= sum(costs) + max(costs) * num_shares
    assert balanced_partition(tuple(costs), num_shares) == shares


@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.integers(0, 30), min_size=3, max_size=7), num_shares=st.integers(1, 3))
def test_the_heaviest_share_is_within_a_third_of_the_best_possible(costs: list[int], num_shares: int) -> None:
    """Graham's bound for largest first, which the refinement may only improve."""
    best = sum(costs)
    for owners in itertools.product(range(num_shares), repeat=len(costs)):
        totals = [0] * num_shares
        for owner, cost in zip(owners, costs, strict=True):
            totals[owner] += cost
        best = min(best, max(totals))
    assert 3 * max(share_totals(costs, num_shares)) <= 4 * best


@pytest.mark.parametrize("sigma", [0.3, 0.6, 1.0, 1.5])
@pytest.mark.parametrize("num_shares", [8, 16, 64])
def test_a_rollout_batch_is_balanced_to_two_percent(num_shares: int, sigma: float) -> None:
    for mean in (1500.0, 4000.0, 9000.0):
        costs = [sequence_flops(length, HIDDEN) for length in lognormal_lengths(8192, sigma, mean=mean)]
        assert max_over_mean(costs, num_shares) <= 1.002


@pytest.mark.parametrize(("num", "num_shares"), [(64, 8), (256, 64), (100, 3)])
def test_few_items_per_share_are_balanced_by_swaps(num: int, num_shares: int) -> None:
    """Largest first alone: 1.012, 1.093 and 1.008."""
    costs = [sequence_flops(length, HIDDEN) for length in lognormal_lengths(num, 0.3)]
    assert max_over_mean(costs, num_shares) <= 1.002


def test_swaps_find_an_even_split_that_largest_first_misses() -> None:
    assert sorted(share_totals([5, 4, 3, 3, 3], 2)) == [9, 9]  # largest first: 8 and 10
    assert share_totals([8, 7, 6, 5, 4], 2) == [15, 15]  # largest first: 17 and 13


def test_an_item_above_the_mean_stands_alone() -> None:
    assert balanced_partition([1, 100, 1, 1, 1], 3) == [[1], [0, 3], [2, 4]]


def test_ties_go_by_index() -> None:
    assert balanced_partition([3, 9, 1, 5], 2) == [[1], [0, 2, 3]]
    assert balanced_partition([2, 2, 2, 2], 2) == [[0, 2], [1, 3]]
    assert balanced_partition([0, 0, 0], 3) == [[0], [1], [2]]
    assert [len(share) for share in balanced_partition([1000, 1, 0, 0], 4)] == [1, 1, 1, 1]


def test_what_cannot_be_shared_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"2 sequences cannot be shared by 3 ranks"):
        balanced_partition([5, 5], 3)
    with pytest.raises(ValueError, match=r"num_shares is 0"):
        balanced_partition([5, 5], 0)
    with pytest.raises(ValueError, match=r"cost of item 1 is -5"):
        balanced_partition([5, -5], 1)
