"""Evaluation on held-out problems: the same function before, during and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_fipo.data.prompts import Tokenizer
from megatron_fipo.trainer.sampling import Generate, Grader, generate_groups, grade_groups
from megatron_fipo.types import Prompt, SamplingSettings

EVALUATION_STEP = -1  # stands for the step in the sampling seeds: every evaluation of a run draws with the same ones
NUM_EXAMPLES = 4


@dataclass(frozen=True)
class Example:
    """One graded response, to be shown."""

    uid: str
    prompt: str  # as the model saw it, special tokens aside
    response: str
    ground_truth: str
    accuracy: float


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """What an evaluation found. Means are over all responses."""

    accuracy: float
    score: float
    accuracies: np.ndarray  # [problems, samples] float64, in the order of the problems
    response_length: float  # tokens
    truncated_fraction: float  # responses that the length limit ended
    examples: tuple[Example, ...]  # the first problems' first responses

    def metrics(self) -> dict[str, float]:
        """The scalars under their logged names."""
        return {
            "eval/accuracy": self.accuracy,
            "eval/score/mean": self.score,
            "eval/response_length/mean": self.response_length,
            "eval/response_length/truncated_fraction": self.truncated_fraction,
        }


def evaluate(
    prompts: Sequence[Prompt],
    generate: Generate,
    tokenizer: Tokenizer,
    grader: Grader,
    *,
    sampling: SamplingSettings,
    n_samples: int,
    seed: int,
) -> EvaluationResult:
    """Draw `n_samples` responses to every prompt and grade them, without the overlong penalty.

    The sampling seeds depend on `seed`, the problem and the sample alone, so two evaluations differ by the weights.
    Raises ValueError when there is no prompt, RewardFailed when a grader fails.
    """
    if not prompts:
        raise ValueError("there is nothing to evaluate on: give --eval-prompt-data, or a --task")
    completions = generate_groups(
        prompts, generate, sampling=sampling, num_samples=n_samples, seed=seed, step=EVALUATION_STEP
    )
    groups = grade_groups(prompts, completions, tokenizer, grader)
    samples = [sample for group in groups for sample in group.samples]
    accuracies = np.array([[sample.result.accuracy for sample in group.samples] for group in groups])
    return EvaluationResult(
        accuracy=float(accuracies.mean()),
        score=float(np.mean([sample.result.score for sample in samples])),
        accuracies=accuracies,
        response_length=float(np.mean([len(sample.response_ids) for sample in samples])),
        truncated_fraction=float(np.mean([sample.finish_reason == "length" for sample in samples])),
        examples=tuple(
            Example(
                uid=group.samples[0].uid,
                prompt=tokenizer.decode(group.prompt.token_ids.tolist(), skip_special_tokens=True),
                response=group.samples[0].text,
                ground_truth=group.prompt.problem.ground_truth,
                accuracy=group.samples[0].result.accuracy,
            )
            for group in groups[:NUM_EXAMPLES]
        ),
    )
