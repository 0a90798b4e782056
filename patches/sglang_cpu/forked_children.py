"""Start SGLang's scheduler and detokenizer by fork instead of spawn.

Why: a spawned child imports torch, transformers and sglang anew (5-7 s each on one core, three processes on a machine
    of two cores); a forked one has them, patches included. Spawn exists for CUDA, which does not survive a fork.
Upstream: sglang.srt.entrypoints.engine (`mp.set_start_method("spawn", force=True)`, `mp.Process`, `mp.Pipe`)
Drop-when: the start method can be chosen by an argument.
Test: tests/distributed/test_patch_sglang.py, tests/e2e/test_engine.py
"""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace
from typing import Final

REPLACES: Final = {
    "sglang.srt.entrypoints.engine:mp": "b80bb225164c1a87",
}


def fork_engine_children() -> None:
    """Make sglang's engine module fork; must run in the process that launches the server, before it starts threads
    that compute."""
    from sglang.srt.entrypoints import engine

    context = multiprocessing.get_context("fork")
    assert hasattr(engine, "mp"), "sglang.srt.entrypoints.engine no longer imports multiprocessing as mp"
    engine.mp = SimpleNamespace(Process=context.Process, Pipe=context.Pipe, set_start_method=_keep_fork)


def _keep_fork(method: str, force: bool = False) -> None:
    """In place of multiprocessing.set_start_method: sglang asks for spawn, the children are forked all the same."""
