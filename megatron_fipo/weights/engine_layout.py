"""What an engine must answer when asked for the checksums of its weights: SGLang's parameters, foretold from ours.

SGLang 0.5.23 joins q, k and v, joins gate and up, stacks a layer's experts, pads the vocabulary to a multiple of 64,
and cuts all of these over its tensor-parallel ranks. On a CPU it pads the FFN's channels too, with zeros. Its
weights_checker hashes each parameter's bytes, on a CPU with SHA-256 and on a GPU with a kernel of its own; both are
made here piece by piece, as the tensors pass.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_fipo.weights.architecture import Architecture, hf_shapes
from megatron_fipo.weights.bucket import WeightBucket
from megatron_fipo.weights.fp8 import BLOCK, dequantised
from megatron_fipo.weights.gpu_hash import GpuHash

Axis = Literal["vocabulary", "heads", "kv_heads", "channels", "expert channels"]

_VOCAB_PADDING = 64
_CPU_CHANNEL_PADDING = 32  # of each rank's share; in FP8 a block
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_FUSED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)} | {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
_CUTS: dict[str, tuple[Axis, int]] = {
    "embed_tokens": ("vocabulary", 0),
    "lm_head": ("vocabulary", 0),
    "q_proj": ("heads", 0),
    "k_proj": ("kv_heads", 0),
    "v_proj": ("kv_heads", 0),
    "o_proj": ("heads", 1),
    "gate_proj": ("channels", 0),
    "up_proj": ("channels", 0),
    "down_proj": ("channels", 1),
}
"""What the engine's ranks share out of a module's weight, along which dimension; of any other each has all."""


@dataclass(frozen=True)
class Part:
    """Where a Hugging Face tensor lies in the engine: the `place`-th part of `parameter`, and how it is cut."""

    parameter: str
    place: int
    cut: tuple[Axis, int] | None


class _Hash(Protocol):
    def update(self, part: Tensor) -> None: ...

    def hexdigest(self) -> str: ...


def expected_checksums(
    arch: Architecture,
    buckets: Iterable[WeightBucket],
    *,
    tp_size: int,
    fp8: bool = False,
    device_type: Literal["cpu", "cuda"] = "cpu",
) -> list[dict[str, str]]:
    """What Engine.aweight_checksums() must return after it was sent `buckets`: per tensor-parallel rank of the engine,
    parameter -> checksum.

    The buckets are consumed once, and none is kept: tensors that come in the order of export are hashed as they pass.
    FP8 weights (weights/fp8.py) are hashed as SGLang hashes them: multiplied by their scales, in bf16. Raises
    ValueError when a tensor is missing, unknown or there twice.
    """
    tensors = (pair for bucket in buckets for pair in bucket.tensors())
    return expected_of_tensors(arch, tensors, tp_size=tp_size, fp8=fp8, device_type=device_type)


def expected_of_tensors(
    arch: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    tp_size: int,
    fp8: bool = False,
    device_type: Literal["cpu", "cuda"] = "cpu",
) -> list[dict[str, str]]:
    """`expected_checksums` of (Hugging Face name, tensor)."""
    padding = _Padding(arch.num_query_groups, tp_size, is_cpu=device_type == "cpu", is_fp8=fp8)
    ranks = [_RankSums(arch, rank, padding) for rank in range(tp_size)]
    for name, tensor in dequantised(tensors):
        for rank in ranks:
            rank.take(name, tensor)
    return [rank.finish() for rank in ranks]


def part_of(name: str) -> Part:
    """The engine's parameter that the Hugging Face tensor `name` goes into."""
    if found := _EXPERT.fullmatch(name):
        prefix, expert, which = found[1], int(found[2]), found[3]
        if which == "down":
            return Part(f"{prefix}.w2_weight", expert, ("expert channels", 1))
        return Part(f"{prefix}.w13_weight", 2 * expert + (which == "up"), ("expert channels", 0))
    path, _, last = name.rpartition(".")
    module = path.rpartition(".")[2]
    cut = _CUTS.get(module)
    if module in _FUSED:
        fused, place = _FUSED[module]
        return Part(f"{path.removesuffix(module)}{fused}.{last}", place, cut)
    return Part(name, 0, cut)


@dataclass(frozen=True)
class _Padding:
    """What SGLang pads dimensions by before it cuts them."""

    num_query_groups: int
    tp_size: int
    is_cpu: bool
    is_fp8: bool

    def padded(self, axis: Axis, size: int) -> int:
        """The length of a dimension in the engine, over all of its ranks."""
        if axis == "vocabulary":
            padded = _rounded_up(size, _VOCAB_PADDING)
            return padded if padded % self.tp_size == 0 else _rounded_up(size, _VOCAB_PADDING * self.tp_size)
        if self.is_cpu and axis in ("channels", "expert channels"):
            return _rounded_up(size, (BLOCK if self.is_fp8 else _CPU_CHANNEL_PADDING) * self.tp_size)
        return size


def engine_slice(tensor: Tensor, cut: tuple[Axis, int] | None, tp_rank: int, padding: _Padding) -> Tensor:
    """What one of the engine's ranks holds of a Hugging Face tensor: its share of the padded whole."""
    if cut is None:
        return tensor
    (axis, dim), tp_size = cut, padding.tp_size
    if axis == "kv_heads" and tp_size > padding.num_query_groups:  # ranks that share a head
        return tensor.chunk(padding.num_query_groups)[tp_rank * padding.num_query_groups // tp_size]
    size = padding.padded(axis, tensor.size(dim)) // tp_size
    num_own = (
        tensor.size(dim) // tp_size if axis == "expert channels" else size
    )  # experts are cut before they are padded
    start = min(tp_rank * num_own, tensor.size(dim))
    share = tensor.narrow(dim, start, min(num_own, tensor.size(dim) - start))
    missing = size - share.size(dim)
    return torch.nn.functional.pad(share, (0, 0) * (tensor.dim() - 1 - dim) + (0, missing)) if missing else share


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class _RankSums:
    """One engine rank's checksums in the making. Parts that come before their turn are kept until it comes."""

    def __init__(self, arch: Architecture, rank: int, padding: _Padding) -> None:
        self._rank = rank
        self._padding = padding
        self._left: dict[str, set[int]] = {}  # parameter -> places of the parts that have not come
        for name in hf_shapes(arch):
            part = part_of(name)
            self._left.setdefault(part.parameter, set()).add(part.place)
        self._next = dict.fromkeys(self._left, 0)
        self._early: dict[str, dict[int, Tensor]] = {}
        self._hashes: dict[str, _Hash] = {}

    def take(self, name: str, tensor: Tensor) -> None:
        part = part_of(name)
        if part.place not in self._left.get(part.parameter, ()):
            raise ValueError(f"{name} was sent, but the engine has no such weight, or was sent it before")
        self._left[part.parameter].remove(part.place)
        piece = engine_slice(tensor, part.cut, self._rank, self._padding)
        early = self._early.setdefault(part.parameter, {})
        early[part.place] = piece if part.place == self._next[part.parameter] else piece.clone()
        while (place := self._next[part.parameter]) in early:
            self._hash_of(part.parameter).update(early.pop(place))
            self._next[part.parameter] += 1

    def finish(self) -> dict[str, str]:
        missing = [name for name, places in self._left.items() if places]
        if missing:
            raise ValueError(f"{len(missing)} of the engine's {len(self._left)} weights were not sent: {missing[0]} ..")
        return {name: self._hashes[name].hexdigest() for name in self._left}

    def _hash_of(self, parameter: str) -> _Hash:
        if parameter not in self._hashes:
            self._hashes[parameter] = _CpuHash() if self._padding.is_cpu else GpuHash()
        return self._hashes[parameter]


class _CpuHash:
    """SGLang's tensor_hash on a CPU: the first 8 bytes of SHA-256."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, part: Tensor) -> None:
        self._hash.update(part.contiguous().flatten().view(torch.uint8).cpu().numpy().data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()[:16]
