"""curves.png: a run at a glance, as small multiples over steps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fipo.metrics.columns import value_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[Mapping[str, Any]]

BLUE, ORANGE, GREY = "#1f5fa8", "#d95f02", "#8a8a8a"
STAGE_COLOURS = ("#1f5fa8", "#d95f02", "#1b9e77", "#7570b3", "#e6ab02", "#a6761d", "#666666")
PANELS: tuple[tuple[str, str, str], ...] = (  # title, unit, metric
    ("Reward", "mean score", "score/mean"),
    ("Response length", "tokens, mean", "response_length/mean"),
    ("Entropy", "nats per token", "entropy"),
    ("Gradient norm", "before clipping", "grad_norm"),
    ("Engine against trainer", "mean |log-prob difference|", "engine_mismatch/mean"),
)


def draw_curves(
    steps: Records,
    evaluations: Records,
    path: str | Path,
    *,
    influence_bounds: tuple[float, float] | None = None,
) -> None:
    """Draw the run's curves into a PNG. `steps` and `evaluations` are as `read_metrics` returns them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 11), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(4, 2, sharex=True).flat)
    _draw_accuracy(next(axes), steps, evaluations)
    _draw_influence(next(axes), steps, influence_bounds)
    for title, unit, metric in PANELS:
        _draw_metric(next(axes), steps, title, unit, metric)
    _draw_seconds(next(axes), steps)
    figure.savefig(path, format="png")


def _draw_accuracy(ax: Axes, steps: Records, evaluations: Records) -> None:
    train_x, train_y = _series(steps, "accuracy")
    ax.plot(train_x, train_y, color=BLUE, marker=".", alpha=0.7, label="training samples")
    x, y = _series(evaluations, "accuracy")
    ax.plot(x, y, color=ORANGE, marker="o", linestyle="--", label="held-out problems")
    for index in {0, len(x) - 1} if x else ():
        ax.annotate(
            f"{y[index]:.2f}",
            (x[index], y[index]),
            textcoords="offset points",
            xytext=(0, -6),
            ha="center",
            va="top",
            color=ORANGE,
            fontweight="bold",
        )
    ax.set_ylim(-0.15, 1.05)
    ax.legend(loc="upper left", ncols=2, frameon=False)
    _label(ax, "Accuracy", "share of right answers", has_data=bool(train_y or y))


def _draw_influence(ax: Axes, steps: Records, bounds: tuple[float, float] | None) -> None:
    x, y = _series(steps, "influence_weights_mean")
    ax.plot(x, y, color=BLUE, marker=".")
    if bounds is not None and y:
        low, high = bounds
        margin = 0.12 * (high - low)
        ax.set_ylim(min(low, *y) - margin, max(high, *y) + margin)
        for bound, name, shift, side in ((low, "lower bound", -3, "top"), (high, "upper bound", 3, "bottom")):
            ax.axhline(bound, color=GREY, linestyle=":", linewidth=1.2)
            ax.annotate(
                f"{name} {bound:g}",
                (1.0, bound),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                xytext=(0, shift),
                color=GREY,
                fontsize=8,
                ha="right",
                va=side,
            )
    _label(ax, "Influence weight", "f, mean over tokens", has_data=bool(y))


def _draw_metric(ax: Axes, steps: Records, title: str, unit: str, metric: str) -> None:
    x, y = _series(steps, metric)
    ax.plot(x, y, color=BLUE, marker=".")
    _label(ax, title, unit, has_data=bool(y))


def _draw_seconds(ax: Axes, steps: Records) -> None:
    # time/STAGE adds up to time/step; time/STAGE/PART is contained in its stage
    is_stage = re.compile(r"time/(?!step$)[^/]+").fullmatch
    names = {key: None for record in steps for key in record if is_stage(key)}
    x = [record["step"] for record in steps]
    bottom = [0.0] * len(steps)
    for index, name in enumerate(names):
        heights = [float(record.get(name, 0.0)) for record in steps]
        colour = STAGE_COLOURS[index % len(STAGE_COLOURS)]
        ax.bar(x, heights, bottom=bottom, width=0.9, color=colour, label=name.removeprefix("time/"))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    if names:
        ax.set_ylim(0, 1.25 * (max(bottom) or 1.0))  # room for the legend
        ax.legend(loc="upper left", ncols=min(5, len(names)), frameon=False, fontsize=8)
    _label(ax, "Seconds per step", "seconds", has_data=bool(names))


def _series(records: Records, metric: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], value_of(record, metric)) for record in records]
    kept = [(step, value) for step, value in points if value is not None]
    return [step for step, _ in kept], [value for _, value in kept]


def _label(ax: Axes, title: str, unit: str, *, has_data: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_title(title, loc="left", fontweight="bold")
    ax.set_xlabel("step")
    ax.tick_params(labelbottom=True)
    ax.set_ylabel(unit)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if not has_data:
        ax.text(0.5, 0.5, "not logged in this run", transform=ax.transAxes, ha="center", color=GREY)
