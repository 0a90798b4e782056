"""A checksum of a buffer that costs about as much as reading it once, the same on the CPU and on a GPU.

The buffer is seen as rows of 8192 64-bit words. What is hashed is the sum of every row and of every column, modulo
2**64. Whatever changes one word, or any number of words of one row or of one column, or swaps two words, changes a sum;
what goes unseen is a rectangle of four changes that cancel both ways. It finds damage, not forgery.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

ROW_WORDS = 8192  # a row and the column sums, 64 KiB each, stay in a core's cache
_WORD_BYTES = 8
_ROWS_AT_ONCE = {"cpu": 16, "cuda": 1024}  # the CPU reads a block twice, the second time out of its cache


def checksum(flat: Tensor, label: bytes) -> int:
    """The checksum, 0 <= it < 2**63, of `flat` [a multiple of 8] uint8 together with `label`, what the bytes are."""
    running = RunningChecksum(flat)
    return running.finish(label)


class RunningChecksum:
    """`checksum`, made along the way: each byte of `flat` is read soon after it was written, or before it is used."""

    def __init__(self, flat: Tensor) -> None:
        assert flat.dtype == torch.uint8, flat.dtype
        assert flat.numel() % _WORD_BYTES == 0, flat.shape
        self._words = flat.view(torch.int64)
        self._num_seen = 0  # words
        self._block_words = _ROWS_AT_ONCE.get(flat.device.type, 16) * ROW_WORDS
        self._columns = torch.zeros(ROW_WORDS, dtype=torch.int64, device=flat.device)
        self._rows: list[Tensor] = []

    def advance(self, end: int) -> None:
        """Take in the blocks that lie wholly before byte `end`; the bytes there do not change any more."""
        end = min(end // _WORD_BYTES, self._words.numel())
        while self._num_seen + self._block_words <= end:
            self._add(self._words[self._num_seen : self._num_seen + self._block_words].view(-1, ROW_WORDS))
            self._num_seen += self._block_words

    def advance_past(self, end: int) -> None:
        """Take in at least everything before byte `end`, unless that is in the last, incomplete block."""
        self.advance(end + self._block_words * _WORD_BYTES - 1)

    def finish(self, label: bytes) -> int:
        """Take in the rest."""
        self.advance(self._words.numel() * _WORD_BYTES)
        rest = self._words[self._num_seen :]
        whole = rest.numel() // ROW_WORDS * ROW_WORDS
        if whole:
            self._add(rest[:whole].view(-1, ROW_WORDS))
        if whole < rest.numel():
            self._add(torch.nn.functional.pad(rest[whole:], (0, ROW_WORDS - (rest.numel() - whole)))[None])
        digest = hashlib.blake2b(digest_size=_WORD_BYTES)
        digest.update(f"{self._words.numel()} {len(label)} ".encode() + label)
        for sums in (self._columns, *([torch.cat(self._rows)] if self._rows else [])):
            digest.update(sums.cpu().numpy().data)
        return int.from_bytes(digest.digest(), "big") >> 1

    def _add(self, block: Tensor) -> None:
        """`block` [rows, ROW_WORDS] int64; sums wrap around."""
        self._rows.append(block.sum(1))
        self._columns += block.sum(0)
