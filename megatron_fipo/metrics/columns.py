"""The columns of the live display: which metric each shows, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """One column: its title, the metric it shows (a step's, or the mean over the step's updates), its format."""

    title: str
    metric: str
    format: str


COLUMNS: tuple[Column, ...] = (
    Column("reward", "score/mean", "+.3f"),
    Column("accuracy", "accuracy", ".3f"),
    Column("length", "response_length/mean", ".1f"),
    Column("entropy", "entropy", ".3f"),
    Column("influence", "influence_weights_mean", ".4f"),
    Column("tokens/s", "tokens_per_s", ".0f"),
)
TIME_LEFT = "time left"
WIDTH = 9


def value_of(record: Mapping[str, Any], metric: str) -> float | None:
    """The metric of a step's record: the step's own, else the mean over those of its updates that have it."""
    value = record.get(metric)
    if isinstance(value, (int, float)):
        return float(value)
    values = [update[metric] for update in record.get("updates", ()) if isinstance(update.get(metric), (int, float))]
    return sum(values) / len(values) if values else None


def cells(record: Mapping[str, Any]) -> list[str]:
    """One text per column of COLUMNS; `-` where the record has no such metric."""
    values = [(column, value_of(record, column.metric)) for column in COLUMNS]
    return ["-" if value is None else format(value, column.format) for column, value in values]


def clock_time(seconds: float | None) -> str:
    """`h:mm:ss`, or `-` when unknown."""
    if seconds is None:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
