"""Which checkpoints stay: the newest, the best, and always the one `latest` names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_fipo.actor.checkpoint_files import (
    RUN_STATE,
    CheckpointError,
    checkpoints_in,
    nameless_in,
    set_aside,
    step_of,
)
from megatron_fipo.actor.checkpoint_reading import read_json

_LARGEST = 1e300


def retire(current: Path, *, keep_last: int | None, keep_best: int) -> list[Path]:
    """Take their names from the checkpoints beside `current` that need not be kept; the directories now to remove,
    among them those of earlier calls that are still there.

    `current` is the one just committed, which `latest` names. Kept are the `keep_last` newest, it among them (None:
    all), and the `keep_best` with the highest scores, of equal ones the later. One that `current` replaces, of the same
    step, goes in any case. Later steps than `current`'s belong to a run that was left behind; they are not touched.
    """
    earlier, retired = [], nameless_in(current.parent)
    for directory in checkpoints_in(current.parent):
        if directory != current and step_of(directory) == step_of(current):
            retired.append(set_aside(directory))
        elif step_of(directory) < step_of(current):
            earlier.append(directory)
    if keep_last is None:
        return retired
    kept = {current, *earlier[: keep_last - 1], *_best([current, *earlier], keep_best)}
    return retired + [set_aside(directory) for directory in earlier if directory not in kept]


def _best(directories: Sequence[Path], num: int) -> list[Path]:
    """The `num` with the highest scores; `directories` are in order of their steps, the latest first."""
    if num == 0:
        return []
    scores = [(directory, _score(directory)) for directory in directories]
    scored = [(directory, score) for directory, score in scores if score is not None]
    return [directory for directory, _ in sorted(scored, key=lambda pair: -pair[1])[:num]]


def _score(directory: Path) -> float | None:
    """What the checkpoint scored in its evaluation; None where there was none, or no number, or it cannot be read."""
    try:
        score = read_json(directory / RUN_STATE).get("score")
    except CheckpointError:
        return None  # damaged: nothing to keep it for
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        return None
    return float(score) if abs(score) < _LARGEST else None  # no NaN either
