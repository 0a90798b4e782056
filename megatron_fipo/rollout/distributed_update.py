"""Weights by broadcast to an engine that shares no memory with the trainer: SGLang's update_weights_from_distributed.

A private process group of this process (rank 0) and the engine's tensor-parallel ranks (1 to tp_size), which meet at a
store of their own: the trainer's own groups neither see it nor are seen.
"""

from __future__ import annotations

import asyncio
import datetime
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.rollout.engine import EngineError
from megatron_fipo.rollout.http_call import Call, CallFailed
from megatron_fipo.rollout.interface import LOOPBACK
from megatron_fipo.weights.bucket import BucketEntry, WeightBucket

T = TypeVar("T")
Ask = Callable[[Call], Awaitable[Any]]

_JOIN_TIMEOUT_S = 60.0
_POLL_S = 0.005


@dataclass(frozen=True, eq=False)
class UpdateGroup:
    """A process group with an engine's ranks. Of no use any more once a broadcast failed."""

    name: str
    backend: Any  # torch's ProcessGroupGloo or ProcessGroupNCCL
    store: dist.TCPStore  # held: NCCL goes through it at its first collective
    timeout_s: float

    def close(self) -> None:
        """Let go of the group without waiting for the engine, which may be gone."""
        self.backend.abort()


async def join_update_group(
    ask: Ask, *, backend: Literal["gloo", "nccl"], tp_size: int, host: str, timeout_s: float
) -> UpdateGroup:
    """Make the group with the engine behind `ask`.

    `host`: this machine's address that the engine reaches; gloo stays on loopback, that is on this machine.

    Raises CallFailed when the engine does not join within a minute, or what `ask` raises when the engine fails.
    """
    host = host if backend == "nccl" else LOOPBACK
    name = f"weights-{secrets.token_hex(8)}"
    store, port = _serve_store(host)
    making = _in_thread(partial(_new_backend, store, name, backend, tp_size + 1))
    payload = {
        "master_address": host,
        "master_port": port,
        "rank_offset": 1,
        "world_size": tp_size + 1,
        "group_name": name,
        "backend": backend,
    }
    await ask(Call("/init_weights_update_group", payload, _JOIN_TIMEOUT_S, answer="done"))
    try:
        group = await asyncio.wrap_future(making)  # the engine has joined: this takes milliseconds
    except (RuntimeError, ValueError) as error:  # torch's errors are RuntimeErrors
        raise CallFailed(f"did not join the group that weights come through: {error}") from error
    group.set_timeout(datetime.timedelta(seconds=timeout_s))
    return UpdateGroup(name, group, store, timeout_s)


async def broadcast_bucket(ask: Ask, group: UpdateGroup, bucket: WeightBucket) -> None:
    """Send a bucket as one flat tensor; returns once the engine has loaded it.

    Raises CallFailed when the broadcast fails, or what `ask` raises when the engine does: the group is closed then.
    """
    flat, entries = packed(bucket)
    payload = {
        "names": [entry.name for entry in entries],
        "dtypes": [str(entry.dtype).removeprefix("torch.") for entry in entries],
        "shapes": [list(entry.shape) for entry in entries],
        "group_name": group.name,
        "flush_cache": False,
        "load_format": "flattened_bucket",
    }
    asking = asyncio.ensure_future(
        ask(Call("/update_weights_from_distributed", payload, group.timeout_s, answer="done"))
    )
    try:
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()  # the thread's stream does not wait for ours
        launching = _in_thread(partial(_broadcast, group.backend, flat))
        while not (asking.done() and launching.done() and launching.result().is_completed()):
            if asking.done():
                asking.result()  # raises if the engine failed: it will not take its part
            if launching.done() and launching.result().is_completed():
                launching.result().wait()  # raises if the broadcast failed
            await asyncio.sleep(_POLL_S)
        asking.result()
        launching.result().wait()
    except BaseException as error:
        asking.cancel()
        group.close()
        if isinstance(error, RuntimeError) and not isinstance(error, EngineError):  # torch's, of the broadcast
            raise CallFailed(f"was lost in a broadcast of weights: {error}") from error
        raise


def packed(bucket: WeightBucket) -> tuple[Tensor, list[BucketEntry]]:
    """The bucket's tensors end to end, as SGLang's flattened_bucket wants them: no gaps, each aligned to its element
    size. The bucket's own buffer where it has no gaps, else a copy, larger elements first."""
    if all(entry.start == before for entry, before in zip(bucket.entries, _ends(bucket.entries), strict=True)):
        return bucket.flat[: bucket.entries[-1].end], list(bucket.entries)
    entries = sorted(bucket.entries, key=lambda entry: -entry.dtype.itemsize)
    return torch.cat([bucket.flat[entry.start : entry.end] for entry in entries]), entries


def _ends(entries: tuple[BucketEntry, ...]) -> list[int]:
    """Where each entry would start if it followed the one before it at once."""
    return [0, *(entry.end for entry in entries[:-1])]


def _serve_store(host: str) -> tuple[dist.TCPStore, int]:
    """A store that listens on `host` alone; torch's own way would be every address."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.fileno(),
            timeout=datetime.timedelta(seconds=_JOIN_TIMEOUT_S),
        )
        listener.detach()  # it is the store's now
    return store, port


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """Run what blocks until an engine does its part. The thread does not keep the process from ending."""
    result: Future[T] = Future()

    def fulfil() -> None:
        result.set_running_or_notify_cancel()
        try:
            result.set_result(work())
        except BaseException as error:  # the waiting side's to handle
            result.set_exception(error)

    threading.Thread(target=fulfil, daemon=True).start()
    return result


def _broadcast(backend: Any, flat: Tensor) -> Any:
    """Start the broadcast and return torch's Work. NCCL makes its connection at the first one, which blocks."""
    if flat.is_cuda:
        torch.cuda.set_device(flat.device)  # of this thread
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor, options.asyncOp = 0, 0, True
    return backend.broadcast([flat], options)


def _new_backend(store: dist.TCPStore, name: str, backend: Literal["gloo", "nccl"], size: int) -> Any:
    """This process as rank 0 of the group. Not registered with torch.distributed, which knows one world only."""
    # The prefixes under which the engine's ranks look: SGLang's, then torch's for a group, then for a device.
    device = "cpu" if backend == "gloo" else "cuda"
    prefixed: dist.Store = dist.PrefixStore(name, store)
    for prefix in (f"{name}/", f"{device}/"):
        prefixed = dist.PrefixStore(prefix, prefixed)
    timeout = datetime.timedelta(seconds=_JOIN_TIMEOUT_S)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(prefixed, 0, size, options)
    gloo_options = dist.ProcessGroupGloo._Options()
    gloo_options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    gloo_options._timeout = timeout
    return dist.ProcessGroupGloo(prefixed, 0, size, gloo_options)
