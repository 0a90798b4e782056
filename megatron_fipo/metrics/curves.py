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
COLOURS = (BLUE, ORANGE, "#1b9e77", "#7570b3", "#e6ab02", "#a6761d", "#666666")
DATA_SET_METRIC = re.compile(r"(?P<name>.+)/(?P<kind>avg|cons|pass)@(?P<k>\d+)")
DASHES = {"avg": "-", "cons": "--", "pass": ":"}
MARKED_STEPS = 60  # up to which every step is marked with a dot


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

    figure = Figure(figsize=(18, 13), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(4, 3, sharex=True).flat)
    _draw_accuracy(next(axes), steps, evaluations)
    _draw_evaluations(next(axes), evaluations)
    _draw_metric(next(axes), steps, "Reward", "mean score", "score/mean", from_zero=False)
    _draw_lengths(next(axes), steps)
    _draw_metric(next(axes), steps, "Truncated responses", "share that the limit ended", "truncation_rate")
    _draw_metric(next(axes), steps, "Entropy", "nats per token", "entropy")
    _draw_influence(next(axes), steps, influence_bounds)
    _draw_metric(next(axes), steps, "Noise gauge", "Future-KL spread, first update", "noise_gauge")
    _draw_metric(next(axes), steps, "Gradient norm", "before clipping", "grad_norm")
    _draw_metric(next(axes), steps, "Engine against trainer", "mean |log-prob difference|", "engine_mismatch/mean")
    _draw_sampling(next(axes), steps)
    _draw_seconds(next(axes), steps)
    figure.savefig(path, format="png")


def _draw_accuracy(ax: Axes, steps: Records, evaluations: Records) -> None:
    train_x, train_y = _series(steps, "accuracy")
    ax.plot(train_x, train_y, color=BLUE, marker=_marker(train_x), alpha=0.7, label="training samples")
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


def _draw_evaluations(ax: Axes, evaluations: Records) -> None:
    """A colour for each data set, a dash for each of avg@k, cons@k and pass@k."""
    found = {key: DATA_SET_METRIC.fullmatch(key) for record in evaluations for key in record}
    named = {key: match for key, match in found.items() if match is not None}
    data_sets = list(dict.fromkeys(match["name"] for match in named.values()))
    largest = {name: max(int(m["k"]) for m in named.values() if m["name"] == name) for name in data_sets}
    for key, match in named.items():
        if int(match["k"]) != largest[match["name"]]:
            continue
        x, y = _series(evaluations, key)
        colour = COLOURS[data_sets.index(match["name"]) % len(COLOURS)]
        ax.plot(x, y, color=colour, linestyle=DASHES[match["kind"]], marker=".", label=key)
    if named:
        ax.set_ylim(-0.02, 1.05 + 0.09 * len(data_sets))  # room for the legend
        ax.legend(loc="upper left", ncols=3, frameon=False, fontsize=8)
    _label(ax, "Evaluation", "share of held-out problems", has_data=bool(named))


def _draw_lengths(ax: Axes, steps: Records) -> None:
    x, y = _series(steps, "response_length/mean")
    (x_low, low), (x_high, high) = (_series(steps, f"response_length/{name}") for name in ("q25", "q75"))
    if x == x_low == x_high:
        ax.fill_between(x, low, high, color=BLUE, alpha=0.15, linewidth=0, label="middle half")
    ax.plot(x, y, color=BLUE, marker=_marker(x), label="mean")
    if y:
        ax.set_ylim(bottom=0)
        ax.legend(loc="best", frameon=False, fontsize=8)
    _label(ax, "Response length", "tokens", has_data=bool(y))


def _draw_influence(ax: Axes, steps: Records, bounds: tuple[float, float] | None) -> None:
    x, y = _series(steps, "influence_weights_mean")
    ax.plot(x, y, color=BLUE, marker=_marker(x))
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


def _draw_sampling(ax: Axes, steps: Records) -> None:
    """What the groups that were generated were like."""
    names = {"informative": BLUE, "all_right": "#1b9e77", "all_wrong": ORANGE}
    series = {name: _series(steps, f"groups_{name}_fraction") for name in names}
    for name, (x, y) in series.items():
        ax.plot(x, y, color=names[name], marker=_marker(x), label=name.replace("_", " "))
    has_data = any(y for _, y in series.values())
    if has_data:
        ax.set_ylim(-0.02, 1.15)
        ax.legend(loc="upper left", ncols=3, frameon=False, fontsize=8)
    _label(ax, "Generated groups", "share", has_data=has_data)


def _draw_metric(ax: Axes, steps: Records, title: str, unit: str, metric: str, *, from_zero: bool = True) -> None:
    x, y = _series(steps, metric)
    ax.plot(x, y, color=BLUE, marker=_marker(x))
    if y and from_zero:
        ax.set_ylim(0, 1.08 * max(y) or 1.0)
    _label(ax, title, unit, has_data=bool(y))


def _draw_seconds(ax: Axes, steps: Records) -> None:
    # time/STAGE adds up to time/step; time/STAGE/PART is contained in its stage
    is_stage = re.compile(r"time/(?!step$)[^/]+").fullmatch
    names = {key: None for record in steps for key in record if is_stage(key)}
    x = [record["step"] for record in steps]
    bottom = [0.0] * len(steps)
    for index, name in enumerate(names):
        heights = [float(record.get(name, 0.0)) for record in steps]
        colour = COLOURS[index % len(COLOURS)]
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


def _marker(x: Sequence[int]) -> str:
    return "." if len(x) <= MARKED_STEPS else "None"


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
