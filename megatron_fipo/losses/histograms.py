"""Histograms of an update's tokens over the whole mini-batch, as numbers that JSON can hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from megatron_fipo.config import FIPOSettings, PPOSettings
from megatron_fipo.losses.update_metrics import TokenStats

NUM_INFLUENCE_BINS = 30
# the middle bin holds ratio 1; the outer ones also all that lies beyond them, such as tokens past the dual clip
RATIO_EDGES = np.geomspace(1 / 20, 20, 32)


def update_histograms(token_stats: TokenStats, settings: PPOSettings) -> dict[str, dict[str, list[Any]]]:
    """ratio_histogram of r and, where there are influence weights, influence_weights_histogram of f.

    Each {"edges": num_bins + 1 floats, "counts": num_bins integers}, over all response tokens before any drop; the
    counts add up to their number. Bins of f are equal, from influence_low to influence_high; those of r grow by a
    factor.
    """
    found = {"ratio_histogram": _histogram(token_stats["shift"].double().exp(), RATIO_EDGES)}
    if "influence_weights" in token_stats and isinstance(settings, FIPOSettings):
        edges = np.linspace(settings.influence_low, settings.influence_high, NUM_INFLUENCE_BINS + 1)
        found["influence_weights_histogram"] = _histogram(token_stats["influence_weights"].double(), edges)
    return found


def _histogram(values: Tensor, edges: np.ndarray) -> dict[str, list[Any]]:
    inside = np.clip(values.cpu().numpy(), edges[0], edges[-1])
    counts, _ = np.histogram(inside, bins=edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
