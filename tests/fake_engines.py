"""Engines that answer at once and fail as they are told to, and a pool of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_fipo.rollout.engine import NO_VERSION, EngineAddress, EngineError, MemoryTag
from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.types import Completion, GenerateRequest, SamplingSettings
from megatron_fipo.weights.bucket import WeightBucket, make_buckets


def request(prompt: list[int], sample: int, length: int = 8) -> GenerateRequest:
    ids = np.asarray(prompt, dtype=np.int64)
    return GenerateRequest(f"{prompt[0]}/{sample}", ids, SamplingSettings(length), sample)


def requests_for(num_prompts: int, num_samples: int = 3) -> list[GenerateRequest]:
    return [request([prompt], sample) for prompt in range(num_prompts) for sample in range(num_samples)]


def address_of(name: str, port: int) -> EngineAddress:
    return EngineAddress(name, f"http://127.0.0.1:{port}", "key", 1, 1 << 16, True, True, None, 1.0, 1.0)


class FakeEngine:
    """Answers with its prompt's first token and the request's seed; keeps a diary. `faults` is consulted at every call:
    the first entry for the call's name that has not been used says what goes wrong."""

    def __init__(
        self, name: str, version: int = 0, faults: Sequence[tuple[str, Any]] = (), *, is_own: bool = True
    ) -> None:
        self.name = name
        self.address = address_of(name, 1)
        self.is_own = is_own
        self.process_id = 0
        self.weight_version = version
        self.faults = list(faults)
        self.shares: list[list[str]] = []
        self.calls: list[str] = []
        self.alive = True
        self.hangs = False
        self.cancelled = 0

    async def _call(self, name: str) -> Any:
        self.calls.append(name)
        assert self.alive, f"{self.name} was asked to {name} after it had been ended"
        await asyncio.sleep(0)
        for index, (when, what) in enumerate(self.faults):
            if when == name:
                del self.faults[index]
                if what == "hang":
                    self.hangs = True
                    try:
                        await asyncio.sleep(3600)
                    finally:
                        self.cancelled += 1
                if callable(what):
                    return what
                raise EngineError(f"engine {self.name} {what}\nlast lines of {self.name}.log:\n    boom")
        return None

    async def await_ready(self) -> None:
        await self._call("ready")

    async def agenerate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.shares.append([item.uid for item in requests])
        spoil = await self._call("generate")
        assert self.weight_version != NO_VERSION
        completions = [
            Completion(
                item.uid,
                np.asarray([item.prompt_ids[0], item.seed]),
                np.zeros(2, np.float32),
                "stop",
                self.weight_version,
            )
            for item in requests
        ]
        return spoil(completions) if spoil is not None else completions

    async def ascore(self, token_ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        spoil = await self._call("score")
        scores = [ids.astype(np.float32) for ids in token_ids]
        return spoil(scores) if spoil is not None else scores

    async def abegin_weight_update(self) -> None:
        self.weight_version = NO_VERSION
        await self._call("begin")

    async def apush_bucket(self, bucket: WeightBucket) -> None:
        await self._call("push")

    async def aend_weight_update(self, version: int) -> None:
        await self._call("end")
        self.weight_version = version

    async def aweight_checksums(self) -> list[dict[str, str]]:
        await self._call("checksums")
        return [{"weight": self.name}]

    async def arelease_memory(self, tags: Sequence[MemoryTag]) -> None:
        await self._call("release " + "+".join(tags))

    async def aresume_memory(self, tags: Sequence[MemoryTag]) -> None:
        await self._call("resume " + "+".join(tags))

    async def acheck_health(self, timeout_s: float) -> None:
        if self.hangs:
            await asyncio.sleep(timeout_s)
            raise EngineError(f"engine {self.name} gave no sign of life within {timeout_s} s")

    def check_alive(self) -> None:
        if ("alive", "ended") in self.faults:
            raise EngineError(f"engine {self.name} ended with signal 9")

    def restart(self) -> None:
        self.calls.append("restart")
        if ("restart", "fails") in self.faults:
            raise EngineError(f"engine {self.name} cannot be started")
        self.alive, self.hangs, self.weight_version = True, False, NO_VERSION

    def reconnect(self, address: EngineAddress) -> None:
        self.calls.append("reconnect")
        self.address, self.alive, self.weight_version = address, True, NO_VERSION

    def shutdown(self) -> None:
        self.calls.append("shutdown")
        self.alive = False


BUCKET = next(make_buckets([("a", torch.ones(3))], 1 << 10))


def make_pool(*engines: FakeEngine, **settings: Any) -> tuple[EnginePool, list[str]]:
    said: list[str] = []
    settings = {"max_retries": 3, "max_restarts": 2, "health_check_interval_s": 0.05, "say": said.append, **settings}
    return EnginePool(engines, **settings), said


def update(pool: EnginePool, version: int) -> None:
    pool.begin_weight_update()
    pool.push_bucket(BUCKET)
    pool.end_weight_update(version)


def assert_answered(completions: Sequence[Completion], requests: Sequence[GenerateRequest], version: int = 0) -> None:
    """Every request once, in order, by its own prompt and seed, of the version."""
    assert [item.uid for item in completions] == [item.uid for item in requests]
    assert [item.token_ids.tolist() for item in completions] == [[r.prompt_ids[0], r.seed] for r in requests]
    assert {item.weight_version for item in completions} == {version}
