"""What is made of a rollout batch's groups: advantages, the sequences to train on, and the numbers to log."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_fipo.config import PartialTokens
from megatron_fipo.losses.advantages import group_advantages
from megatron_fipo.types import GraderError, Group, Prompt, RewardResult, Sample, TrainSequence

ROUNDING = 1e-9  # accuracies that a reward summed up in two orders are the same


def make_train_sequences(groups: Sequence[Group], *, older_tokens: PartialTokens) -> list[TrainSequence]:
    """Every sample as prompt + response, with its group advantage on the positions that predict the response.

    Masked are tokens that the policy did not draw, and all tokens of a sample that could not be graded. In a response
    that several versions of the weights drew, `older_tokens` "mask" also masks what any but the newest of them drew;
    "correct" trains on all of it. A response of one version, however old, is trained on whole.
    """
    return [
        _train_sequence(group.prompt, sample, float(advantage), older_tokens)
        for group in groups
        for sample, advantage in zip(group.samples, advantages_of(group), strict=True)
    ]


def advantages_of(group: Group) -> np.ndarray:
    """[G] float64: group advantages over the graded samples' rewards; 0 for the others, and for one graded alone.

    Raises ValueError naming the problem when a reward is not finite, or so large that the spread is not.
    """
    graded = np.array([isinstance(sample.result, RewardResult) for sample in group.samples], dtype=bool)
    advantages = np.zeros(len(graded))
    if graded.sum() >= 2:
        rewards = np.array([sample.reward for sample in group.samples], dtype=np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            spread = float(rewards[graded].std(ddof=1))
        if not np.isfinite(spread):
            raise ValueError(
                f"the rewards of problem {group.prompt.problem.uid} are {rewards[graded].tolist()}, but must be finite "
                "and have a finite spread"
            )
        advantages[graded] = group_advantages(rewards[graded])
    return advantages


def is_informative(group: Group) -> bool:
    """Whether the graded samples' accuracies are not all equal (then not all advantages are 0, the penalty aside)."""
    accuracies = accuracies_of(group)
    return len(accuracies) > 1 and max(accuracies) - min(accuracies) > ROUNDING


def accuracies_of(group: Group) -> list[float]:
    """The graded samples' accuracies."""
    return [sample.result.accuracy for sample in group.samples if isinstance(sample.result, RewardResult)]


def rollout_metrics(groups: Sequence[Group], max_response_len: int) -> dict[str, float]:
    """A rollout batch in the authors' names. Raises ValueError when none of its samples could be graded.

    Accuracy, score and reward are over graded samples, lengths over all; a length counts every token of a response, a
    tool's included. Advantages and returns are averaged over the tokens that the policy drew of graded samples, as in
    the authors' code (`advantage/token_mean` is the same number under the name of the paper's figure).
    `response_length/clip_ratio` is the share of responses that are `max_response_len` long, `truncation_rate` of those
    that the limit ended; `num_partial_samples` counts those that several versions of the weights drew.
    """
    samples = [sample for group in groups for sample in group.samples]
    graded = [(sample, sample.result) for sample in samples if isinstance(sample.result, RewardResult)]
    if not graded:
        raise ValueError("none of the batch's responses could be graded: there is nothing to learn from")
    lengths = np.array([len(sample.response_ids) for sample in samples], dtype=np.float64)
    drawn = np.array(
        [0 if isinstance(sample.result, GraderError) else sample.loss_mask.sum() for sample in samples], np.float64
    )
    advantages = np.concatenate([advantages_of(group) for group in groups])
    of_tokens = {
        "mean": float((advantages * drawn).sum() / max(drawn.sum(), 1.0)),
        "max": float(advantages.max()),
        "min": float(advantages.min()),
    }
    q25, median, q75 = np.quantile(lengths, [0.25, 0.5, 0.75])
    return {
        "num_samples": len(samples),
        "accuracy": float(np.mean([result.accuracy for _, result in graded])),
        **_spread("score", np.array([result.score for _, result in graded])),
        **_spread("reward", np.array([sample.reward for sample, _ in graded])),
        **{f"advantage/{name}": value for name, value in of_tokens.items()},
        **{f"return/{name}": value for name, value in of_tokens.items()},
        "advantage/token_mean": of_tokens["mean"],
        **_spread("response_length", lengths),
        "response_length/median": float(median),
        "response_length/q25": float(q25),
        "response_length/q75": float(q75),
        "response_length/clip_ratio": float(np.mean(lengths >= max_response_len)),
        "truncation_rate": float(np.mean([sample.finish_reason == "length" for sample in samples])),
        "num_partial_samples": sum(len(versions_of(sample)) > 1 for sample in samples),
        "prompt_length/mean": float(np.mean([len(group.prompt.token_ids) for group in groups for _ in group.samples])),
    }


def versions_of(sample: Sample) -> list[int]:
    """The versions of the weights that drew the sample's tokens, oldest first."""
    return [int(version) for version in np.unique(sample.token_versions[sample.loss_mask])]


def _train_sequence(prompt: Prompt, sample: Sample, advantage: float, older_tokens: PartialTokens) -> TrainSequence:
    num_prompt, num_response = len(prompt.token_ids), len(sample.response_ids)
    assert num_prompt >= 1, sample.uid
    predicting = slice(num_prompt - 1, num_prompt - 1 + num_response)  # entry i is about token i + 1
    loss_mask = np.zeros(num_prompt + num_response, dtype=bool)
    loss_mask[predicting] = _trained_on(sample, older_tokens)
    rollout_logprobs = np.zeros(loss_mask.shape, dtype=np.float32)
    rollout_logprobs[predicting] = sample.rollout_logprobs
    bad = np.flatnonzero(loss_mask & ~np.isfinite(rollout_logprobs))
    if len(bad):
        raise ValueError(
            f"sample {sample.uid}: the engine's log-prob of token {bad[0] - num_prompt + 1} of the response is "
            f"{rollout_logprobs[bad[0]]}, but must be finite"
        )
    token_versions = np.full(loss_mask.shape, -1, dtype=np.int64)
    token_versions[predicting] = sample.token_versions
    return TrainSequence(
        uid=sample.uid,
        token_ids=np.concatenate([prompt.token_ids, sample.response_ids]),
        loss_mask=loss_mask,
        advantages=np.where(loss_mask, np.float32(advantage), np.float32(0.0)),
        rollout_logprobs=np.where(loss_mask, rollout_logprobs, np.float32(0.0)),
        token_versions=np.where(loss_mask, token_versions, -1),
    )


def _trained_on(sample: Sample, older_tokens: PartialTokens) -> np.ndarray:
    """[R] bool: the tokens that carry a loss."""
    if isinstance(sample.result, GraderError):
        return np.zeros(len(sample.response_ids), dtype=bool)
    versions = versions_of(sample)
    if older_tokens == "correct" or len(versions) < 2:
        return sample.loss_mask
    return sample.loss_mask & (sample.token_versions == versions[-1])


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    return {
        f"{name}/mean": float(values.mean()),
        f"{name}/max": float(values.max()),
        f"{name}/min": float(values.min()),
    }
