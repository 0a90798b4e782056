"""Actor and engines on the same machine take turns: training, syncing, generating."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from torch import Tensor

from megatron_fipo.actor.actor import Actor
from megatron_fipo.rollout.engine import EngineError
from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.types import Completion, GenerateRequest
from megatron_fipo.weights.bucket import make_buckets

State = Literal["training", "syncing", "generating"]

_NEXT: dict[State, tuple[State, ...]] = {
    "training": ("syncing",),
    "syncing": ("generating",),
    "generating": ("generating", "training", "syncing"),
}


class HybridEngine:
    """Whose turn it is, and the weights' way from the actor to the engines.

    `pool` is the engines on rank 0, None on the other ranks. No request is served while weights change, and every
    completion carries the version of the weights that made it.
    """

    def __init__(self, actor: Actor, pool: EnginePool | None, *, bucket_bytes: int) -> None:
        assert (pool is not None) == (actor.layout.rank == 0), "rank 0, and it alone, drives the engines"
        self.state: State = "training"
        self.weight_version = -1  # nothing pushed yet
        self._actor = actor
        self._pool = pool
        self._bucket_bytes = bucket_bytes

    def sync_weights(self, version: int) -> EngineError | None:
        """Push the actor's weights as `version` to every engine. Collective over all ranks.

        Consumes: the actor's parameters after its last update. Unblocks: generation under the new version. An engine's
        failure is returned on rank 0, not raised, after the other ranks' parts were taken all the same: they wait in
        collectives, and the caller must tell them.
        """
        self._turn("syncing")
        tensors = self._actor.export_weights()
        if self._pool is None:
            for _ in tensors:
                raise AssertionError("only rank 0 receives whole tensors")
        else:
            try:
                self._push(self._pool, tensors, version)
            except EngineError as failure:
                for _ in tensors:
                    pass
                return failure
        self.weight_version = version
        self._turn("generating")
        return None

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Answer requests with the weights of the last sync. Rank 0 only."""
        assert self._pool is not None, "only rank 0 generates"
        self._turn("generating")
        return self._pool.generate(requests)

    def start_training(self) -> None:
        """The engines rest; the actor's turn."""
        self._turn("training")

    def _push(self, pool: EnginePool, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        pool.begin_weight_update()
        for bucket in make_buckets(tensors, self._bucket_bytes):
            pool.push_bucket(bucket)
        pool.end_weight_update(version)

    def _turn(self, state: State) -> None:
        assert state in _NEXT[self.state], f"{self.state} -> {state} is no turn of the hybrid engine"
        self.state = state
