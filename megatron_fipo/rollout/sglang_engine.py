"""A SGLang HTTP server seen through the Engine protocol: one that this process started, or one at an address.

Every request runs beside a watch on the server's process: a dead engine is an EngineError within a second or so.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import aiohttp
import numpy as np

from megatron_fipo.rollout import answers
from megatron_fipo.rollout.distributed_update import UpdateGroup, broadcast_bucket, join_update_group
from megatron_fipo.rollout.engine import NO_VERSION, EngineAddress, EngineError, MemoryTag
from megatron_fipo.rollout.event_loop import run
from megatron_fipo.rollout.http_call import Call, CallFailed, ConnectionBroke, call
from megatron_fipo.rollout.interface import LOOPBACK
from megatron_fipo.rollout.log_tail import log_tail
from megatron_fipo.rollout.server_launch import ServerProcess, ServerStart
from megatron_fipo.types import Completion, GenerateRequest
from megatron_fipo.weights.bucket import ENGINE_LOADER, WeightBucket

T = TypeVar("T")

_READY_POLL_S = 0.2
_READY_ANSWER_S = 5.0
_FIRST_ANSWER_S = 60.0
_EXIT_GRACE_S = 3.0  # a server whose connection broke is given this long to be seen dead
_FLUSH_WAIT_S = 30.0  # SGLang answers a request shortly before its scheduler is idle
_FLUSHED = "Cache flushed"  # how SGLang's answer begins when it was
_SHOWN_CHARS = 200


class SGLangEngine:
    """Implements engine.Engine. Made by server_process.start_engine or `connect_engine`; call `wait_ready` before
    anything else."""

    def __init__(
        self,
        address: EngineAddress,
        *,
        start: ServerStart | None = None,
        process: ServerProcess | None = None,
        own_host: str = LOOPBACK,
    ) -> None:
        """`start` and `process`: of a server that this process started. `own_host`: this machine's address that the
        engine's ranks reach, for weights that come by broadcast."""
        self.name = address.name
        self.address = address  # read at every request
        self.process = process
        self.weight_version = 0
        self._start = start
        self._own_host = own_host
        self._updating = False
        self._released: set[MemoryTag] = set()
        self._group: UpdateGroup | None = None
        self._stopped = False

    @classmethod
    def started(
        cls,
        name: str,
        start: ServerStart,
        *,
        vocab_size: int,
        seeded: bool,
        prefix_cache: bool,
        update_backend: Literal["gloo", "nccl"] | None,
        start_timeout_s: float,
        request_timeout_s: float,
        has_weights: bool,
    ) -> SGLangEngine:
        """Start a server; returns at once. Without `has_weights` it serves nobody before the first update."""
        process = ServerProcess(start)
        address = EngineAddress(
            name=name,
            url=process.url,
            api_key=process.api_key,
            tp_size=start.tp_size,
            vocab_size=vocab_size,
            seeded=seeded,
            prefix_cache=prefix_cache,
            update_backend=update_backend,
            start_timeout_s=start_timeout_s,
            request_timeout_s=request_timeout_s,
        )
        engine = cls(address, start=start, process=process, own_host=start.host)
        engine.weight_version = 0 if has_weights else NO_VERSION
        return engine

    def wait_ready(self) -> None:
        """Return once the server answers. EngineError if it ends or takes longer than its start timeout."""
        run(self.await_ready())

    async def await_ready(self) -> None:
        """`wait_ready` for callers with an event loop."""
        deadline = time.monotonic() + self.address.start_timeout_s
        async with aiohttp.ClientSession() as session:
            while not await _is_ready(session, self.address.url):
                if self.process is not None:
                    self.process.note_segments()
                self.check_alive()
                if time.monotonic() > deadline:
                    raise self._error(f"did not start within {self.address.start_timeout_s:g} s")
                await asyncio.sleep(_READY_POLL_S)
        if self.process is not None:
            self.process.note_segments()
            self.process.release_port()
        await self.acheck_health(_FIRST_ANSWER_S)  # it is ours by its key, and its scheduler lives

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        return run(self.agenerate(requests))

    async def agenerate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """All requests go to the scheduler at once and meet an empty prefix cache, so that the batches it forms, and
        with them the last bits of the results, depend on nothing but the requests and the weights."""
        version = self._served_version("generate")
        if not requests:
            return []
        await self._flush()
        prefix = answers.prefix_payload(requests) if self.address.prefix_cache else None
        if prefix is not None:
            await self._ask("/generate", prefix)
        ids = answers.request_ids(len(requests))
        answer = await self._ask("/generate", answers.generate_payload(requests, ids, seeded=self.address.seeded))
        vocab_size = self.address.vocab_size
        return self._checked(lambda: answers.read_completions(requests, ids, answer, version, vocab_size))

    def score(self, token_ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        return run(self.ascore(token_ids))

    async def ascore(self, token_ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        """`score` for callers with an event loop."""
        version = self._served_version("score")
        if not token_ids:
            return []
        await self._flush()
        ids = answers.request_ids(len(token_ids))
        answer = await self._ask("/generate", answers.score_payload(token_ids, ids))
        return self._checked(lambda: answers.read_scores(token_ids, ids, answer, version))

    def begin_weight_update(self) -> None:
        run(self.abegin_weight_update())

    async def abegin_weight_update(self) -> None:
        """Requests that arrive from now on wait, requests in flight are aborted (and fail their caller)."""
        if self._updating:
            raise self._error("cannot be updated: its last weight update broke off, it must be started again")
        if "weights" in self._released:
            raise self._error("cannot be updated: the memory of its weights is released")
        self._updating = True
        self.weight_version = NO_VERSION
        await self._do("/pause_generation", {"mode": "abort"})
        await self._do("/begin_weight_update", {})
        if self.address.update_backend is not None and self._group is None:
            self._group = await self._named(
                join_update_group(
                    self._call,
                    backend=self.address.update_backend,
                    tp_size=self.address.tp_size,
                    host=self._own_host,
                    timeout_s=self.address.request_timeout_s,
                )
            )

    def push_bucket(self, bucket: WeightBucket) -> None:
        run(self.apush_bucket(bucket))

    async def apush_bucket(self, bucket: WeightBucket) -> None:
        """Through shared memory with one handle per tensor-parallel rank, or by a broadcast to all of them; SGLang's
        loader takes each rank's shard of every tensor. Only the former compares the bucket's checksum."""
        assert self.weight_version == NO_VERSION, f"engine {self.name}: a bucket was pushed outside a weight update"
        if self.address.update_backend is not None:
            assert self._group is not None, f"engine {self.name}: a bucket was pushed outside a weight update"
            await self._named(broadcast_bucket(self._call, self._group, bucket))
            return
        handles = [bucket.handle() for _ in range(self.address.tp_size)]
        payload = {"serialized_named_tensors": handles, "load_format": ENGINE_LOADER, "flush_cache": False}
        await self._do("/update_weights_from_tensor", payload)

    def end_weight_update(self, version: int) -> None:
        run(self.aend_weight_update(version))

    async def aend_weight_update(self, version: int) -> None:
        """The cache is flushed and the version set before the first waiting request is let in."""
        assert self._updating, f"engine {self.name}: a weight update was ended that had not begun"
        assert version >= 0, f"engine {self.name}: {version} is no weight version"
        await self._do("/end_weight_update", {})
        await self._flush()
        await self._do("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        await self._do("/continue_generation", {})
        self.weight_version = version
        self._updating = False

    def weight_checksums(self) -> list[dict[str, str]]:
        return run(self.aweight_checksums())

    async def aweight_checksums(self) -> list[dict[str, str]]:
        """`weight_checksums` for callers with an event loop."""
        answer = await self._ask("/weights_checker", {"action": "checksum"})
        return self._checked(lambda: answers.read_checksums(answer, self.address.tp_size))

    def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        run(self.arelease_memory(tags))

    async def arelease_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Waits for the scheduler to be idle: SGLang's would end of an assertion. On a CPU nothing is freed. Without
        its weights the engine serves nobody until an update has brought others."""
        twice = self._released & set(tags)
        if twice:
            raise self._error(f"was told to release {', '.join(sorted(twice))} twice")
        if not tags:
            return
        await self._flush()
        if "weights" in tags:
            self.weight_version = NO_VERSION
        self._released |= set(tags)
        await self._ask("/release_memory_occupation", {"tags": list(tags)})

    def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        run(self.aresume_memory(tags))

    async def aresume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """`resume_memory` for callers with an event loop."""
        missing = set(tags) - self._released
        if missing:
            raise self._error(f"was told to resume {', '.join(sorted(missing))}, which it has not released")
        if not tags:
            return
        await self._ask("/resume_memory_occupation", {"tags": list(tags)})
        self._released -= set(tags)

    async def acheck_health(self, timeout_s: float) -> None:
        """Asks the scheduler for its settings, which it answers between two steps of its batch. (SGLang's own /health
        would generate a token when idle, which other requests could share a batch with.)"""
        try:
            answer = await self._call(Call("/server_info", None, timeout_s))
        except CallFailed as error:
            raise self._error(f"is not healthy: it {error}") from error
        if not isinstance(answer, dict) or not answer.get("internal_states"):
            raise self._error("is not healthy: its scheduler told nothing of itself")

    def check_alive(self) -> None:
        if self._stopped:
            raise self._error("has been shut down")
        ended = None if self.process is None else self.process.end
        if ended is not None:
            raise self._error(ended)

    def restart(self) -> None:
        """As the protocol has it, with a new process, port and key. EngineError when it is another process's to start,
        or when no process can be started."""
        if self._start is None or self.process is None:
            raise self._error("belongs to another process, which alone can start it again")
        self._close_group()
        self.weight_version = NO_VERSION
        self._updating = False
        self._released = set()
        try:
            self.process.stop()
            self.process = ServerProcess(self._start, append_log=True)
        except OSError as error:  # TimeoutError is one
            raise self._error(f"could not be started again: {error}") from error
        self._stopped = False
        self.address = dataclasses.replace(self.address, url=self.process.url, api_key=self.process.api_key)

    def reconnect(self, address: EngineAddress) -> None:
        """Follow an engine that its own process has started again."""
        assert self.process is None, f"engine {self.name} is this process's own"
        assert address.name == self.name, f"engine {self.name} is not {address.name}"
        self._close_group()
        self._stopped = False
        self.address = address
        self.weight_version = NO_VERSION
        self._updating = False
        self._released = set()

    def shutdown(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._close_group()
        if self.process is not None:
            self.process.stop()

    @property
    def is_own(self) -> bool:
        return self.process is not None

    @property
    def process_id(self) -> int:
        """The process id of a server that this process started, which is its process group's too."""
        assert self.process is not None, f"engine {self.name} belongs to another process"
        return self.process.pid

    def _served_version(self, what: str) -> int:
        """The version to answer by. EngineError if there is none to serve."""
        if self.weight_version == NO_VERSION:
            raise self._error(f"cannot {what}: it was given no whole set of weights")
        if self._released:
            raise self._error(f"cannot {what}: its memory is released ({', '.join(sorted(self._released))})")
        return self.weight_version

    async def _flush(self) -> None:
        path = f"/flush_cache?timeout={_FLUSH_WAIT_S:g}"
        answer = await self._named(self._call(Call(path, {}, self.address.request_timeout_s, answer="text")))
        if not answer.startswith(_FLUSHED):
            raise self._error(f"did not say that it flushed its cache, but {answer[:_SHOWN_CHARS]!r}")

    async def _ask(self, path: str, payload: dict[str, Any]) -> Any:
        return await self._named(self._call(Call(path, payload, self.address.request_timeout_s)))

    async def _do(self, path: str, payload: dict[str, Any]) -> None:
        """Have something done that the weights depend on: an answer which does not say so is a failure."""
        await self._named(self._call(Call(path, payload, self.address.request_timeout_s, answer="done")))

    async def _call(self, what: Call) -> Any:
        """One request. EngineError if the engine's process ends meanwhile, else CallFailed."""
        try:
            return await call(self.address, what, self.check_alive)
        except ConnectionBroke:
            deadline = time.monotonic() + _EXIT_GRACE_S
            while self.process is not None and time.monotonic() < deadline:
                self.check_alive()
                await asyncio.sleep(_READY_POLL_S)
            raise

    async def _named(self, calling: Coroutine[Any, Any, T]) -> T:
        """Its result, its failure as this engine's."""
        try:
            return await calling
        except CallFailed as error:
            raise self._error(str(error)) from error

    def _checked(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except answers.BadAnswer as error:
            raise self._error(f"gave a bad answer: {error}") from error

    def _close_group(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def _error(self, what: str) -> EngineError:
        tail = "" if self.process is None else log_tail(Path(self.process.log_path), self.process.log_start)
        return EngineError(f"engine {self.name} {what}{tail}")


def connect_engine(address: EngineAddress, *, own_host: str = LOOPBACK) -> SGLangEngine:
    """The engine at an address, which another process started, watches and ends. `restart` is that process's part, then
    `reconnect`. `own_host`: this machine's address that the engine reaches, for weights that come by broadcast.

    Where weights come through shared memory, only a process of the engine's machine can push buckets.
    """
    return SGLangEngine(address, own_host=own_host)


async def _is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url + "/ready", timeout=aiohttp.ClientTimeout(total=_READY_ANSWER_S)) as response:
            return response.status == 200
    except (aiohttp.ClientError, ConnectionError, TimeoutError):
        return False
