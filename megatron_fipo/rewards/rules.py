"""Rewards that compare strings. Each takes a response and its ground truth and returns a RewardResult."""

from __future__ import annotations

import re
from typing import Any

from megatron_fipo.types import RewardResult

WHOLE_NUMBER = re.compile(r"-?[0-9]{1,30}")


def small_arithmetic(response: str, ground_truth: str, **extra: Any) -> RewardResult:
    """1 if the whole response is the number, an optional full stop after it, and then the end of the turn; else 0.

    `extra["finish_reason"]` "length" means the turn did not end. White space around the response does not count.
    """
    answer = response.strip().removesuffix(".")
    if not WHOLE_NUMBER.fullmatch(answer):
        return RewardResult(0.0, 0.0, None)
    right = float(answer == ground_truth and extra.get("finish_reason", "stop") == "stop")
    return RewardResult(right, right, answer)


def exact(response: str, ground_truth: str, **extra: Any) -> RewardResult:
    """1 if response and ground truth are the same text, white space around them aside; else 0."""
    answer = response.strip()
    right = float(answer == ground_truth.strip())
    return RewardResult(right, right, answer or None)
