"""avg@k, pass@k and cons@k of graded answers, exact and as bootstrap estimates. docs/evaluation.md has the formulas.

Everything is on [problems, samples]: `correct` holds accuracies in [0, 1] (bools will do), `answers` the answers
extracted, in the same order, None where there was none. Answers are compared as they are: normalise them before.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 1000

Answers = Sequence[Sequence[Hashable]] | npt.NDArray[Any]
"""[problems][samples]: texts (or anything else that can be counted), None for no answer."""


class Estimate(NamedTuple):
    """A bootstrap estimate: the mean over problems of each problem's mean and standard deviation over resamples."""

    mean: float
    std: float


class Vote(NamedTuple):
    """A majority vote: the answer that won (None when nobody voted), and the share of all samples that gave it."""

    answer: Any
    share: float


def avg_at_k(correct: npt.ArrayLike) -> float:
    """avg@k: the mean accuracy of all k samples of all problems.

    Raises ValueError for `correct` that is not [problems, samples], is empty, or holds what is no number in [0, 1].
    """
    return float(_checked(correct).mean())


def pass_at_k(correct: npt.ArrayLike, k: int) -> float:
    """pass@k: the probability that the best of k of a problem's n samples is right; at k = n, whether any is.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) with c of n right (Chen et al., arXiv 2107.03374, eq. 1), averaged
    over problems. Accuracies between 0 and 1 make it the expected maximum over all subsets of k samples.
    Raises ValueError as `avg_at_k`, and for k that is no whole number from 1 to n.
    """
    values = np.sort(_checked(correct), axis=1)
    n = values.shape[1]
    k = _checked_k(k, n)
    # The i-th smallest of n is the largest of C(i - 1, k - 1) of the C(n, k) subsets: from the largest down, each
    # weight is the one before times (i - k) / (i - 1), so nothing overflows and nothing cancels.
    weights = np.zeros(n)
    weights[n - 1] = k / n
    for i in range(n, k, -1):
        weights[i - 2] = weights[i - 1] * (i - k) / (i - 1)
    return float((values @ weights).mean())


def cons_at_k(answers: Answers, correct: npt.ArrayLike) -> float:
    """cons@k: the accuracy of the most frequent answer among all k samples, averaged over problems.

    Of answers that are equally frequent the one that comes first among the samples wins: samples are exchangeable, so
    that favours none of them. A None casts no vote; a problem without any vote is wrong. The accuracy of an answer is
    the mean accuracy of the samples that gave it.
    Raises ValueError as `avg_at_k`, and for answers of another shape than `correct`.
    """
    values = _checked(correct)
    rows = _checked_answers(answers, values.shape)
    return float(np.mean([_worth(row, accuracies)[_winner(row)] for row, accuracies in zip(rows, values)]))


def expected_cons_at_k(answers: Answers, correct: npt.ArrayLike, k: int) -> float:
    """cons@k of k of a problem's n samples: the mean over all C(n, k) subsets, averaged over problems; exact.

    Answers that tie in a subset share it equally, which is what drawing the samples in a random order and taking the
    first comes to. So at k = n it differs from `cons_at_k` where all n samples end in a tie.
    Raises ValueError as `cons_at_k`, and for k that is no whole number from 1 to n.
    """
    values = _checked(correct)
    rows = _checked_answers(answers, values.shape)
    k = _checked_k(k, values.shape[1])
    return float(np.mean([_expected_majority(row, accuracies, k) for row, accuracies in zip(rows, values)]))


def bootstrap_pass_at_k(
    correct: npt.ArrayLike, k: int, rng: np.random.Generator, *, num_resamples: int = NUM_RESAMPLES
) -> Estimate:
    """The best of k samples drawn with replacement from a problem's n, as DAPO's code estimates it (`best@k`).

    Below the unbiased `pass_at_k`, since a sample may be drawn twice. Raises ValueError as `pass_at_k`.
    """
    values = _checked(correct)
    k = _checked_k(k, values.shape[1])
    drawn = [row[_resamples(row.size, k, rng, num_resamples)].max(axis=1) for row in values]
    return _estimate(drawn)


def bootstrap_cons_at_k(
    answers: Answers,
    correct: npt.ArrayLike,
    k: int,
    rng: np.random.Generator,
    *,
    num_resamples: int = NUM_RESAMPLES,
) -> Estimate:
    """The majority of k samples drawn with replacement from a problem's n, as DAPO's code estimates it (`maj@k`).

    Ties and missing answers as in `cons_at_k`: the first drawn wins. Raises ValueError as `expected_cons_at_k`.
    """
    values = _checked(correct)
    rows = _checked_answers(answers, values.shape)
    k = _checked_k(k, values.shape[1])
    drawn = []
    for row, accuracies in zip(rows, values):
        codes, worth = _coded(row), _worth(row, accuracies)
        picks = _resamples(len(row), k, rng, num_resamples)
        chosen = codes[picks]  # [resamples, k]
        num_codes = len(row) + 1
        offsets = chosen + num_codes * np.arange(num_resamples)[:, None]
        counts = np.bincount(offsets.ravel(), minlength=num_codes * num_resamples)[offsets]
        winners = np.where(chosen == 0, 0, counts).argmax(axis=1)  # the first of the largest
        drawn.append(worth[picks[np.arange(num_resamples), winners]])
    return _estimate(drawn)


def majority_votes(answers: Answers) -> list[Vote]:
    """Each problem's vote, by the rule of `cons_at_k`. Raises ValueError for answers that are not [problems, samples].

    The share is out of all samples, those without an answer included.
    """
    votes = []
    for row in _checked_answers(answers, None):
        winner = row[_winner(row)]
        votes.append(Vote(winner, 0.0 if winner is None else row.count(winner) / len(row)))
    return votes


def _checked(correct: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """`correct` as [problems, samples] float64."""
    try:
        values = np.asarray(correct, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"correct must be numbers in [0, 1] as [problems, samples], every problem with as many samples: {error}"
        ) from None
    if values.ndim != 2 or values.size == 0:
        raise ValueError(
            f"correct has the shape {list(values.shape)}, but must be [problems, samples], at least one of each"
        )
    bad = np.argwhere(~((values >= 0) & (values <= 1)))  # NaN is among them
    if len(bad):
        problem, sample = bad[0]
        raise ValueError(
            f"correct[{problem}, {sample}] is {values[problem, sample]}, but accuracies must lie in [0, 1]"
        )
    return values


def _checked_k(k: int, n: int) -> int:
    if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k <= n:
        raise ValueError(f"k is {k!r}, but must be a whole number from 1 to the number of samples per problem ({n})")
    return int(k)


def _checked_answers(answers: Answers, shape: tuple[int, ...] | None) -> list[list[Any]]:
    """Rows of answers; `shape` is what they must have, None: any [problems, samples]."""
    if isinstance(answers, str) or any(isinstance(row, str) or not hasattr(row, "__len__") for row in answers):
        raise ValueError("answers must be [problems, samples]: one list of answers per problem")
    rows = [list(row) for row in answers]
    lengths = {len(row) for row in rows}
    if shape is None and (len(lengths) != 1 or 0 in lengths):
        raise ValueError(f"answers hold {sorted(lengths)} samples per problem, but must hold one number of them, >= 1")
    if shape is not None and (len(rows) != shape[0] or lengths != {shape[1]}):
        raise ValueError(
            f"answers are of {len(rows)} problems with {sorted(lengths)} samples, but correct has the shape "
            f"{list(shape)}"
        )
    for i, row in enumerate(rows):
        for j, answer in enumerate(row):
            if not isinstance(answer, Hashable) or answer != answer:  # noqa: PLR0124 - a NaN equals nothing
                raise ValueError(f"answers[{i}][{j}] is {answer!r}, but must be a text, or None for no answer")
    return rows


def _winner(row: list[Any]) -> int:
    """The place of the first sample with the winning answer; 0 when nobody voted."""
    counts = Counter(answer for answer in row if answer is not None)
    if not counts:
        return 0
    return row.index(max(counts, key=counts.__getitem__))  # the first of the largest: Counter keeps the order


def _worth(row: list[Any], accuracies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[samples]: what each sample's answer is worth when it wins."""
    codes = _coded(row)
    sums = np.bincount(codes, weights=accuracies, minlength=len(row) + 1)
    means = sums / np.maximum(1, np.bincount(codes, minlength=len(row) + 1))
    means[0] = 0.0
    return means[codes]


def _coded(row: list[Any]) -> npt.NDArray[np.int64]:
    """[samples]: equal answers as equal numbers >= 1; 0 is no answer."""
    numbers: dict[Any, int] = {None: 0}
    return np.array([numbers.setdefault(answer, len(numbers)) for answer in row])


def _expected_majority(row: list[Any], accuracies: npt.NDArray[np.float64], k: int) -> float:
    """The mean worth of the winner over all subsets of k samples.

    How often each answer is drawn has the multivariate hypergeometric distribution: that of independent binomials of
    success probability k/n (any would do; this one underflows last), given that they add up to k. For each number of
    votes v that wins, a recurrence over the answers that can have v carries, by votes given out and number of answers
    with exactly v, the probability and the expected sum of what those answers are worth. All else, samples without an
    answer among it, is one binomial.
    """
    n = len(row)
    worth = dict(zip(row, _worth(row, accuracies).tolist()))
    counts = Counter(answer for answer in row if answer is not None)
    total = 0.0
    for votes in range(1, min(k, max(counts.values(), default=0)) + 1):
        able = [answer for answer, count in counts.items() if count >= votes]
        probability = np.zeros((k + 1, min(k // votes, len(able)) + 1))  # [votes given out, answers with `votes`]
        probability[0, 0] = 1.0
        sums = np.zeros_like(probability)
        for answer in able:
            chances = _binomial(counts[answer], k / n)
            next_probability, next_sums = np.zeros_like(probability), np.zeros_like(sums)
            for count in range(votes):
                next_probability[count:] += chances[count] * probability[: k + 1 - count]
                next_sums[count:] += chances[count] * sums[: k + 1 - count]
            came, carried = probability[: k + 1 - votes, :-1], sums[: k + 1 - votes, :-1]
            next_probability[votes:, 1:] += chances[votes] * came
            next_sums[votes:, 1:] += chances[votes] * (carried + worth[answer] * came)
            probability, sums = next_probability, next_sums
        shared = (sums[:, 1:] / np.arange(1, sums.shape[1])).sum(axis=1)  # the tied answers share alike
        rest = _binomial(n - sum(counts[answer] for answer in able), k / n)[: k + 1]
        total += float(np.dot(shared[::-1][: len(rest)], rest))
    return total / float(_binomial(n, k / n)[k])


@lru_cache(maxsize=4096)
def _binomial(count: int, chance: float) -> npt.NDArray[np.float64]:
    """[count + 1]: the probabilities of 0 to `count` successes."""
    if chance == 1:
        return np.eye(1, count + 1, count)[0]
    logs = [
        math.lgamma(count + 1)
        - math.lgamma(i + 1)
        - math.lgamma(count - i + 1)
        + i * math.log(chance)
        + (count - i) * math.log1p(-chance)
        for i in range(count + 1)
    ]
    return np.exp(logs)


def _resamples(n: int, k: int, rng: np.random.Generator, num_resamples: int) -> npt.NDArray[np.int64]:
    """[resamples, k]: places of samples drawn with replacement."""
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}, but must be >= 1")
    return rng.integers(n, size=(num_resamples, k))


def _estimate(drawn: Sequence[npt.NDArray[np.float64]]) -> Estimate:
    """From [problems][resamples]."""
    return Estimate(
        float(np.mean([values.mean() for values in drawn])), float(np.mean([values.std() for values in drawn]))
    )
