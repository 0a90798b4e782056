"""Means and paired differences over seeds, with 95 % confidence intervals from Student's t distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# the 0.975 quantile of Student's t with 1, 2, ... 30 degrees of freedom
T_QUANTILES = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds and its 95 % confidence interval, from `mean - half_width` to `mean + half_width`."""

    mean: float
    half_width: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return abs(self.mean) > self.half_width


def mean_estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """mean +- t(0.975, n - 1) s / sqrt(n), s with ddof 1. Raises ValueError unless 2 <= n <= 31."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not 2 <= array.size <= len(T_QUANTILES) + 1:
        raise ValueError(f"there are values of shape {array.shape}, but must be 2 to {len(T_QUANTILES) + 1} seeds")
    spread = float(array.std(ddof=1)) / array.size**0.5
    return Estimate(float(array.mean()), T_QUANTILES[array.size - 2] * spread, array.size)


def paired_difference(values: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray) -> Estimate:
    """`values` minus `others`, seed by seed: what the seeds have in common cancels. Raises ValueError as above."""
    first, second = np.asarray(values, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"{first.shape} values cannot be paired with {second.shape}")
    return mean_estimate(first - second)
