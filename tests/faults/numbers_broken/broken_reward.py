"""A reward of the user's own that returns what it is told to."""

from __future__ import annotations

from megatron_fipo.types import RewardResult


def reward(response: str, ground_truth: str, **extra: object) -> RewardResult:
    """The ground truth as the score."""
    return RewardResult(float(ground_truth), 1.0, None)
