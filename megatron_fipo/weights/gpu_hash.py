"""SGLang's hash of a tensor on a GPU (sglang.kernels.ops.memory.gpu_tensor_hash), in tensor operations and in pieces.

The tensor is 32-bit words in tiles of 8192. Each word is mixed with its position, twice, and each tile's words are
summed modulo 2**32; a tile's two sums are mixed with the tensor's size and joined to 64 bits, the tiles are summed, and
the sum is mixed. "Mixed" is the finaliser of MurmurHash3, at the end that of SplitMix64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE_WORDS = 8192
_TILES_AT_ONCE = 512  # 32 MiB of intermediate results each
_WORD = 0xFFFFFFFF
_SEEDS = (0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & _WORD)
_POSITION_FACTORS = (0x27D4EB2D, 0x165667B1)
_ROTATIONS = (15, 13)


class GpuHash:
    """Feed it the tensor's parts in order with `update`."""

    def __init__(self) -> None:
        self._rest: Tensor | None = None  # [< one tile] uint8
        self._num_words = 0
        self._sums: list[Tensor] = []  # each [2, tiles] int64, on the tensor's device

    def update(self, part: Tensor) -> None:
        flat = part.contiguous().flatten().view(torch.uint8)
        flat = flat if self._rest is None else torch.cat([self._rest, flat])
        whole = flat.numel() // (4 * _TILE_WORDS) * 4 * _TILE_WORDS
        self._add(flat[:whole])
        self._rest = flat[whole:].clone()

    def hexdigest(self) -> str:
        """16 hexadecimal digits."""
        if self._rest is not None and self._rest.numel():
            self._add(torch.nn.functional.pad(self._rest, (0, -self._rest.numel() % 4)))
            self._rest = None
        total = 0
        for sums in self._sums:
            first, second = (_mix32(sums ^ (4 * self._num_words & _WORD))).tolist()
            total += sum((high << 32) | low for high, low in zip(first, second, strict=True))
        return f"{_mix64(total):016x}"

    def _add(self, flat: Tensor) -> None:
        """`flat` [a multiple of 4] uint8; only the tensor's last part may end within a tile."""
        for piece in flat.split(4 * _TILE_WORDS * _TILES_AT_ONCE):
            words = piece.view(torch.int32).long() & _WORD
            if not words.numel():
                continue
            places = torch.arange(self._num_words, self._num_words + words.numel(), device=words.device) & _WORD
            self._num_words += words.numel()
            self._sums.append(torch.stack([_tile_sums(words, places, which) for which in (0, 1)]))


def _tile_sums(words: Tensor, places: Tensor, which: int) -> Tensor:
    """[tiles] int64, below 2**32."""
    turn = _ROTATIONS[which]
    turned = ((places << turn) | (places >> (32 - turn))) & _WORD
    mixed = _mix32(words ^ ((_times(places, _POSITION_FACTORS[which]) + _SEEDS[which]) & _WORD) ^ turned)
    padded = torch.nn.functional.pad(mixed, (0, -mixed.numel() % _TILE_WORDS))
    return padded.view(-1, _TILE_WORDS).sum(1) & _WORD


def _times(words: Tensor, factor: int) -> Tensor:
    """words * factor modulo 2**32: int64 wraps around, and its low bits are right all the same."""
    return (words * factor) & _WORD


def _mix32(words: Tensor) -> Tensor:
    words = words ^ (words >> 16)
    words = _times(words, 0x85EBCA6B)
    words = words ^ (words >> 13)
    words = _times(words, 0xC2B2AE35)
    return words ^ (words >> 16)


def _mix64(word: int) -> int:
    mask = (1 << 64) - 1
    word &= mask
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    return word ^ (word >> 31)
