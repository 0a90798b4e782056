"""All engines of a run as one: requests spread by load, weight updates to every engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np

from megatron_fipo.rollout.engine import EngineError
from megatron_fipo.rollout.event_loop import run
from megatron_fipo.types import Completion, GenerateRequest
from megatron_fipo.weights.bucket import WeightBucket

T = TypeVar("T")


class AsyncEngine(Protocol):
    """What the pool asks of an engine (SGLangEngine has it)."""

    name: str
    weight_version: int

    async def await_ready(self) -> None: ...
    async def agenerate(self, requests: Sequence[GenerateRequest]) -> list[Completion]: ...
    async def ascore(self, token_ids: Sequence[np.ndarray]) -> list[np.ndarray]: ...
    async def abegin_weight_update(self) -> None: ...
    async def apush_bucket(self, bucket: WeightBucket) -> None: ...
    async def aend_weight_update(self, version: int) -> None: ...
    def check_alive(self) -> None: ...
    def shutdown(self) -> None: ...


class EnginePool:
    """Implements engine.Engine over one or more engines. A context manager: leaving it shuts all of them down."""

    def __init__(self, engines: Sequence[AsyncEngine]) -> None:
        assert engines, "a pool needs at least one engine"
        self.engines = tuple(engines)
        self.name = "pool"
        self.weight_version = 0

    def wait_ready(self) -> None:
        """Return once every engine answers. EngineError if one does not start."""

        async def wait() -> None:
            await _all(*(engine.await_ready() for engine in self.engines))

        run(wait())

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        return run(self.agenerate(requests))

    async def agenerate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Requests with the same prompt go to one engine, which computes the prompt once."""
        shares = spread_requests(requests, len(self.engines))
        answers = await _all(
            *(
                engine.agenerate([requests[index] for index in share])
                for engine, share in zip(self.engines, shares, strict=True)
            )
        )
        completions: list[Completion | None] = [None] * len(requests)
        for engine, share, answer in zip(self.engines, shares, answers, strict=True):
            for index, completion in zip(share, answer, strict=True):
                if completion.weight_version != self.weight_version:
                    raise EngineError(
                        f"engine {engine.name} answered request {completion.uid} with weight version "
                        f"{completion.weight_version}; the run is at {self.weight_version}"
                    )
                completions[index] = completion
        return [completion for completion in completions if completion is not None]

    def score(self, token_ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        async def score_all() -> list[np.ndarray]:
            shares = [range(first, len(token_ids), len(self.engines)) for first in range(len(self.engines))]
            answers = await _all(
                *(
                    engine.ascore([token_ids[index] for index in share])
                    for engine, share in zip(self.engines, shares, strict=True)
                )
            )
            scores: dict[int, np.ndarray] = {}
            for share, answer in zip(shares, answers, strict=True):
                scores.update(zip(share, answer, strict=True))
            return [scores[index] for index in range(len(token_ids))]

        return run(score_all())

    def begin_weight_update(self) -> None:
        async def begin() -> None:
            await _all(*(engine.abegin_weight_update() for engine in self.engines))

        run(begin())

    def push_bucket(self, bucket: WeightBucket) -> None:
        async def push() -> None:
            await _all(*(engine.apush_bucket(bucket) for engine in self.engines))

        run(push())

    def end_weight_update(self, version: int) -> None:
        async def end() -> None:
            await _all(*(engine.aend_weight_update(version) for engine in self.engines))

        run(end())
        self.weight_version = version

    def check_alive(self) -> None:
        for engine in self.engines:
            engine.check_alive()

    def shutdown(self) -> None:
        with contextlib.ExitStack() as shutdowns:  # calls all of them, and raises what one raised afterwards
            for engine in self.engines:
                shutdowns.callback(engine.shutdown)

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()


def spread_requests(requests: Sequence[GenerateRequest], num_engines: int) -> list[list[int]]:
    """Indices of the requests each engine gets, ascending: whole groups of equal prompts, the costliest group first to
    the engine with the least to do. A function of the requests alone, so that a repeated run spreads them alike."""
    groups: dict[bytes, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.prompt_ids.tobytes(), []).append(index)
    costs = {
        key: len(requests[members[0]].prompt_ids) + sum(requests[index].sampling.max_response_len for index in members)
        for key, members in groups.items()
    }
    shares: list[list[int]] = [[] for _ in range(num_engines)]
    load = [0] * num_engines
    for key in sorted(groups, key=lambda key: (-costs[key], groups[key][0])):
        target = min(range(num_engines), key=lambda engine: load[engine])
        shares[target].extend(groups[key])
        load[target] += costs[key]
    return [sorted(share) for share in shares]


async def _all(*calls: Coroutine[Any, Any, T]) -> list[T]:
    """Run the calls together; on the first failure cancel the others and raise it."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
