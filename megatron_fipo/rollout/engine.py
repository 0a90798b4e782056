"""What the rest of the product may ask of an inference engine, whatever serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from megatron_fipo.types import Completion, GenerateRequest
from megatron_fipo.weights.bucket import WeightBucket

MemoryTag = Literal["weights", "kv_cache"]
NO_VERSION = -1
"""The weight version of an engine that must not serve: an update is open or broke off, or it was started again."""


class EngineError(RuntimeError):
    """An engine died, answered nonsense or not at all. The message ends with the tail of the engine's log."""


class NoEngineLeft(EngineError):
    """Every engine failed, and none may be started again. Names each with what it failed of."""


@dataclass(frozen=True)
class EngineAddress:
    """How to reach an engine, from its own machine or another: plain data, to be sent to whoever drives it."""

    name: str
    url: str  # http://ADDRESS:PORT
    api_key: str
    tp_size: int
    vocab_size: int  # tokens that it may draw are smaller
    seeded: bool  # it draws with the requests' seeds
    prefix_cache: bool
    update_backend: Literal["gloo", "nccl"] | None  # weights come by broadcast over it; None: through shared memory
    start_timeout_s: float
    request_timeout_s: float


class Engine(Protocol):
    """One inference engine. It serves one weight version at a time; between `abegin_weight_update` and
    `aend_weight_update` it serves nobody. Every method raises EngineError when the engine fails, and none hangs.

    An engine that failed is of no use until `restart`; then it must be given weights before it serves.
    """

    name: str
    address: EngineAddress
    weight_version: int  # of the weights now served; 0: the checkpoint it was started from; NO_VERSION: serves nobody

    @property
    def is_own(self) -> bool:
        """This process started it and can start it again; else it follows its owner by `reconnect`."""
        ...

    @property
    def process_id(self) -> int:
        """The process, and process group, of an engine that `is_own`."""
        ...

    async def await_ready(self) -> None:
        """Return once the engine answers."""
        ...

    async def agenerate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """One completion per request, in the order of the requests."""
        ...

    async def ascore(self, token_ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs of given tokens: for each [L] int64 an [L] fp32, entry i about token i + 1, the last entry 0."""
        ...

    async def abegin_weight_update(self) -> None:
        """Stop serving (`weight_version` becomes NO_VERSION); open an update."""
        ...

    async def apush_bucket(self, bucket: WeightBucket) -> None:
        """Copy a bucket's tensors into the engine's weights; returns once the engine has them, and has found their
        checksum to be the bucket's."""
        ...

    async def aend_weight_update(self, version: int) -> None:
        """Close the update, drop what was cached under the old weights, serve as `version`."""
        ...

    async def aweight_checksums(self) -> list[dict[str, str]]:
        """Per tensor-parallel rank: parameter, under the engine's own name and in its own layout -> its checksum."""
        ...

    async def arelease_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Give the device memory of these parts back; what was in it is lost."""
        ...

    async def aresume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Take the memory again, uninitialised."""
        ...

    async def acheck_health(self, timeout_s: float) -> None:
        """EngineError unless the engine answers within `timeout_s`, also while it generates."""
        ...

    def check_alive(self) -> None:
        """EngineError if the engine's process has ended."""
        ...

    def restart(self) -> None:
        """End what is left of the engine and start it again, as it was first started; returns at once."""
        ...

    def reconnect(self, address: EngineAddress) -> None:
        """Follow an engine to where the process it belongs to has started it again."""
        ...

    def shutdown(self) -> None:
        """End the engine and everything it started. May be called again, and `restart` or `reconnect` after it."""
        ...
