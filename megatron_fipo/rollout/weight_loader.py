"""Runs inside the engine: takes a bucket apart, loads its tensors, and refuses it when its checksum is another.

SGLang imports this module in every scheduler process (its server argument `custom_weight_loader`).
"""

from __future__ import annotations

import functools
import gc
from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from megatron_fipo.weights.bucket import received_bucket
from megatron_fipo.weights.checksum import compile_loop, is_compiled

_KEPT = "_megatron_fipo_buffers"
_NUM_KEPT = 3  # as many as the trainer has


def load_bucket(model: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Load each (header, bytes) of `named_tensors` into SGLang's `model`, which takes its own shard of every tensor.

    The checksum is made of the bytes as they are loaded, and reading it waits for the device: when this returns the
    trainer may drop the bucket. Raises ValueError when a bucket is not what was sent. Some of it is then loaded, and
    SGLang has no answer for it but to end the engine: the message stands at the end of the engine's log.
    """
    for header, flat in named_tensors:
        bucket = received_bucket(header, flat)
        if is_compiled(flat):
            _compile_unseen()
        tensors = bucket.verified_tensors()
        model.load_weights(tensors)
        left = [name for name, _ in tensors]  # a generator that was not exhausted has verified nothing
        if left:
            raise ValueError(f"weight bucket refused: SGLang's {type(model).__name__} did not take {left[0]}")
        if bucket.home is not None:
            _keep_mapped(model, bucket.home)


@functools.cache
def _compile_unseen() -> None:
    """Compile the checksum's loop, and have the garbage collector overlook what the compiler leaves behind: on a CPU
    SGLang collects at every flush of its cache, before every batch of ours, and numba's objects took 35 ms of it."""
    compile_loop()
    gc.collect()
    gc.freeze()


def _keep_mapped(model: Any, flat: Tensor) -> None:
    """Keep the trainer's buffers mapped: torch finds a mapping again when a later bucket lies in the same memory, and
    mapping it anew costs several times the copy."""
    kept: deque[Tensor] = getattr(model, _KEPT, deque(maxlen=_NUM_KEPT))
    if all(flat.untyped_storage().data_ptr() != other.untyped_storage().data_ptr() for other in kept):
        kept.append(flat)
    setattr(model, _KEPT, kept)
