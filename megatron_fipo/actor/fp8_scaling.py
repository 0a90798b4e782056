"""Delayed scaling: the one FP8 recipe whose forward pass depends on the passes before it.

Transformer Engine then quantises with a scale per tensor that comes from the largest values (amax) of earlier passes.
With gradients on it makes new scales after each forward pass of a pipeline stage, from what all tensor-, data- and
context-parallel ranks saw; with gradients off it makes none, but still notes what it saw, which goes into the next
update's scales. Left alone, then, the old log-probs of all micro-batches would be computed under the first one's
scales, not those of the update, and would change the update's. The other recipes take each scale from the tensor at
hand.

As megatron-core and Transformer Engine 2.20 are written (fp8_utils.get_fp8_context, FP8GlobalStateManager).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

FIELDS = ("scale", "amax_history")
DIRECTIONS = ("scaling_fwd", "scaling_bwd")
Forward = Callable[[Callable[[], None]], Any]  # a forward-only pass that calls what it is given after each micro-batch


def has_delayed_scaling(config: Any) -> bool:
    """Whether a TransformerConfig asks for it."""
    return bool(config.fp8) and config.fp8_recipe == "delayed"


def drop_quantised_weights(chunks: Sequence[nn.Module]) -> None:
    """Let go of the FP8 copies of weights (up to 2 bytes each) that Transformer Engine keeps between micro-batches,
    with any recipe: it makes them anew in the first micro-batch of every pass."""
    for chunk in chunks:
        for module in chunk.modules():
            workspaces = getattr(module, "_fp8_workspaces", None)
            if isinstance(workspaces, dict):
                workspaces.clear()


def make_forward_scales() -> None:
    """What Transformer Engine does after a forward pass with gradients. Collective over the ranks that share amaxes:
    the tensor-, data- and context-parallel ones of a stage."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=True)


@dataclass(eq=False)
class DelayedScaling:
    """The scales of this rank's chunks and the histories they are made of."""

    chunks: Sequence[nn.Module]
    make_scales: Callable[[], None] = make_forward_scales
    saved: Mapping[str, Tensor] = field(default_factory=dict)  # loaded, for when a pass has made the tensors

    @contextlib.contextmanager
    def as_in_training(self, short_pass: Forward) -> Iterator[Callable[[], None]]:
        """Inside, a forward-only pass that calls what this yields after every micro-batch meets the scales that the
        next update will meet; afterwards none of it has happened to them.

        So the first update after a rollout repeats the pass bit for bit (ratio 1). `short_pass` runs a micro-batch;
        before the first pass of all, when every scale is 1 (which leaves a weight of 0.02 three bits), it is used to
        learn the forward scales.
        """
        self._begin(short_pass)
        before = {name: tensor.clone() for name, tensor in _tensors(self.chunks).items()}
        try:
            yield self.make_scales
        finally:
            self._put_back(before)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: by chunk, module and name, in main memory. Transformer Engine itself would pickle it."""
        now = {name: tensor.cpu().clone() for name, tensor in _tensors(self.chunks).items()}
        return now or dict(self.saved)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave at this layout, before the first pass: that one makes the tensors for it."""
        assert not _tensors(self.chunks), "a pass was run before the state was loaded"
        self.saved = dict(state)

    def _begin(self, short_pass: Forward) -> None:
        tensors = _tensors(self.chunks)
        if not tensors:
            short_pass(_nothing if self.saved else self.make_scales)
            if self.saved:
                self._put_back(self.saved)

    def _put_back(self, values: Mapping[str, Tensor]) -> None:
        """In place: Transformer Engine's own lists hold views. Raises ValueError when the tensors are others."""
        own = _tensors(self.chunks)
        for name in values.keys() ^ own.keys():
            raise ValueError(f"the FP8 scaling state of {name} is not that of this model")
        for name, value in values.items():
            if own[name].shape != value.shape:
                wanted = tuple(own[name].shape)
                raise ValueError(
                    f"the FP8 scaling state {name} has shape {tuple(value.shape)}, but this run's has {wanted}: was it "
                    "saved with another --fp8-amax-history-len?"
                )
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)


def _tensors(chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Those that there are: a module makes its own in its first forward pass."""
    found: dict[str, Tensor] = {}
    for index, chunk in enumerate(chunks):
        for name, module in chunk.named_modules():
            meta = getattr(module, "fp8_meta", None)
            if not isinstance(meta, dict):
                continue
            for direction in DIRECTIONS:
                for each in FIELDS:
                    tensor = getattr(meta.get(direction), each, None)
                    if isinstance(tensor, Tensor):
                        found[f"chunk_{index}.{name}.{direction}.{each}"] = tensor
    return found


def _nothing() -> None:
    pass
