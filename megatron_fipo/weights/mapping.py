"""Which Hugging Face tensors make which Megatron parameter, and how tensor parallelism cuts it: tables, pure functions.

Megatron names are global: `decoder.layers.N` counts layers over all pipeline stages, and `mlp.experts.J` counts experts
over all expert-parallel ranks, whatever Megatron's own layers call them. A tensor-parallel shard, of an expert one over
the expert-tensor-parallel ranks, is:
    qkv      [G_local * (H/G + 2) * d, ...]   per query group its q heads, then k, then v
    gate_up  [2 * ffn_local, hidden]          the rank's rows of gate, then its rows of up
    row      [hidden, input_local]            columns of the whole
    vocab    [V_padded / tp, hidden]          rows of the whole, zeros after the last token
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_fipo.weights.architecture import Architecture, hf_shapes
from megatron_fipo.weights.source import WeightSource

Partition = Literal["replicated", "qkv", "gate_up", "row", "vocab"]


@dataclass(frozen=True)
class Rule:
    """How a Megatron parameter is cut, and the Hugging Face tensors it is made of, in the order they are laid."""

    partition: Partition
    hf: tuple[str, ...]


LAYER_RULES: dict[str, Rule] = {
    "input_layernorm.weight": Rule("replicated", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": Rule(
        "qkv", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    ),
    "self_attention.linear_qkv.bias": Rule(
        "qkv", ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
    ),
    "self_attention.q_layernorm.weight": Rule("replicated", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": Rule("replicated", ("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": Rule("row", ("self_attn.o_proj.weight",)),
    "pre_mlp_layernorm.weight": Rule("replicated", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": Rule("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": Rule("row", ("mlp.down_proj.weight",)),
    "mlp.router.weight": Rule("replicated", ("mlp.gate.weight",)),
}
"""Below decoder.layers.N and model.layers.N."""

EXPERT_RULES: dict[str, Rule] = {
    "linear_fc1.weight": Rule("gate_up", ("gate_proj.weight", "up_proj.weight")),
    "linear_fc2.weight": Rule("row", ("down_proj.weight",)),
}
"""Below mlp.experts.J, on both sides."""

EMBEDDING, FINAL_NORM, OUTPUT = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)
TOP_RULES: dict[str, Rule] = {
    EMBEDDING: Rule("vocab", ("model.embed_tokens.weight",)),
    FINAL_NORM: Rule("replicated", ("model.norm.weight",)),
    OUTPUT: Rule("vocab", ("lm_head.weight",)),
}

LAYER_ALIASES: dict[str, str] = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's fused layers keep the norm before them as their own parameter."""

_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(linear_fc[12]\.weight)")
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12]\.weight)")  # one module for each
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12]\.weight)(\d+)")  # Transformer Engine's grouped GEMM


def partition_of(name: str) -> Partition:
    """How tensor parallelism cuts the Megatron parameter `name`. An unknown name raises ValueError, here and below."""
    return _rule(name).partition


def canonical_name(name: str, *, first_expert: int = 0) -> str:
    """The name used here for what Megatron calls `name`, whose experts are numbered from this rank's first.

    Transformer Engine's fused norms and grouped experts have names of their own.
    """
    layer, rest = _split_layer(name)
    if layer is None:
        return name
    rest = LAYER_ALIASES.get(rest, rest)
    if found := _LOCAL_EXPERT.fullmatch(rest):
        rest = f"mlp.experts.{first_expert + int(found[1])}.{found[2]}"
    elif found := _GROUPED_EXPERT.fullmatch(rest):
        rest = f"mlp.experts.{first_expert + int(found[2])}.{found[1]}"
    return f"decoder.layers.{layer}.{rest}"


def expert_of(name: str) -> int | None:
    """The number of the expert that the canonical `name` belongs to; None: it is outside of experts."""
    found = _EXPERT.fullmatch(_split_layer(name)[1])
    return int(found[1]) if found else None


def hf_names_of(name: str) -> tuple[str, ...]:
    """The Hugging Face tensors that make up the Megatron parameter `name`; lm_head.weight for a tied output too."""
    layer, _ = _split_layer(name)
    prefix = "" if layer is None else f"model.layers.{layer}."
    return tuple(prefix + hf for hf in _rule(name).hf)


def expected_megatron_names(
    arch: Architecture,
    layers: Iterable[int],
    *,
    first_stage: bool,
    last_stage: bool,
    experts: Iterable[int] | None = None,
) -> set[str]:
    """The canonical names of the parameters of a rank that holds the global `layers`, and of these the global `experts`
    (None: all).

    A tied model whose last stage is not its first holds its own copy of the embedding there, as output_layer.weight.
    """
    absent = set() if arch.qkv_bias else {"self_attention.linear_qkv.bias"}
    if not arch.qk_layernorm:
        absent |= {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"}
    of_layer: set[str] = set()
    if arch.num_moe_experts:
        absent |= {"mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
        numbers = range(arch.num_moe_experts) if experts is None else experts
        of_layer |= {f"mlp.experts.{expert}.{name}" for expert in numbers for name in EXPERT_RULES}
    else:
        absent.add("mlp.router.weight")
    of_layer |= LAYER_RULES.keys() - absent
    names = {f"decoder.layers.{layer}.{name}" for layer in layers for name in of_layer}
    if first_stage:
        names.add(EMBEDDING)
    if last_stage:
        names.add(FINAL_NORM)
        if not (arch.tied and first_stage):
            names.add(OUTPUT)
    return names


def shard_shape(name: str, arch: Architecture, *, tp_size: int, padded_vocab: int) -> tuple[int, ...]:
    """The shape of one tensor-parallel rank's part of the Megatron parameter `name`."""
    partition, hidden, dim = partition_of(name), arch.hidden_size, arch.kv_channels
    ffn = arch.ffn_hidden_size if expert_of(name) is None else arch.moe_ffn_hidden_size or 0
    if partition == "vocab":
        return (padded_vocab // tp_size, hidden)
    if partition == "gate_up":
        return (2 * ffn // tp_size, hidden)
    if partition == "qkv":
        rows = (arch.num_attention_heads + 2 * arch.num_query_groups) * dim // tp_size
        return (rows,) if name.endswith(".bias") else (rows, hidden)
    if partition == "row":
        inputs = ffn if "linear_fc2" in name else arch.num_attention_heads * dim
        return (hidden, inputs // tp_size)
    if name.endswith("router.weight"):
        return (arch.num_moe_experts or 0, hidden)
    return (dim,) if name.endswith(("q_layernorm.weight", "k_layernorm.weight")) else (hidden,)


def shard_from_hf(
    name: str, arch: Architecture, weights: WeightSource, *, tp_rank: int, tp_size: int, padded_vocab: int
) -> Tensor:
    """This rank's part of the Megatron parameter `name`, reading no more than that part, in the file's dtype.

    May lie in the file's memory mapping: copy before writing to it. The layout must have passed `check_layout`.
    """
    partition, sources = partition_of(name), hf_names_of(name)
    if partition == "replicated":
        shard = weights.read(sources[0])
    elif partition == "vocab":
        shard = _vocab_rows(sources[0], arch, weights, tp_rank, padded_vocab // tp_size)
    elif partition == "row":
        num_columns = weights.shape(sources[0])[1] // tp_size
        shard = weights.read_columns(sources[0], tp_rank * num_columns, (tp_rank + 1) * num_columns)
    else:
        parts = []
        for source in sources:
            num_rows = weights.shape(source)[0] // tp_size
            parts.append(weights.read_rows(source, tp_rank * num_rows, (tp_rank + 1) * num_rows))
        shard = torch.cat(parts) if partition == "gate_up" else _fuse_qkv(parts, arch.num_query_groups // tp_size)
    wanted = shard_shape(name, arch, tp_size=tp_size, padded_vocab=padded_vocab)
    assert tuple(shard.shape) == wanted, f"{name}: shard {tuple(shard.shape)}, but the architecture makes {wanted}"
    return shard


def hf_from_shards(name: str, arch: Architecture, shards: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """The Hugging Face tensors in the Megatron parameter `name`, from its shards in tensor-parallel order.

    A replicated parameter needs only one shard, and is that shard. Vocabulary padding is cut off; a tied output layer
    yields nothing.
    """
    if arch.tied and name == OUTPUT:
        return []
    if partition_of(name) == "replicated":
        return [(hf_names_of(name)[0], shards[0])]
    found = []
    for index, (hf, shape) in enumerate(hf_shapes_of(name, arch, tuple(shards[0].shape), len(shards))):
        whole = shards[0].new_empty(shape)
        write_hf(name, arch, shards, index, whole)
        found.append((hf, whole))
    return found


def hf_shapes_of(
    name: str, arch: Architecture, shard: tuple[int, ...], num_shards: int
) -> list[tuple[str, tuple[int, ...]]]:
    """The Hugging Face tensors that `num_shards` shards of this shape make up, with their shapes."""
    partition, names = partition_of(name), hf_names_of(name)
    if partition == "qkv":
        shapes = [(arch.num_query_groups * width, *shard[1:]) for width in _qkv_widths(arch)]
    elif partition == "gate_up":
        shapes = [(shard[0] // 2 * num_shards, *shard[1:])] * 2
    elif partition == "row":
        shapes = [(shard[0], shard[1] * num_shards)]
    elif partition == "vocab":
        assert shard[0] * num_shards >= arch.vocab_size, (name, shard, num_shards, arch.vocab_size)
        shapes = [(arch.vocab_size, *shard[1:])]
    else:
        shapes = [shard]
    return list(zip(names, shapes, strict=True))


def hf_parts(name: str, arch: Architecture, shards: Sequence[Tensor], index: int) -> tuple[list[Tensor], int]:
    """(parts, dim): what the `index`-th of the Hugging Face tensors in the Megatron parameter `name` is made of, views
    of the shards that follow one another along `dim`. Parts along dimension 0 may have it cut in two."""
    partition = partition_of(name)
    assert len({tuple(shard.shape) for shard in shards}) == 1, f"{name}: {[tuple(s.shape) for s in shards]}"
    if partition == "replicated":
        return [shards[0]], 0
    if partition == "row":
        return list(shards), 0 if len(shards) == 1 else 1
    if partition == "gate_up":
        return [shard.chunk(2)[index] for shard in shards], 0
    if partition == "vocab":
        starts = range(0, arch.vocab_size, shards[0].size(0))  # a shard after the last token is padding alone
        return [shard[: arch.vocab_size - start] for start, shard in zip(starts, shards)], 0
    widths = _qkv_widths(arch)
    return [shard.unflatten(0, (-1, sum(widths))).split(widths, dim=1)[index] for shard in shards], 0


def write_hf(name: str, arch: Architecture, shards: Sequence[Tensor], index: int, out: Tensor) -> None:
    """Write the `index`-th of the Hugging Face tensors in the Megatron parameter `name` to `out`, contiguous and of its
    shape."""
    parts, dim = hf_parts(name, arch, shards, index)
    whole = out if dim else out.view(-1)
    sizes = [part.size(dim) if dim else part.numel() for part in parts]
    for part, place in zip(parts, whole.split(sizes, dim=dim), strict=True):
        place.view(part.shape).copy_(part) if dim == 0 else place.copy_(part)


def checked_stream(arch: Architecture, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Pass on an export's tensors, raising ValueError at one that is unknown, twice there or of a wrong shape or dtype
    (all share the first one's), and after the last if any is missing."""
    wanted, dtype = hf_shapes(arch), None
    seen: set[str] = set()
    for name, tensor in tensors:
        dtype = dtype or tensor.dtype
        if name not in wanted:
            raise ValueError(f"{name} is exported, but the {arch.family} model has no such tensor")
        if name in seen:
            raise ValueError(f"{name} is exported twice")
        if tuple(tensor.shape) != wanted[name] or tensor.dtype != dtype:
            found = f"{list(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{name} is exported as {found}, but must be {list(wanted[name])} {dtype}")
        seen.add(name)
        yield name, tensor
    missing = [name for name in wanted if name not in seen]
    if missing:
        raise ValueError(f"{len(missing)} of {len(wanted)} tensors were not exported, the first is {missing[0]}")


def _split_layer(name: str) -> tuple[int | None, str]:
    """decoder.layers.3.mlp.linear_fc1.weight -> (3, "mlp.linear_fc1.weight"); any other name -> (None, name)."""
    prefix = "decoder.layers."
    number, _, rest = name.removeprefix(prefix).partition(".")
    return (int(number), rest) if name.startswith(prefix) and number.isdecimal() else (None, name)


def _rule(name: str) -> Rule:
    layer, rest = _split_layer(name)
    rules = TOP_RULES if layer is None else LAYER_RULES
    rest = rest if layer is None else LAYER_ALIASES.get(rest, rest)
    if layer is not None and (expert := _EXPERT.fullmatch(rest)):
        rule = EXPERT_RULES[expert[2]]
        return Rule(rule.partition, tuple(f"mlp.experts.{expert[1]}.{hf}" for hf in rule.hf))
    if rest not in rules:
        raise ValueError(f"no rule for the Megatron parameter {name}; known here: {sorted(rules)}")
    return rules[rest]


def _vocab_rows(source: str, arch: Architecture, weights: WeightSource, tp_rank: int, num_rows: int) -> Tensor:
    """[num_rows, hidden]: rows tp_rank * num_rows and on, zeros after the last token."""
    source = "model.embed_tokens.weight" if arch.tied else source
    start = tp_rank * num_rows
    stop = min(start + num_rows, arch.vocab_size)
    if start >= arch.vocab_size:
        return torch.zeros(num_rows, arch.hidden_size, dtype=weights.dtype(source))
    rows = weights.read_rows(source, start, stop)
    return torch.nn.functional.pad(rows, (0, 0, 0, num_rows - (stop - start)))


def _fuse_qkv(parts: Sequence[Tensor], num_groups: int) -> Tensor:
    """q [G * H/G * d, ...], k and v [G * d, ...] -> [G * (H/G + 2) * d, ...]."""
    grouped = [part.view(num_groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _qkv_widths(arch: Architecture) -> list[int]:
    """Rows of q, k and v in one query group."""
    dim = arch.kv_channels
    return [arch.num_attention_heads // arch.num_query_groups * dim, dim, dim]
