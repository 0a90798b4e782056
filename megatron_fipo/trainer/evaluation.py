"""Evaluation on held-out problems: the same function before, during and after training, and without any."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fipo.data.prompts import Tokenizer
from megatron_fipo.data_config import OnRewardError
from megatron_fipo.trainer.evaluation_result import EvaluatedProblem, EvaluatedResponse, EvaluationResult, summary
from megatron_fipo.trainer.generation import Generate, Grader, RewardFailed, generate_groups, grade_groups
from megatron_fipo.types import GraderError, Prompt, Sample, SamplingSettings

__all__ = ["EvaluationResult", "answer_problems", "evaluate", "evaluation_result", "summary"]

EVALUATION_STEP = -1  # stands for the step in the sampling seeds: every evaluation of a run draws with the same ones


def evaluate(
    name: str,
    prompts: Sequence[Prompt],
    generate: Generate,
    tokenizer: Tokenizer,
    grader: Grader,
    *,
    sampling: SamplingSettings,
    n_samples: int,
    seed: int,
    on_reward_error: OnRewardError,
) -> EvaluationResult:
    """Draw `n_samples` responses to every prompt of the data set `name` and score them.

    The sampling seeds depend on `seed`, the problem and the sample alone, so two evaluations differ by the weights.
    Raises ValueError when there is no prompt; RewardFailed when a grader gives no verdict and `on_reward_error` is
    "fail", and in any case when it gives none on any response.
    """
    problems = answer_problems(
        prompts,
        generate,
        tokenizer,
        grader,
        sampling=sampling,
        n_samples=n_samples,
        seed=seed,
        on_reward_error=on_reward_error,
    )
    return evaluation_result(name, problems, seed)


def answer_problems(
    prompts: Sequence[Prompt],
    generate: Generate,
    tokenizer: Tokenizer,
    grader: Grader,
    *,
    sampling: SamplingSettings,
    n_samples: int,
    seed: int,
    on_reward_error: OnRewardError,
) -> tuple[EvaluatedProblem, ...]:
    """The responses to `prompts`, graded without the overlong penalty; what `evaluate` scores."""
    completions = generate_groups(
        prompts, generate, sampling=sampling, num_samples=n_samples, seed=seed, step=EVALUATION_STEP
    )
    groups = grade_groups(prompts, completions, tokenizer, grader, on_error=on_reward_error)
    return tuple(
        EvaluatedProblem(
            uid=group.prompt.problem.uid,
            prompt=tokenizer.decode(group.prompt.token_ids.tolist(), skip_special_tokens=True),
            ground_truth=group.prompt.problem.ground_truth,
            responses=tuple(_response(sample) for sample in group.samples),
        )
        for group in groups
    )


def evaluation_result(name: str, problems: Sequence[EvaluatedProblem], seed: int) -> EvaluationResult:
    """The result of answered problems. Raises ValueError when there is none, RewardFailed when none was graded."""
    if not problems:
        raise ValueError(
            f"there is nothing to evaluate on in {name!r}: give --eval-prompt-data with prompts that are not left out, "
            "or a --task"
        )
    assert len({len(problem.responses) for problem in problems}) == 1, "problems have different numbers of responses"
    result = EvaluationResult(name, tuple(problems), seed)
    if len(result.errors) == len(problems) * result.num_samples:
        raise RewardFailed(
            f"the reward gave no verdict on any of the {len(result.errors)} responses of {name!r}; the first: "
            f"{result.errors[0]}"
        )
    return result


def _response(sample: Sample) -> EvaluatedResponse:
    result = sample.result
    if isinstance(result, GraderError):
        accuracy, score, answer, error = 0.0, None, None, f"{result.kind}: {result.message}"
    else:
        accuracy, score, answer, error = result.accuracy, result.score, (result.answer or "").strip() or None, None
    return EvaluatedResponse(
        text=sample.text,
        num_tokens=len(sample.response_ids),
        finish_reason=sample.finish_reason,
        accuracy=accuracy,
        score=score,
        answer=answer,
        error=error,
    )
