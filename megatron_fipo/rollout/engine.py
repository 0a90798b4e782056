"""What the rest of the product may ask of an inference engine, whatever serves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megatron_fipo.rollout.weight_bucket import WeightBucket
from megatron_fipo.types import Completion, GenerateRequest


class EngineError(RuntimeError):
    """An engine died, answered nonsense or not at all. The message ends with the tail of the engine's log."""


class Engine(Protocol):
    """One inference engine. It serves one weight version at a time; between `begin_weight_update` and
    `end_weight_update` it serves nobody. Every method raises EngineError when the engine fails, and none hangs."""

    name: str
    weight_version: int  # of the weights now served; 0: the checkpoint the engine was started from

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """One completion per request, in the order of the requests."""
        ...

    async def agenerate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """`generate` for callers with an event loop."""
        ...

    def begin_weight_update(self) -> None:
        """Stop serving; open an update."""
        ...

    def push_bucket(self, bucket: WeightBucket) -> None:
        """Copy a bucket's tensors into the engine's weights; returns once the engine has them."""
        ...

    def end_weight_update(self, version: int) -> None:
        """Close the update, drop what was cached under the old weights, serve as `version`."""
        ...

    def score(self, token_ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs of given tokens: for each [L] int64 an [L] fp32, entry i about token i + 1, the last entry 0."""
        ...

    def check_alive(self) -> None:
        """EngineError if the engine's process has ended."""
        ...

    def shutdown(self) -> None:
        """End the engine and everything it started. May be called again."""
        ...
