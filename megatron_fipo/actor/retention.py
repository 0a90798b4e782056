"""Which checkpoints stay: the newest, the best, and always the one `latest` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from megatron_fipo.actor.checkpoint_files import (
    RUN_STATE,
    CheckpointError,
    checkpoints_in,
    nameless_in,
    set_aside,
    step_of,
)
from megatron_fipo.actor.checkpoint_reading import read_json

NO_SCORES: Mapping[int, float] = MappingProxyType({})
_LARGEST = 1e300


def retire(
    current: Path, *, keep_last: int | None, keep_best: int, scores: Mapping[int, float] = NO_SCORES
) -> list[Path]:
    """Take their names from the checkpoints beside `current` that need not be kept; the directories now to remove,
    among them those of earlier calls that are still there.

    `current` is the one just committed, which `latest` names. Kept are the `keep_last` newest, it among them (None:
    all), and the `keep_best` with the highest scores, of equal ones the later. One that was saved without a score, its
    evaluation having been made later, has the one that `scores` gives its step. One that `current` replaces, of the
    same step, goes in any case. Later steps than `current`'s belong to a run that was left behind; they are not
    touched.
    """
    earlier, retired = [], nameless_in(current.parent)
    for directory in checkpoints_in(current.parent):
        if directory != current and step_of(directory) == step_of(current):
            retired.append(set_aside(directory))
        elif step_of(directory) < step_of(current):
            earlier.append(directory)
    if keep_last is None:
        return retired
    kept = {current, *earlier[: keep_last - 1], *_best([current, *earlier], keep_best, scores)}
    return retired + [set_aside(directory) for directory in earlier if directory not in kept]


def _best(directories: Sequence[Path], num: int, scores: Mapping[int, float]) -> list[Path]:
    """The `num` with the highest scores; `directories` are in order of their steps, the latest first."""
    if num == 0:
        return []
    found = [(directory, _score(directory, scores.get(step_of(directory)))) for directory in directories]
    scored = [(directory, score) for directory, score in found if score is not None]
    return [directory for directory, _ in sorted(scored, key=lambda pair: -pair[1])[:num]]


def _score(directory: Path, later: float | None) -> float | None:
    """What the checkpoint scored in its evaluation, which may have been made `later`; None where there was none, or no
    number, or it cannot be read."""
    try:
        score = read_json(directory / RUN_STATE).get("score")
    except CheckpointError:
        return None  # damaged: nothing to keep it for
    score = later if score is None else score
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        return None
    return float(score) if abs(score) < _LARGEST else None  # no NaN either
