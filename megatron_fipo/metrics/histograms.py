"""Histograms as counts between edges, from raw values or from counts that a loss made on its device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_BINS = 64
SUFFIX = "_histogram"  # of a record's entries that hold {"edges": [n + 1], "counts": [n]}


@dataclass(frozen=True)
class Histogram:
    """`counts` [n] of values between `edges` [n + 1]. The moments are exact for raw values; of counts that were given
    as such they are those of the bins' middles."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]
    total: float
    total_of_squares: float


def histogram_of(name: str, values: Sequence[float] | np.ndarray | Mapping[str, Any]) -> Histogram | None:
    """The histogram of raw numbers in at most 64 equal bins, or of {"edges", "counts"} as it is; None of no value.

    Raises ValueError naming `name` for what is neither, or not finite.
    """
    if isinstance(values, Mapping):
        return _of_counts(name, values)
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(array).all():
        raise ValueError(f"histogram {name!r} holds {array[~np.isfinite(array)][0]}, but must hold finite numbers")
    if array.size == 0:
        return None
    low, high = float(array.min()), float(array.max())
    if low == high:
        half = max(0.5, float(np.spacing(abs(low))))  # 0.5 is nothing beside a number of 2^53
        low, high = low - half, high + half
    num_bins = min(MAX_BINS, len(np.unique(array)))
    if not (np.diff(np.linspace(low, high, num_bins + 1)) > 0).all():
        num_bins = 1  # values too near to one another for an edge between them: 0.3 and 0.1 + 0.2
    counts, edges = np.histogram(array, bins=num_bins, range=(low, high))
    return Histogram(_floats(edges), _floats(counts), float(array.sum()), float(np.square(array).sum()))


def _of_counts(name: str, values: Mapping[str, Any]) -> Histogram | None:
    if not {"edges", "counts"} <= values.keys():
        raise ValueError(f"histogram {name!r} holds {sorted(values)}, but must hold edges and counts")
    edges, counts = (np.asarray(values[key], dtype=np.float64) for key in ("edges", "counts"))
    if edges.ndim != 1 or edges.size < 2 or counts.shape != (edges.size - 1,):
        raise ValueError(f"histogram {name!r} has {edges.size} edges and {counts.size} counts, but must have one more")
    if not (np.isfinite(edges).all() and np.isfinite(counts).all() and (np.diff(edges) > 0).all()):
        raise ValueError(f"histogram {name!r} must have rising, finite edges and finite counts")
    if counts.sum() == 0:
        return None
    middles = (edges[:-1] + edges[1:]) / 2
    return Histogram(_floats(edges), _floats(counts), float(counts @ middles), float(counts @ np.square(middles)))


def _floats(array: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in array)
