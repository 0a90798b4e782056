"""What the tests of several nodes run: an actor on two ranks, each the first of a "node" whose engines are a diary."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from actor_on_ranks import make_actor, make_groups, settings_for
from fake_pool import FakePool, sums
from tiny_models import make_sequences

from megatron_fipo.actor.actor import Actor
from megatron_fipo.hybrid import node_engines
from megatron_fipo.hybrid.turns import HybridEngine
from megatron_fipo.rollout.engine import EngineError, NoEngineLeft
from megatron_fipo.trainer.exchange import scatter_shares

NODES = (("a0", "a1"), ("b0",))


def take_turns(model_dir: str) -> dict[str, Any]:
    """Turns in which engines of either node fail, and what every rank's engines were asked and hold after each."""
    node_engines.expected_checksums = sums
    layout, groups = make_groups(tp=2)
    actor = make_actor(model_dir, layout, groups, bf16=True)
    diary: list[Any] = []
    local = FakePool(diary, NODES[layout.rank])
    everywhere = FakePool([], NODES[0] + NODES[1]) if layout.rank == 0 else None
    engine = HybridEngine(
        actor,
        everywhere,  # type: ignore[arg-type]
        local_pool=local,  # type: ignore[arg-type]
        receivers=(0, 1),
        bucket_bytes=20_000,
        offload_trainer=True,
        say=lambda line: diary.append(("said", line)),
    )
    found: dict[str, Any] = {}

    def sync(name: str, version: int, *, failing: dict[str, BaseException] | None = None) -> None:
        """One sync; `failing`: what fails on the second node."""
        diary.clear()
        if layout.rank == 1:
            local.failing.update(failing or {})
        failure = engine.sync_weights(version)
        found[name] = {
            "calls": [str(entry[0]) for entry in diary],
            "failure": None if failure is None else f"{type(failure).__name__}: {failure}",
            "state": engine.state,
            "version": engine.weight_version,
            "failed": None if everywhere is None else dict(everywhere.failed),
            "addresses": None if everywhere is None else everywhere.diary[-1][3],
            "held": engine.state == "generating" and held_is_exported(engine, actor, local),
        }

    def train() -> None:
        engine.start_training()
        update(actor)

    sync("first", 0)
    train()
    sync("one node loses all in the middle", 1, failing={"push": EngineError("b0 died")})
    train()
    if everywhere is not None:
        everywhere.failed["a1"] = "died while rank 0 asked it"  # which its node has not noticed
    sync("both start again", 2)
    engine.resync()
    found["resynced"] = engine.weight_version
    train()
    sync("one node is lost for good", 3, failing={"begin": NoEngineLeft("b0 is gone for good")})
    train()
    local.failing["begin"], local.forever = NoEngineLeft(f"node {layout.rank} is gone for good"), True
    sync("all are lost for good", 4)
    try:
        engine.start_training()
    except AssertionError as error:
        found["refusal"] = str(error)
    return found


def update(actor: Actor) -> None:
    sequences = make_sequences(6)
    mine = scatter_shares(
        sequences if actor.layout.rank == 0 else None, 1, actor.layout, actor.groups.control, actor.arch.hidden_size
    )
    old, _ = actor.old_logprobs(mine)
    actor.update(mine[0], old, algorithm="fipo", settings=settings_for("fipo", "paper"))


def held_is_exported(engine: HybridEngine, actor: Actor, pool: FakePool) -> bool:
    """Whether the node's engines hold the actor's weights, to the last bit, as rank 0 exports them by themselves."""
    with engine.actor_at_work():
        exported: list[Any] = [{name: digest(value) for name, value in actor.export_weights()}]
    dist.broadcast_object_list(exported, src=0, group=actor.groups.control)
    return {name: digest(value) for name, value in pool.held.items()} == exported[0]


def digest(tensor: torch.Tensor) -> str:
    copied = tensor.clone()  # memory that NumPy has seen cannot be given up
    return hashlib.sha256(copied.view(torch.uint8).numpy().tobytes()).hexdigest()
