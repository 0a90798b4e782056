"""Scores against brute force: every subset of a problem's samples, counted one by one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations, permutations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.metrics.scores import (
    Vote,
    avg_at_k,
    bootstrap_cons_at_k,
    bootstrap_pass_at_k,
    cons_at_k,
    expected_cons_at_k,
    majority_votes,
    pass_at_k,
)

# 1: right, of answer A; the other answers are wrong
SAMPLES = st.lists(st.sampled_from(["A", "B", "C", None]), min_size=1, max_size=7)


def right_of(answers: Sequence[str | None]) -> list[int]:
    return [int(answer == "A") for answer in answers]


def shared_majority(subset: Sequence[str | None]) -> Fraction:
    """What the majority is worth where A is right; tied answers share."""
    counts = Counter(answer for answer in subset if answer is not None)
    tied = [answer for answer, count in counts.items() if count == max(counts.values())]
    return Fraction(int("A" in tied), len(tied)) if tied else Fraction(0)


def mean_over_subsets(row: Sequence[Any], k: int, worth: Callable[[Sequence[Any]], Any]) -> float:
    subsets = list(combinations(row, k))
    return float(sum(Fraction(worth(subset)) for subset in subsets) / len(subsets))


@given(SAMPLES)
@settings(deadline=None, max_examples=60)
def test_pass_and_cons_at_every_k_are_means_over_all_subsets(answers: list[str | None]) -> None:
    right = right_of(answers)
    for k in range(1, len(answers) + 1):
        assert pass_at_k([right], k) == pytest.approx(mean_over_subsets(right, k, max), abs=1e-12)
        wanted = mean_over_subsets(answers, k, shared_majority)
        assert expected_cons_at_k([answers], [right], k) == pytest.approx(wanted, abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.data())
@settings(deadline=None, max_examples=40)
def test_pass_at_k_of_partial_credit_is_the_mean_best_of_a_subset(accuracies: list[float], data: Any) -> None:
    k = data.draw(st.integers(1, len(accuracies)))
    best = [max(subset) for subset in combinations(accuracies, k)]
    assert pass_at_k([accuracies], k) == pytest.approx(math.fsum(best) / len(best), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(32, 0, 8), (32, 1, 8), (32, 31, 2), (200, 3, 100), (5000, 2, 7)])
def test_pass_at_k_is_the_unbiased_estimator_without_overflow(n: int, c: int, k: int) -> None:
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    correct = np.zeros((1, n), dtype=bool)
    correct[0, :c] = True
    assert pass_at_k(correct, k) == pytest.approx(float(exact), rel=1e-12, abs=0)


def test_problems_weigh_alike_and_the_extremes_are_plain() -> None:
    correct = [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert avg_at_k(correct) == pytest.approx(5 / 12)
    assert pass_at_k(correct, 1) == pytest.approx(5 / 12)
    assert pass_at_k(correct, 2) == pytest.approx((0.5 + 1 + 0) / 3)
    assert pass_at_k(correct, 4) == pytest.approx(2 / 3)
    answers = [["a", "b", "b", "c"], ["7"] * 4, [None] * 4]
    assert cons_at_k(answers, correct) == pytest.approx(1 / 3)
    assert majority_votes(answers) == [Vote("b", 0.5), Vote("7", 1.0), Vote(None, 0.0)]


@given(SAMPLES)
@settings(deadline=None, max_examples=60)
def test_the_vote_goes_to_the_most_frequent_answer_and_of_several_to_the_first(answers: list[str | None]) -> None:
    voted = [answer for answer in answers if answer is not None]
    wanted = Counter(voted).most_common(1)[0][0] if voted else None  # most_common keeps the order of coming
    assert majority_votes([answers])[0].answer == wanted
    assert cons_at_k([answers], [right_of(answers)]) == float(wanted == "A")


def test_taking_the_first_of_tied_answers_favours_none_of_them() -> None:
    answers = ["A", "A", "B", "B", "C", None]
    orders = list(permutations(answers))
    worth = [cons_at_k([order], [right_of(order)]) for order in orders]
    assert sum(worth) / len(orders) == pytest.approx(0.5)
    assert expected_cons_at_k([answers], [right_of(answers)], len(answers)) == pytest.approx(0.5)


def test_missing_answers_cast_no_vote_and_never_win() -> None:
    assert cons_at_k([[None, None, None, "3"]], [[0, 0, 0, 1]]) == 1.0
    assert cons_at_k([[None, None]], [[1, 1]]) == 0.0
    assert expected_cons_at_k([[None, None, None, "3"]], [[0, 0, 0, 1]], 2) == pytest.approx(0.5)


def test_samples_with_one_answer_and_different_accuracies_are_averaged() -> None:
    answers, correct = [["x", "x", "x", "y"]], [[1.0, 0.0, 0.5, 1.0]]
    assert cons_at_k(answers, correct) == pytest.approx(0.5)
    wanted = (3 * 0.5 + 3 * (0.5 + 1.0) / 2) / 6  # three pairs of x, three ties
    assert expected_cons_at_k(answers, correct, 2) == pytest.approx(wanted)


def test_an_empty_text_is_an_answer_and_arrays_of_objects_will_do() -> None:
    answers = np.array([["", "", "b"], ["b", None, "b"]], dtype=object)
    assert cons_at_k(answers, np.array([[True, True, False], [True, False, True]])) == 1.0
    assert cons_at_k(np.array([["a", "b", "b"]]), [[0, 1, 1]]) == 1.0


def resampled(row: Sequence[Any], k: int, worth: Callable[[Sequence[Any]], float]) -> tuple[float, float]:
    """Mean and spread over all n**k draws with replacement, each as likely."""
    values = [worth(draw) for draw in product(row, repeat=k)]
    return float(np.mean(values)), float(np.std(values))


def first_majority(draw: Sequence[str | None]) -> float:
    return cons_at_k([draw], [right_of(draw)])


def test_the_bootstrap_approaches_all_draws_with_replacement() -> None:
    rows: list[list[str | None]] = [["A", "B", "B", None], ["C", "A", "A", "B"]]
    correct = [right_of(row) for row in rows]
    for k in (1, 2, 3, 4):
        best = bootstrap_pass_at_k(correct, k, np.random.default_rng(k), num_resamples=20_000)
        wanted = np.mean([resampled(right, k, max) for right in correct], axis=0)
        assert best == pytest.approx(tuple(wanted), abs=0.01)
        majority = bootstrap_cons_at_k(rows, correct, k, np.random.default_rng(k), num_resamples=20_000)
        wanted = np.mean([resampled(row, k, first_majority) for row in rows], axis=0)
        assert majority == pytest.approx(tuple(wanted), abs=0.01)


def test_the_bootstrap_repeats_itself_and_is_below_the_unbiased_estimate() -> None:
    correct = np.zeros((3, 32))
    correct[:, :4] = 1
    first, second, other = (bootstrap_pass_at_k(correct, 32, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == second != other
    assert first.mean == pytest.approx(1 - (28 / 32) ** 32, abs=0.01)  # 0.986, where the exact one is 1
    assert first.mean < pass_at_k(correct, 32) == 1.0
    assert bootstrap_cons_at_k([["a"] * 4], [[1] * 4], 2, np.random.default_rng(0)) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("correct", "message"),
    [
        ([1, 0, 1], r"shape \[3\], but must be \[problems, samples\]"),
        ([], r"shape \[0\]"),
        ([[]], r"shape \[1, 0\]"),
        ([[1, 0], [1]], "every problem with as many samples"),
        ([[1, None]], r"correct\[0, 1\] is nan"),
        ([["right"]], "must be numbers"),
        ([[0.5, 1.5]], r"correct\[0, 1\] is 1.5, but accuracies must lie in \[0, 1\]"),
        ([[0, 1], [-1, 0]], r"correct\[1, 0\] is -1.0"),
        ([[float("nan")]], r"correct\[0, 0\] is nan"),
    ],
)
def test_correct_that_is_no_table_of_accuracies_is_refused(correct: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        avg_at_k(correct)
    with pytest.raises(ValueError, match=message):
        pass_at_k(correct, 1)
    with pytest.raises(ValueError, match=message):
        cons_at_k([["a"]], correct)


@pytest.mark.parametrize("k", [0, -1, 4, 1.0, True, "2"])
def test_k_that_is_no_number_of_samples_is_refused(k: Any) -> None:
    rng = np.random.default_rng(0)
    for call in (
        lambda: pass_at_k([[0, 1, 1]], k),
        lambda: expected_cons_at_k([["a", "b", "c"]], [[0, 1, 1]], k),
        lambda: bootstrap_pass_at_k([[0, 1, 1]], k, rng),
        lambda: bootstrap_cons_at_k([["a", "b", "c"]], [[0, 1, 1]], k, rng),
    ):
        with pytest.raises(ValueError, match=r"k is .*, but must be a whole number from 1 to .* \(3\)"):
            call()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([["a"]], r"1 problems with \[1\] samples, but correct has the shape \[1, 2\]"),
        ([["a", "b"], ["a", "b"]], "2 problems"),
        (["ab"], r"must be \[problems, samples\]"),
        ("ab", r"must be \[problems, samples\]"),
        ([["a", ["b"]]], r"answers\[0\]\[1\] is \['b'\]"),
        ([["a", float("nan")]], r"answers\[0\]\[1\] is nan"),
    ],
)
def test_answers_of_another_shape_or_kind_are_refused(answers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cons_at_k(answers, [[1, 0]])


def test_no_resamples_are_refused() -> None:
    with pytest.raises(ValueError, match="num_resamples is 0"):
        bootstrap_pass_at_k([[1]], 1, np.random.default_rng(0), num_resamples=0)


def test_votes_of_an_uneven_table_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 2\] samples per problem"):
        majority_votes([["a"], ["a", "b"]])
