"""A look at the weights that leave the actor: what is broken is neither served by an engine nor saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

LARGEST_WEIGHT = 2.0**63  # fp32 holds its square, which norms and Adam's second moment need


class BrokenWeights(RuntimeError):
    """The actor's weights hold NaN, an infinity or an absurd number. Names the parameter, the rank and the update."""


def require_finite_weights(chunks: Sequence[nn.Module], control: dist.ProcessGroup, *, num_updates: int) -> None:
    """Raise BrokenWeights on every rank unless all parameters on all ranks lie within +-LARGEST_WEIGHT.

    Reads every parameter once and waits for the device once; `num_updates` is said in the message. Collective over
    `control` (all ranks).
    """
    named = [(name, parameter) for chunk in chunks for name, parameter in chunk.named_parameters()]
    ranges = torch.stack([torch.stack(torch.aminmax(parameter.detach())).float() for _, parameter in named])  # [N, 2]
    broken = [
        f"{name} (from {low:g} to {high:g})"
        for (name, _), (low, high) in zip(named, ranges.tolist(), strict=True)
        if not (low >= -LARGEST_WEIGHT and high <= LARGEST_WEIGHT)  # so for NaN, which aminmax passes on
    ]
    here = f"{broken[0]} and {len(broken) - 1} more on rank {control.rank()}" if broken else None
    everywhere: list[Any] = [None] * control.size()
    dist.all_gather_object(everywhere, here, group=control)
    found = [text for text in everywhere if text is not None]
    if found:
        raise BrokenWeights(
            f"after {num_updates} updates the weights hold numbers that are not finite or beyond {LARGEST_WEIGHT:.2g}: "
            f"{'; '.join(found)}. They are neither served by an engine nor saved; resume from the last checkpoint"
        )
