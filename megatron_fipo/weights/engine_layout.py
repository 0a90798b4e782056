"""What an engine must answer when asked for the checksums of its weights: SGLang's parameters, foretold from ours.

SGLang 0.5.23 joins q, k and v, joins gate and up, stacks a layer's experts, pads the vocabulary to a multiple of 64,
and cuts all of these over its tensor-parallel ranks. On a CPU it pads heads and FFN channels too, with zeros. Its
weights_checker hashes each parameter's bytes, on a CPU with SHA-256 and on a GPU with a kernel of its own; both are
made here piece by piece, as the tensors pass.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_fipo.weights import fp8
from megatron_fipo.weights.architecture import Architecture, hf_shapes
from megatron_fipo.weights.bucket import WeightBucket
from megatron_fipo.weights.gpu_hash import GpuHash

Axis = Literal["vocabulary", "heads", "kv_heads", "channels", "expert channels"]

_VOCAB_PADDING = 64
_CPU_CHANNEL_PADDING = 32  # of each rank's share
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
    With `fp8` the quantised parameters are left out: SGLang hashes what its kernels make of them. Raises ValueError
    when a tensor is missing, unknown or there twice.
    """
    return expected_of_tensors(
        arch,
        (pair for bucket in buckets for pair in bucket.tensors()),
        tp_size=tp_size,
        fp8=fp8,
        device_type=device_type,
    )


def expected_of_tensors(
    arch: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    tp_size: int,
    fp8: bool = False,
    device_type: Literal["cpu", "cuda"] = "cpu",
) -> list[dict[str, str]]:
    """`expected_checksums` of (Hugging Face name, tensor)."""
    ranks = [_RankSums(arch, rank, tp_size, device_type, fp8) for rank in range(tp_size)]
    for name, tensor in tensors:
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


def engine_slice(
    tensor: Tensor, cut: tuple[Axis, int] | None, arch: Architecture, tp_rank: int, tp_size: int, *, is_cpu: bool
) -> Tensor:
    """What one of the engine's ranks holds of a Hugging Face tensor: its share of the padded whole."""
    if cut is None:
        return tensor
    axis, dim = cut
    if axis == "kv_heads" and not is_cpu and tp_size > arch.num_query_groups:  # ranks that share a head
        return tensor.chunk(arch.num_query_groups)[tp_rank * arch.num_query_groups // tp_size]
    size = _padded_size(axis, tensor.size(dim), arch, tp_size, is_cpu) // tp_size
    num_own = (
        tensor.size(dim) // tp_size if axis == "expert channels" else size
    )  # experts are cut before they are padded
    start = min(tp_rank * num_own, tensor.size(dim))
    share = tensor.narrow(dim, start, min(num_own, tensor.size(dim) - start))
    missing = size - share.size(dim)
    return torch.nn.functional.pad(share, (0, 0) * (tensor.dim() - 1 - dim) + (0, missing)) if missing else share


def _padded_size(axis: Axis, size: int, arch: Architecture, tp_size: int, is_cpu: bool) -> int:
    """The length of a dimension in the engine, over all of its ranks."""
    if axis == "vocabulary":
        by_64 = _rounded_up(size, _VOCAB_PADDING)
        return by_64 if by_64 % tp_size == 0 else _rounded_up(size, _VOCAB_PADDING * tp_size)
    if axis in ("channels", "expert channels"):
        return _rounded_up(size, _CPU_CHANNEL_PADDING * tp_size) if is_cpu else size
    num_groups = _rounded_up(arch.num_query_groups, tp_size) if is_cpu else arch.num_query_groups
    return size // arch.num_query_groups * num_groups


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class _RankSums:
    """One engine rank's checksums in the making. Parts that come before their turn are kept until it comes."""

    def __init__(self, arch: Architecture, rank: int, tp_size: int, device_type: str, is_fp8: bool) -> None:
        self._arch = arch
        self._rank = rank
        self._tp_size = tp_size
        self._device_type = device_type
        self._is_fp8 = is_fp8
        self._left: dict[str, set[int]] = {}  # parameter -> places of the parts that have not come
        for name in _foretold_names(arch, is_fp8):
            part = part_of(name)
            self._left.setdefault(part.parameter, set()).add(part.place)
        self._next = dict.fromkeys(self._left, 0)
        self._early: dict[str, dict[int, Tensor]] = {}
        self._hashes: dict[str, _Hash] = {}

    def take(self, name: str, tensor: Tensor) -> None:
        if self._is_fp8 and (fp8.is_quantised(name) or name.endswith("_scale_inv")):
            return
        part = part_of(name)
        if part.place not in self._left.get(part.parameter, ()):
            raise ValueError(f"{name} was sent, but the engine has no such weight, or was sent it before")
        self._left[part.parameter].remove(part.place)
        is_cpu = self._device_type == "cpu"
        piece = engine_slice(tensor, part.cut, self._arch, self._rank, self._tp_size, is_cpu=is_cpu)
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
            self._hashes[parameter] = GpuHash() if self._device_type == "cuda" else _CpuHash()
        return self._hashes[parameter]


class _CpuHash:
    """SGLang's tensor_hash on a CPU: the first 8 bytes of SHA-256."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, part: Tensor) -> None:
        self._hash.update(part.contiguous().flatten().view(torch.uint8).cpu().numpy().data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()[:16]


def _foretold_names(arch: Architecture, is_fp8: bool) -> Iterator[str]:
    return (name for name in hf_shapes(arch) if not (is_fp8 and fp8.is_quantised(name)))
