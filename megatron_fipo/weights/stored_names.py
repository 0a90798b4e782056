"""Under which keys, and in which shapes, Megatron-LM's torch_dist checkpoints hold a parameter: tables, pure functions.

A checkpoint has no parallel layout: every tensor in it is whole, as one rank would hold it. Layers of one kind are
stacked in a tensor with a leading dimension [num_layers, ...], experts behind it in another one; or, as newer writers
do, every layer, every expert, and even the halves of a gated FFN have a key of their own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_fipo.weights.architecture import Architecture
from megatron_fipo.weights.mapping import LAYER_ALIASES, partition_of

TRACKER = "latest_checkpointed_iteration.txt"
"""In which Megatron-LM writes what it saved last."""

LAYERS = "decoder.layers."
EXPERTS = "mlp.experts.experts."
OPTIMIZER_KEY = re.compile(r"(chained_\d+\.)?optimizer\.")
"""Of tensors that belong to the optimizer: `optimizer.state.exp_avg.decoder.layers...` and the like."""

EXTRA_STATE = "_extra_state"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.+)")
_ALIAS_OF = {canonical: alias for alias, canonical in LAYER_ALIASES.items()}


@dataclass(frozen=True)
class Place:
    """A parameter, or one half of it, in a checkpoint: the tensor `key` at `index` of its leading dimensions."""

    key: str
    index: tuple[int, ...] = ()  # the layer's, then the expert's number, where these are stacked
    stack: tuple[int, ...] = ()  # how many there are of each


def places_to_read(name: str, arch: Architecture) -> Iterator[tuple[Place, ...]]:
    """Everything that a checkpoint may hold the parameter `name` (canonical) as; the places of one are its parts, one
    after the other along dimension 0."""
    for place in _wholes(name, arch):
        yield (place,)
        if partition_of(name) == "gate_up":
            yield tuple(Place(f"{place.key}_{half}", place.index, place.stack) for half in ("w", "v"))


def places_to_write(name: str, arch: Architecture) -> list[Place]:
    """Where to write the parameter `name`, so that Megatron-LM finds it in its default form.

    The norm before a mixture of experts has one key in models of Transformer Engine and another one in local ones: it
    is written under both.
    """
    wholes = [place for place in _wholes(name, arch) if len(place.stack) == _num_stacked(name)]
    is_norm = name.endswith(".pre_mlp_layernorm.weight") and arch.num_moe_experts
    return wholes if is_norm else wholes[:1]


def extra_states(arch: Architecture) -> list[str]:
    """Keys of the objects that Megatron-LM's layers, local or of Transformer Engine, look for beside their weights."""
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"]
    if arch.qk_layernorm:
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    num_layers, num_experts = arch.num_layers, arch.num_moe_experts
    modules += ["pre_mlp_layernorm"] if num_experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
    keys = [f"{LAYERS}{module}.{EXTRA_STATE}/shard_{i}_{num_layers}" for module in modules for i in range(num_layers)]
    for module, layer, expert in itertools.product(
        ("linear_fc1", "linear_fc2"), range(num_layers), range(num_experts or 0)
    ):
        keys.append(f"{LAYERS}{EXPERTS}{module}.{EXTRA_STATE}/shard_{layer}.{expert}_{num_layers}.{num_experts}")
    return [*keys, f"decoder.final_layernorm.{EXTRA_STATE}/shard_0_1"]


def _wholes(name: str, arch: Architecture) -> Iterator[Place]:
    """Layers stacked before single ones, and so the experts; the usual name before the other."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        yield Place(name)
        return
    number, rest = int(layer[1]), layer[2]
    expert = _EXPERT.fullmatch(rest)
    for is_stacked in (True, False):
        prefix = LAYERS if is_stacked else f"{LAYERS}{number}."
        index, stack = ((number,), (arch.num_layers,)) if is_stacked else ((), ())
        if expert is None:
            for key in (_ALIAS_OF[rest], rest) if rest in _ALIAS_OF else (rest,):
                yield Place(prefix + key, index, stack)
            continue
        assert arch.num_moe_experts, (name, arch)
        yield Place(f"{prefix}{EXPERTS}{expert[2]}", (*index, int(expert[1])), (*stack, arch.num_moe_experts))
        yield Place(f"{prefix}{EXPERTS}{expert[1]}.{expert[2]}", index, stack)


def _num_stacked(name: str) -> int:
    layer = _LAYER.fullmatch(name)
    return 0 if layer is None else 2 if _EXPERT.fullmatch(layer[2]) else 1
