"""A pool of engines and an actor that keep one diary of what was asked of them, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.rollout.engine import EngineError
from megatron_fipo.types import Completion, GenerateRequest
from megatron_fipo.weights.bucket import WeightBucket, make_buckets

WEIGHTS = [("a.weight", torch.arange(4.0)), ("b.weight", torch.ones(2, 3)), ("c.bias", torch.full((5,), -1.0))]
NAMES = [name for name, _ in WEIGHTS]


class FakePool:
    """Two engines that keep one diary. `failing`: call -> what it raises, once each unless `forever`."""

    def __init__(self, diary: list[Any], names: Sequence[str] = ("one", "two")) -> None:
        self.diary = diary
        self.names = tuple(names)
        self.engines = tuple(SimpleNamespace(name=name, address=f"at {name}", is_own=False) for name in names)
        self.failed: dict[str, str] = {}
        self.failing: dict[str, BaseException] = {}
        self.forever = False
        self.names_not_starting: list[Sequence[str]] = []  # at each wait for those that were started again
        self.held: dict[str, torch.Tensor] = {}  # what the engines hold
        self.holding_else: set[str] = set()  # engines that say that they hold something else
        self.weight_version = 0
        self.num_restarts_in_all = 0
        self.revive: Callable[[], None] | None = None

    @property
    def num_alive(self) -> int:
        return len(self.names) - len(self.failed)

    def _do(self, *entry: Any) -> None:
        self.diary.append(entry)
        failure = self.failing.get(entry[0]) if self.forever else self.failing.pop(entry[0], None)
        if failure is not None:
            if isinstance(failure, EngineError):
                self.failed = dict.fromkeys(self.names, str(failure))
            raise failure

    def restart_failed(self) -> list[str]:
        started = sorted(self.failed)
        if started:
            self._do("restart", *started)
        self.num_restarts_in_all += len(started)
        self.failed = {}
        return started

    def mark_failed(self, name: str, reason: str) -> None:
        assert name in self.names
        self.failed[name] = reason

    def adopt_update(self, version: int, failed: Mapping[str, str], addresses: Mapping[str, Any]) -> None:
        self.diary.append(("adopt", version, dict(failed), dict(addresses)))
        self.weight_version, self.failed = version, dict(failed)

    def await_restarted(self) -> None:
        self._do("await restarted")
        if self.names_not_starting:
            self.failed = dict.fromkeys(self.names_not_starting.pop(), "did not start")

    def release_memory(self, tags: Sequence[str]) -> None:
        self._do("release", *tags)

    def resume_memory(self, tags: Sequence[str]) -> None:
        self._do("resume", *tags)

    def begin_weight_update(self) -> None:
        self._do("begin")

    def push_bucket(self, bucket: WeightBucket) -> None:
        self._do("push", [entry.name for entry in bucket.entries])
        for entry in bucket.entries:
            flat = bucket.flat[entry.start : entry.end].view(entry.dtype)
            self.held[entry.name] = flat.view(entry.shape).clone()

    def await_pushed(self) -> None:
        """Every push is through when it returns."""

    def end_weight_update(self, version: int) -> None:
        self._do("end", version)
        self.weight_version = version

    def weight_checksums(self) -> dict[str, list[dict[str, str]]]:
        self._do("checksums")
        right = {name: str(float(value.sum())) for name, value in self.held.items()}
        return {
            name: [right | ({"b.weight": "other"} if name in self.holding_else else {})]
            for name in self.names
            if name not in self.failed
        }

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self._do("generate", self.weight_version)
        ids = np.zeros(1, dtype=np.int64)
        return [Completion(r.uid, ids, np.zeros(1, np.float32), "stop", self.weight_version) for r in requests]


def sums(arch: Any, buckets: Iterator[WeightBucket], **_: Any) -> list[dict[str, str]]:
    """What stands for the layout of an engine's parameters here: each tensor's sum."""
    return [
        {
            entry.name: str(float(bucket.flat[entry.start : entry.end].view(entry.dtype).sum()))
            for bucket in buckets
            for entry in bucket.entries
        }
    ]


class FakeActor:
    """One of `tp` ranks; its tensors "leave" and "enter" in the diary."""

    arch, chunks, optimizer, device = None, (), None, torch.device("cpu")

    def __init__(self, diary: list[Any], rank: int = 0, tp: int = 1) -> None:
        self.diary = diary
        self.layout = ParallelLayout(tp=tp, rank=rank)
        self.exports = rank == 0
        self.num_exhausted = 0

    def export_buckets(self, bucket_bytes: int, *, receivers: Sequence[int], fp8: bool) -> Iterator[WeightBucket]:
        if self.exports:
            yield from make_buckets(WEIGHTS, bucket_bytes)
        self.num_exhausted += 1


class FakeOffloader:
    def __init__(self, diary: list[Any]) -> None:
        self.diary = diary
        self.away: set[str] = set()

    def leave(self, *parts: str) -> None:
        self._note("leave", [part for part in parts if part not in self.away])
        self.away |= set(parts)

    def enter(self, *parts: str) -> None:
        self._note("enter", [part for part in parts if part in self.away])
        self.away -= set(parts)

    def _note(self, what: str, parts: list[str]) -> None:
        if parts:
            self.diary.append((what, *parts))

    @property
    def bytes_away(self) -> int:
        return len(self.away) << 30
