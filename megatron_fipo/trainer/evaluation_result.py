"""What an evaluation found, as plain values: responses with their verdicts, and the scores made of them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_fipo.metrics.scores import (
    avg_at_k,
    bootstrap_cons_at_k,
    bootstrap_pass_at_k,
    cons_at_k,
    expected_cons_at_k,
    pass_at_k,
)
from megatron_fipo.types import FinishReason

NUM_EXAMPLES = 4


@dataclass(frozen=True)
class Example:
    """One graded response, to be shown."""

    uid: str
    prompt: str  # as the model saw it, special tokens aside
    response: str
    ground_truth: str
    accuracy: float


@dataclass(frozen=True)
class EvaluatedResponse:
    """One response and its verdict. Where the grader failed, `error` says how and the response counts as not right."""

    text: str
    num_tokens: int
    finish_reason: FinishReason
    accuracy: float
    score: float | None  # None where there is no verdict
    answer: str | None  # as it votes: white space around it gone; None: it does not
    error: str | None = None


@dataclass(frozen=True)
class EvaluatedProblem:
    """A problem and the responses to it, in the order of the samples."""

    uid: str
    prompt: str  # as the model saw it, special tokens aside
    ground_truth: str
    responses: tuple[EvaluatedResponse, ...]


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """What the evaluation on one data set found. `seed` is that of the bootstrap estimates.

    Every problem has the same number of responses. Means are over all responses.
    """

    name: str
    problems: tuple[EvaluatedProblem, ...]
    seed: int

    @property
    def num_samples(self) -> int:
        """Responses per problem."""
        return len(self.problems[0].responses)

    @property
    def accuracies(self) -> np.ndarray:
        """[problems, samples] float64."""
        return np.array([[response.accuracy for response in problem.responses] for problem in self.problems])

    @property
    def answers(self) -> list[list[str | None]]:
        """[problems][samples], as they vote."""
        return [[response.answer for response in problem.responses] for problem in self.problems]

    @property
    def accuracy(self) -> float:
        """avg@k."""
        return avg_at_k(self.accuracies)

    @property
    def score(self) -> float:
        """The mean reward of the responses that were graded, without the overlong penalty."""
        return float(np.mean([response.score for response in self._responses if response.score is not None]))

    @property
    def response_length(self) -> float:
        """Tokens."""
        return float(np.mean([response.num_tokens for response in self._responses]))

    @property
    def truncated_fraction(self) -> float:
        """Of the responses, those that the length limit ended."""
        return float(np.mean([response.finish_reason == "length" for response in self._responses]))

    @property
    def errors(self) -> tuple[str, ...]:
        """Why responses could not be graded, one entry per such response."""
        return tuple(response.error for response in self._responses if response.error is not None)

    @property
    def has_votes(self) -> bool:
        """Whether cons@k says anything: not where responses are right and the reward names no answer for any."""
        return any(response.answer is not None for response in self._responses) or not self.accuracies.any()

    @property
    def examples(self) -> tuple[Example, ...]:
        """The first problems' first responses."""
        return tuple(
            Example(
                uid=f"{problem.uid}/0",
                prompt=problem.prompt,
                response=problem.responses[0].text,
                ground_truth=problem.ground_truth,
                accuracy=problem.responses[0].accuracy,
            )
            for problem in self.problems[:NUM_EXAMPLES]
        )

    def metrics(self) -> dict[str, float]:
        """The scalars under their logged names, each beginning with the data set's.

        With n responses per problem: avg@n, pass@k for n and the powers of two below, cons@k for the same k from 2 (and
        cons@1 when n is 1) where there are votes, and from k = 2 the bootstrap estimates of both.
        """
        return {f"{self.name}/{name}": value for name, value in self.scores.items()}

    @cached_property
    def scores(self) -> dict[str, float]:
        """`metrics` without the data set's name before each."""
        n, accuracies, answers = self.num_samples, self.accuracies, self.answers
        found: dict[str, float] = {f"avg@{n}": self.accuracy}
        for k in subset_sizes(n):
            found[f"pass@{k}"] = pass_at_k(accuracies, k)
            if k > 1:
                best = bootstrap_pass_at_k(accuracies, k, self._generator("pass", k))
                found[f"pass@{k}/bootstrap_mean"], found[f"pass@{k}/bootstrap_std"] = best
        if self.has_votes:
            for k in subset_sizes(n):
                if k == n:
                    found[f"cons@{k}"] = cons_at_k(answers, accuracies)
                elif k > 1:
                    found[f"cons@{k}"] = expected_cons_at_k(answers, accuracies, k)
                if k > 1:
                    majority = bootstrap_cons_at_k(answers, accuracies, k, self._generator("cons", k))
                    found[f"cons@{k}/bootstrap_mean"], found[f"cons@{k}/bootstrap_std"] = majority
        found |= {
            "score/mean": self.score,
            "response_length/mean": self.response_length,
            "response_length/truncated_fraction": self.truncated_fraction,
            "num_reward_errors": float(len(self.errors)),
        }
        return found

    def line(self) -> str:
        """One line for the person watching; reward errors stand out."""
        n, found = self.num_samples, self.scores
        names = [name for name in (f"avg@{n}", f"cons@{n}", f"pass@{n}") if name in found]
        text = ", ".join(f"{name} {found[name]:.3f}" for name in names) if n > 1 else f"accuracy {self.accuracy:.3f}"
        text = f"{self.name}: {text} on {len(self.problems)} problems, mean response {self.response_length:.1f} tokens"
        if self.errors:
            text += (
                f"; WARNING: the reward gave no verdict on {len(self.errors)} responses, which count as not right; the "
                f"first: {self.errors[0]}"
            )
        return text

    @property
    def _responses(self) -> list[EvaluatedResponse]:
        return [response for problem in self.problems for response in problem.responses]

    def _generator(self, what: str, k: int) -> np.random.Generator:
        """For one estimate, whichever others are made."""
        return np.random.default_rng([self.seed, zlib.crc32(f"{self.name} {what}".encode()), k])


def summary(results: Sequence[EvaluationResult]) -> dict[str, float]:
    """An evaluation in a few numbers: means over its data sets, each data set weighing the same.

    `accuracy` is the mean of avg@k; `num_reward_errors` is a sum.
    """
    return {
        "accuracy": float(np.mean([result.accuracy for result in results])),
        "score/mean": float(np.mean([result.score for result in results])),
        "response_length/mean": float(np.mean([result.response_length for result in results])),
        "response_length/truncated_fraction": float(np.mean([result.truncated_fraction for result in results])),
        "num_reward_errors": float(sum(len(result.errors) for result in results)),
    }


def subset_sizes(n: int) -> list[int]:
    """The powers of two below n, and n."""
    return [2**i for i in range((n - 1).bit_length())] + [n]
