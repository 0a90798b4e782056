"""How much memory a run takes, and which layouts fit. docs/planning.md explains it.

python tools/plan.py <the flags of megatron_fipo.train> --nodes 16 --gpus-per-node 8 --gpu-memory-gib 80 [--json]

Of the checkpoint only config.json is read; no GPU is needed, and nothing is started. The status is 0 when the layout
fits (or, without one, when any does), 1 when it does not, 2 for flags that are wrong.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from rich.console import Console

from megatron_fipo.plan_arguments import (
    parse_plan,
    plan_given_layout,
    plan_help_text,
    search_layouts,
)
from megatron_fipo.planning.show import PLAIN_WIDTH, plan_values, show_layouts, show_plan
from megatron_fipo.train import USER_ERROR

DOES_NOT_FIT = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, plan, print."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(words):
        print(plan_help_text())
        return 0
    try:
        return run(words)
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR


def run(words: Sequence[str]) -> int:
    """Plan the layout that was given, or all there are; raises ValueError for what the user can correct."""
    request = parse_plan(words)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if request.fixed:
        planned = plan_given_layout(request)
        if request.as_json:
            print(json.dumps(plan_values(planned.plan, planned.cost), indent=1))
        else:
            show_plan(console, planned.plan, planned.cost)
        return 0 if planned.plan.fits else DOES_NOT_FIT
    fitting, rejected = search_layouts(request)
    if request.as_json:
        print(
            json.dumps(
                {
                    "fitting": [{"flags": p.flags, **plan_values(p.plan, p.cost)} for p in fitting],
                    "rejected": [{**vars(r.sizes), "recomputes": r.recomputes, "reason": r.reason} for r in rejected],
                },
                indent=1,
            )
        )
        return 0 if fitting else DOES_NOT_FIT
    show_layouts(console, [(p.plan, p.cost) for p in fitting], [(r.sizes, r.recomputes, r.reason) for r in rejected])
    if fitting:
        print()
        print("the first of them:", " ".join(fitting[0].flags))
        show_plan(console, fitting[0].plan, fitting[0].cost)
    return 0 if fitting else DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main())
