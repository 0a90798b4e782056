"""Group-relative advantages and DAPO's overlong penalty: plain numbers, before any tensor exists."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ADVANTAGE_EPSILON = 1e-6


def group_advantages(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
    """(reward - mean) / (std + 1e-6) over the G samples of one prompt, std with ddof 1 (GRPO, arXiv 2402.03300).

    rewards: [G], score plus overlong penalty. Returns [G] float64. Raises ValueError unless G >= 2 and all are finite.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"rewards have shape {values.shape}, but must be [G] with G >= 2 (--n-samples-per-prompt)")
    if not np.isfinite(values).all():
        raise ValueError(f"rewards are {values.tolist()}, but must be finite")
    if (values == values[0]).all():  # rounding of the mean would show, divided by 1e-6
        return np.zeros_like(values)
    advantages: np.ndarray = (values - values.mean()) / (values.std(ddof=1) + ADVANTAGE_EPSILON)
    return advantages


def overlong_penalty(response_len: int, max_response_len: int, buffer_len: int, factor: float) -> float:
    """min(-(response_len - (max_response_len - buffer_len)) / buffer_len * factor, 0) (DAPO, arXiv 2503.14476, eq. 13).

    Lengths in tokens: 0 up to the buffer, then falling linearly to -factor at the limit. Raises ValueError unless
    0 < buffer_len <= max_response_len.
    """
    if not 0 < buffer_len <= max_response_len:
        raise ValueError(
            f"--overlong-buffer-len is {buffer_len}, but must be in (0, --rollout-max-response-len"
            f" ({max_response_len})]"
        )
    excess = response_len - (max_response_len - buffer_len)
    return -(excess / buffer_len * factor) if excess > 0 else 0.0
