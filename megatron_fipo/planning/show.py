"""Plans as tables, as a drawing of the memory by part, and as JSON-able values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_fipo.planning.engines import GIB
from megatron_fipo.planning.layouts import Cost, Sizes
from megatron_fipo.planning.memory import Plan, Turn
from megatron_fipo.planning.training import Training

BAR_WIDTH = 64
PLAIN_WIDTH = 118  # columns of what is not a terminal
# letter and colour of each part of the drawing
_PARTS = {
    "parameters": ("P", "blue"),
    "gradients": ("G", "cyan"),
    "optimizer": ("O", "magenta"),
    "activations": ("A", "green"),
    "logits": ("L", "yellow"),
    "working memory": ("W", "bright_black"),
    "engine weights": ("E", "blue"),
    "KV cache": ("K", "green"),
    "engine runtime": ("R", "yellow"),
    "weight buckets": ("B", "cyan"),
    "reserve": ("x", "red"),
}


_COLUMNS = tuple("TP PP CP EP DP recompute training generating bubble comm. cost".split())


def show_plan(console: Console, plan: Plan, cost: Cost) -> None:
    """The layout, memory by part and turn, a drawing of it, and what limits it."""
    training = plan.training
    console.print(_headline(plan), highlight=False)
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column("GiB")
    for turn in plan.turns:
        table.add_column(turn.name, justify="right")
    for part in _PARTS:
        sizes = [turn.parts.get(part) for turn in plan.turns]
        if any(sizes):
            table.add_row(part, *("" if size is None else f"{size / GIB:.2f}" for size in sizes))
    table.add_row("all", *(f"{turn.total / GIB:.2f}" for turn in plan.turns))
    console.print(table)
    width = max(len(turn.name) for turn in plan.turns)
    for turn in plan.turns:
        line = Text(f"{turn.name:{width}} ")
        line.append_text(_bar(turn, plan.cluster.gpu_bytes))
        console.print(line)
    letters = ", ".join(f"{letter} {part}" for part, (letter, _) in _PARTS.items() if _appears(plan, part))
    console.print(f"{letters}; . free", highlight=False)
    if training.layout.pp > 1:
        totals = ", ".join(f"{total / GIB:.1f}" for total in plan.stage_totals)
        console.print(f"pipeline ranks in training: {totals}; shown is rank {plan.worst_stage}", highlight=False)
    engine, moved, saved = plan.engine, plan.main_memory_per_node, plan.save_memory_per_node
    away = f"{moved / GIB:.0f} GiB move to a node's main memory; " if moved else ""
    away += f"a save takes {saved / GIB:.0f} GiB of main memory; " if saved else ""
    console.print(
        f"an engine's cache holds {engine.cache_tokens} tokens, {plan.concurrent_sequences} sequences of the longest; "
        f"{away}"
        f"bubble {cost.bubble:.0%}, communication {cost.communication:.0%} (nominal)",
        highlight=False,
    )
    for problem in plan.problems:
        console.print(f"does not fit: {problem}", style="red", highlight=False, soft_wrap=True)
    if plan.fits:
        console.print("fits", style="green")


def show_layouts(
    console: Console,
    fitting: Sequence[tuple[Plan, Cost]],
    rejected: Sequence[tuple[Sizes, bool, str]],
) -> None:
    """Layouts that fit, in order, and why the others do not."""
    table = Table(box=None, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "recompute" else "right")
    cheapest = fitting[0][1].seconds_per_token if fitting else 1.0
    for plan, cost in fitting:
        layout, recompute = plan.training.layout, plan.training.recompute.granularity
        table.add_row(
            *map(str, (layout.tp, layout.pp, layout.cp, layout.ep, layout.dp)),
            recompute or "-",
            f"{plan.turns[0].total / GIB:.1f}",
            f"{plan.turns[-1].total / GIB:.1f}",
            f"{cost.bubble:.0%}",
            f"{cost.communication:.0%}",
            f"{cost.seconds_per_token / cheapest:.2f}",
        )
    console.print(
        f"{len(fitting)} layouts fit" + ("; memory in GiB, cost: nominal time a token, of the first" if fitting else "")
    )
    if fitting:
        console.print(table)
    if not rejected:
        return
    shared = _said_of_all([reason for *_, reason in rejected]) if not fitting else []
    console.print(f"{len(rejected)} do not")
    for reason in shared:
        console.print(f"whatever the layout: {reason}", highlight=False, soft_wrap=True)
    reasons = Table(box=None, pad_edge=False)
    for name in ("TP", "PP", "CP", "EP"):
        reasons.add_column(name, justify="right")
    reasons.add_column("recompute")
    reasons.add_column("why not", overflow="fold")
    for sizes, recomputes, reason in rejected:
        own = "; ".join(part for part in reason.split("; ") if part not in shared)
        axes = map(str, (sizes.tp, sizes.pp, sizes.cp, sizes.ep))
        if own:
            reasons.add_row(*axes, "full" if recomputes else "-", own)
    if reasons.row_count:
        console.print(reasons)


def _said_of_all(reasons: Sequence[str]) -> list[str]:
    """What stands in the way of every layout that could be cut at all."""
    sets = [reason.split("; ") for reason in reasons if not reason.startswith("--")]
    return [part for part in sets[0] if all(part in other for other in sets)] if len(sets) > 1 else []


def plan_values(plan: Plan, cost: Cost) -> dict[str, Any]:
    """Everything that is shown, in bytes."""
    return {
        "layout": layout_values(plan.training),
        "fits": plan.fits,
        "problems": list(plan.problems),
        "gpu_bytes": plan.cluster.gpu_bytes,
        "turns": {turn.name: {**turn.parts, "all": turn.total} for turn in plan.turns},
        "training_by_pipeline_rank": list(plan.stage_totals),
        "worst_pipeline_rank": plan.worst_stage,
        "parameters_of_rank": plan.parameters_of_rank,
        "cache_tokens": plan.engine.cache_tokens,
        "concurrent_sequences": plan.concurrent_sequences,
        "mem_fraction_static": plan.engine.fraction,
        "main_memory_per_node": plan.main_memory_per_node,
        "save_memory_per_node": plan.save_memory_per_node,
        "bubble": cost.bubble,
        "communication": cost.communication,
        "nominal_seconds_per_token": cost.seconds_per_token,
    }


def layout_values(training: Training) -> dict[str, Any]:
    """The axes, the token budget and what is recomputed."""
    layout = training.layout
    axes = {name: getattr(layout, name) for name in ("tp", "pp", "vpp", "cp", "dp", "ep", "etp", "sequence_parallel")}
    recompute = training.recompute.granularity
    return {**axes, "max_tokens_per_micro_batch": training.rows, "recompute_granularity": recompute}


def _headline(plan: Plan) -> str:
    training = plan.training
    layout = training.layout
    axes = [("TP", layout.tp), ("PP", layout.pp), ("VPP", layout.vpp), ("CP", layout.cp), ("EP", layout.ep)]
    shown = " ".join(f"{name} {size}" for name, size in axes if size > 1)
    recompute = training.recompute.granularity
    device = "rank" if training.on_cpu else "GPU"
    headline = (
        f"{layout.world_size} {device}{'s' * (layout.world_size > 1)} of {plan.cluster.gpu_bytes / GIB:g} GiB: "
        f"{shown + ' ' if shown else ''}DP {layout.dp}, {plan.parameters_of_rank / 1e9:.2f} billion parameters a rank, "
        f"{training.rows} tokens a micro-batch, {training.transformer_impl} layers"
    )
    return headline + (f", {recompute} recomputation" if recompute else "")


def _bar(turn: Turn, gpu_bytes: int) -> Text:
    """Each part by its letter, to scale, as far as the GPU goes; what goes beyond is a `>`."""
    bar, drawn, so_far = Text("|"), 0, 0
    for part, (letter, colour) in _PARTS.items():
        so_far += turn.parts.get(part, 0)
        end = min(round(so_far / gpu_bytes * BAR_WIDTH), BAR_WIDTH)
        bar.append(letter * (end - drawn), style=colour)
        drawn = end
    bar.append("." * (BAR_WIDTH - drawn))
    bar.append("|>" if turn.total > gpu_bytes else "|")
    return bar


def _appears(plan: Plan, part: str) -> bool:
    return any(turn.parts.get(part) for turn in plan.turns)
