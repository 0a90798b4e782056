"""A SGLang HTTP server in a process of its own, seen through the Engine protocol.

Every request runs beside a watch on the server's process: a dead engine is an EngineError within a second or so.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import numpy as np

from megatron_fipo.rollout import answers
from megatron_fipo.rollout.engine import EngineError
from megatron_fipo.rollout.event_loop import run
from megatron_fipo.rollout.log_tail import log_tail
from megatron_fipo.rollout.process_group import shared_memory_of, stop_process_group
from megatron_fipo.types import Completion, GenerateRequest
from megatron_fipo.weights.bucket import WeightBucket

T = TypeVar("T")

_LIVENESS_POLL_S = 0.25
_READY_POLL_S = 0.2
_EXIT_GRACE_S = 3.0  # a server whose connection broke is given this long to be seen dead
_FLUSH_WAIT_S = 30.0  # SGLang answers a request shortly before its scheduler is idle


@dataclass(frozen=True, eq=False)
class ServerHandle:
    """A started server process and how to talk to it."""

    process: subprocess.Popen[bytes]
    port_reservation: socket.socket  # bound, not listening: keeps the port until the server listens on it
    url: str
    api_key: str
    log_path: str
    scratch_dir: str
    tp_size: int
    seeded: bool  # the server draws with the requests' seeds
    prefix_cache: bool
    start_timeout_s: float
    request_timeout_s: float


class SGLangEngine:
    """Implements engine.Engine. Made by server_process.start_engine; call `wait_ready` before anything else."""

    def __init__(self, name: str, server: ServerHandle) -> None:
        self.name = name
        self.weight_version = 0
        self._server = server
        self._updating = False
        self._stopped = False
        self._segments: frozenset[Path] = frozenset()

    def wait_ready(self) -> None:
        """Return once the server answers. EngineError if it ends or takes longer than its start timeout."""
        run(self.await_ready())

    async def await_ready(self) -> None:
        """`wait_ready` for callers with an event loop."""
        deadline = time.monotonic() + self._server.start_timeout_s
        async with aiohttp.ClientSession() as session:
            while not await _is_ready(session, self._server.url):
                self._segments |= shared_memory_of(
                    self.process_id
                )  # now: a process that fails to start takes its maps along
                self.check_alive()
                if time.monotonic() > deadline:
                    raise self._error(f"did not start within {self._server.start_timeout_s:g} s")
                await asyncio.sleep(_READY_POLL_S)
        self._segments |= shared_memory_of(self.process_id)
        self._server.port_reservation.close()

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        return run(self.agenerate(requests))

    async def agenerate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """All requests go to the scheduler at once and meet an empty prefix cache, so that the batches it forms, and
        with them the last bits of the results, depend on nothing but the requests and the weights."""
        assert not self._updating, f"engine {self.name} was asked to generate in the middle of a weight update"
        if not requests:
            return []
        await self._flush()
        prefix = answers.prefix_payload(requests) if self._server.prefix_cache else None
        if prefix is not None:
            await self._post("/generate", prefix)
        answer = await self._post("/generate", answers.generate_payload(requests, seeded=self._server.seeded))
        return self._checked(lambda: answers.read_completions(requests, answer, self.weight_version))

    def score(self, token_ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        return run(self.ascore(token_ids))

    async def ascore(self, token_ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        """`score` for callers with an event loop."""
        assert not self._updating, f"engine {self.name} was asked to score in the middle of a weight update"
        if not token_ids:
            return []
        await self._flush()
        answer = await self._post("/generate", answers.score_payload(token_ids))
        return self._checked(lambda: answers.read_scores(token_ids, answer))

    def begin_weight_update(self) -> None:
        run(self.abegin_weight_update())

    async def abegin_weight_update(self) -> None:
        """Requests that arrive from now on wait, requests in flight are aborted (and fail their caller)."""
        assert not self._updating, f"engine {self.name}: the last weight update was not ended"
        self._updating = True
        await self._post("/pause_generation", {"mode": "abort"})
        await self._post("/begin_weight_update", {})

    def push_bucket(self, bucket: WeightBucket) -> None:
        run(self.apush_bucket(bucket))

    async def apush_bucket(self, bucket: WeightBucket) -> None:
        """One handle per tensor-parallel rank; SGLang's loader takes each rank's shard of every tensor."""
        assert self._updating, f"engine {self.name}: a bucket was pushed outside a weight update"
        handles = [bucket.handle() for _ in range(self._server.tp_size)]
        payload = {"serialized_named_tensors": handles, "load_format": "flattened_bucket", "flush_cache": False}
        await self._post("/update_weights_from_tensor", payload)

    def end_weight_update(self, version: int) -> None:
        run(self.aend_weight_update(version))

    async def aend_weight_update(self, version: int) -> None:
        """The cache is flushed and the version set before the first waiting request is let in."""
        assert self._updating, f"engine {self.name}: a weight update was ended that had not begun"
        await self._post("/end_weight_update", {})
        await self._flush()
        await self._post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        await self._post("/continue_generation", {})
        self.weight_version = version
        self._updating = False

    def check_alive(self) -> None:
        status = self._server.process.poll()
        if self._stopped:
            raise self._error("has been shut down")
        if status is not None:
            reason = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise self._error(f"ended with {reason}")

    def shutdown(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        server = self._server
        server.port_reservation.close()
        # The group goes first: its leader would race us for the clean-up once it sees stdin close.
        stop_process_group(server.process.pid, server.scratch_dir, self._segments)
        server.process.wait()
        assert server.process.stdin is not None
        server.process.stdin.close()

    @property
    def process_id(self) -> int:
        """The server's process id, which is its process group's too."""
        return self._server.process.pid

    async def _flush(self) -> None:
        await self._post(f"/flush_cache?timeout={_FLUSH_WAIT_S:g}", {})

    async def _post(self, path: str, payload: dict[str, Any]) -> Any:
        """POST and return the answer's JSON (None when it is not JSON), watching the process meanwhile."""
        timeout_s = self._server.request_timeout_s
        deadline = time.monotonic() + timeout_s
        task = asyncio.create_task(_send(self._server, path, payload))
        try:
            while not (await asyncio.wait({task}, timeout=_LIVENESS_POLL_S))[0]:
                self.check_alive()
                if time.monotonic() > deadline:
                    raise self._error(f"gave no answer to {path} within {timeout_s:g} s")
            status, body = task.result()
        except (aiohttp.ClientError, ConnectionError) as error:
            await self._raise_if_dying()
            raise self._error(f"broke the connection during {path}: {error!r}") from error
        finally:
            task.cancel()
        if status != 200:
            raise self._error(f"answered {path} with status {status}: {body[:2000].decode(errors='replace')}")
        return json.loads(body) if body[:1] in (b"{", b"[") else None

    async def _raise_if_dying(self) -> None:
        deadline = time.monotonic() + _EXIT_GRACE_S
        while time.monotonic() < deadline:
            self.check_alive()
            await asyncio.sleep(_READY_POLL_S)

    def _checked(self, read: Callable[[], list[T]]) -> list[T]:
        try:
            return read()
        except answers.BadAnswer as error:
            raise self._error(f"gave a bad answer: {error}") from error

    def _error(self, what: str) -> EngineError:
        return EngineError(f"engine {self.name} {what}{log_tail(Path(self._server.log_path))}")


async def _send(server: ServerHandle, path: str, payload: dict[str, Any]) -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {server.api_key}"}
    timeout = aiohttp.ClientTimeout(total=None)
    async with (
        aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
        session.post(server.url + path, json=payload) as response,
    ):
        return response.status, await response.read()


async def _is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url + "/ready", timeout=aiohttp.ClientTimeout(total=5.0)) as response:
            return response.status == 200
    except (aiohttp.ClientError, ConnectionError, TimeoutError):
        return False
