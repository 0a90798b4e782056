"""The engines of one node, driven by that node's first rank, while the other ranks take part in collectives.

Whatever fails between this rank and its engines is kept and told when all ranks report, never raised on the way: the
others would wait for this rank's part of a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from megatron_fipo.rollout.engine import EngineAddress, EngineError, NoEngineLeft
from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.weights.architecture import Architecture
from megatron_fipo.weights.bucket import WeightBucket
from megatron_fipo.weights.engine_layout import expected_checksums

T = TypeVar("T")
_EXPERTS = ".mlp.experts."  # in the engine's names of what its ranks share out
Checksums = Sequence[Mapping[str, str]]  # one per tensor-parallel rank: parameter -> checksum


@dataclass(frozen=True)
class NodeReport:
    """How an update went on one node: plain data, for every rank."""

    served: tuple[str, ...]  # engines that now hold the weights
    failed: Mapping[str, str]  # engines that do not, and why
    failure: str | None  # what ended the update on this node, if anything did
    is_final: bool  # none of its engines may be started again
    addresses: Mapping[str, EngineAddress]  # where its engines are reached now, by name, for those who are not here


class NodeEngines:
    """A pool whose failures wait until they are asked for."""

    def __init__(
        self, pool: EnginePool, *, tp_size: int, fp8: bool, device_type: Literal["cpu", "cuda"], ep_size: int = 1
    ) -> None:
        """`tp_size`, `ep_size` and `fp8` are the engines'. Experts that their ranks share out are not compared."""
        self.pool = pool
        self._tp_size = tp_size
        self._shares_experts = ep_size > 1
        self._fp8 = fp8
        self._device_type = device_type
        self._failure: EngineError | None = None
        self._restarts_seen = -1  # how often engines had been started again when weights were last compared

    def do(self, call: Callable[[], T]) -> T | None:
        """`call()`, unless something has failed since `clear`; None when it fails, or when something has."""
        if self._failure is not None:
            return None
        try:
            return call()
        except EngineError as failure:
            self._failure = failure
            return None

    def clear(self) -> EngineError | None:
        """What has failed since the last call."""
        failure, self._failure = self._failure, None
        return failure

    @property
    def holds_unchecked(self) -> bool:
        """Whether an engine was started (again) since weights were last compared."""
        return self.pool.num_restarts_in_all != self._restarts_seen

    def push(
        self, buckets: Iterator[WeightBucket], arch: Architecture, *, with_checksums: bool
    ) -> list[dict[str, str]] | None:
        """Push every bucket, exhausting the stream whatever fails: the next one is packed while two are on their way.
        `with_checksums`: returns what the engines must say they hold afterwards, per tensor-parallel rank, computed
        from the buckets as they pass."""

        def pushed() -> Iterator[WeightBucket]:
            for bucket in buckets:
                self.do(partial(self.pool.push_bucket, bucket))
                yield bucket
            self.do(self.pool.await_pushed)

        if not with_checksums:
            for _ in pushed():
                pass
            return None
        expected = expected_checksums(
            arch, pushed(), tp_size=self._tp_size, fp8=self._fp8, device_type=self._device_type
        )
        if self._shares_experts:
            return [{name: held for name, held in rank.items() if _EXPERTS not in name} for rank in expected]
        return expected

    def check(self, expected: Checksums) -> None:
        """Set every engine aside that holds something else. EngineError when none is left."""
        reasons: list[str] = []
        for name, found in self.pool.weight_checksums().items():
            difference = first_difference(expected, found, expected_alone=self._fp8 or self._shares_experts)
            if difference is not None:
                reasons.append(f"engine {name} holds other weights than it was sent: {difference}")
                self.pool.mark_failed(name, reasons[-1])
        self._restarts_seen = self.pool.num_restarts_in_all
        if self.pool.num_alive == 0:
            reasons = reasons or list(self.pool.failed.values())
            raise EngineError("no engine holds the weights it was sent:\n    " + "\n    ".join(reasons))

    def report(self, *, with_addresses: bool) -> NodeReport:
        """How it went since `clear`."""
        failed = self.pool.failed
        served = () if self._failure is not None else tuple(name for name in self.pool.names if name not in failed)
        failure = None if self._failure is None else str(self._failure)
        addresses = {engine.name: engine.address for engine in self.pool.engines} if with_addresses else {}
        return NodeReport(served, dict(failed), failure, isinstance(self._failure, NoEngineLeft), addresses)


def first_difference(expected: Checksums, found: Checksums, *, expected_alone: bool = False) -> str | None:
    """Where what an engine holds first differs from what it should, naming rank and parameter; None: nowhere.

    `expected_alone`: it may hold more: quantised parameters, whose bytes are its kernels' own, or shared-out experts.
    """
    if len(expected) != len(found):
        return f"it answered for {len(found)} tensor-parallel ranks, not {len(expected)}"
    for rank, (wanted, held) in enumerate(zip(expected, found)):
        for name in sorted(set(wanted) if expected_alone else set(wanted) | set(held)):
            if wanted.get(name) != held.get(name):
                says = "nothing" if name not in held else f"checksum {held[name]}"
                instead = wanted.get(name, "nothing")
                return f"its rank {rank} has {says} for {name}, not {instead}"
    return None
