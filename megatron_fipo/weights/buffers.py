"""Shared memory that buckets are written into, used again for later buckets: fresh pages cost ten times their copy."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.multiprocessing
from torch import Tensor

from megatron_fipo.sheltered import sheltered_children

_MOST_FREE = 3  # one that is packed and two that engines load
_STRATEGY_LOCK = threading.Lock()  # torch's sharing strategy is the process's


class BucketBuffers:
    """Buffers whose last bucket is gone, with every view of it. On a GPU torch's allocator does this by itself, and
    nothing is kept here."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, size_bytes: int, capacity_bytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(flat, home): `flat` [size_bytes] uint8, uninitialised, and what to pickle in its place, which shares its
        memory. The memory is used again when `flat` and all its views are gone, whatever became of `home`.

        Buffers have `capacity_bytes`, of which only what is written takes memory; a larger one is not kept.
        """
        if device.type != "cpu":
            flat = torch.empty(size_bytes, dtype=torch.uint8, device=device)
            return flat, flat
        if size_bytes > capacity_bytes:
            home = _shared_memory(size_bytes)
            return home, home
        base: Tensor | None = None
        while base is None and self._free:  # in place: `_give_back` may be called in another thread meanwhile
            free = self._free.pop()
            base = free if free.numel() == capacity_bytes else None
        base = _shared_memory(capacity_bytes) if base is None else base
        window = base.numpy()  # a new array each time: it dies with the last tensor made of it
        weakref.finalize(window, self._give_back, base).atexit = False
        return torch.from_numpy(window)[:size_bytes], base[:size_bytes]

    def _give_back(self, base: Tensor) -> None:
        if len(self._free) < _MOST_FREE:
            self._free.append(base)


@contextmanager
def shared_by_file_name() -> Iterator[None]:
    """torch's file_system sharing: a handle is a name, which a process outside the trainer's family can open. torch
    removes the file when its last user lets go. A handle that was never opened, or a user that was killed, counts as
    one: then it is removed when all processes that had it are gone, the trainer among them."""
    with _STRATEGY_LOCK:
        before = torch.multiprocessing.get_sharing_strategy()
        torch.multiprocessing.set_sharing_strategy("file_system")
        try:
            yield
        finally:
            torch.multiprocessing.set_sharing_strategy(before)


def _shared_memory(size_bytes: int) -> Tensor:
    """An uninitialised [size_bytes] uint8 tensor that another process can open."""
    with shared_by_file_name(), sheltered_children():  # the first call starts torch_shm_manager
        storage = torch.UntypedStorage._new_shared(size_bytes)
    return torch.tensor([], dtype=torch.uint8).set_(storage, 0, (size_bytes,), (1,))
