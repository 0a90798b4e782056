"""A checksum of a buffer that costs little beside copying it, the same on the CPU and on a GPU.

The buffer is seen as rows of 1024 64-bit words. What is hashed is the sum of every row and of every column, modulo
2**64. Whatever changes one word, or any number of words of one row or of one column, or swaps two words, changes a sum;
what goes unseen is a rectangle of four changes that cancel both ways. It finds damage, not forgery.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROW_WORDS = 1024  # a row and the column sums, 8 KiB each, stay in a core's first cache
_WORD_BYTES = 8
_AT_ONCE_BYTES = 256 << 10  # still in a core's cache when it is read again
_LEAST_COMPILED_BYTES = 1 << 20  # a process that sees nothing larger need not wait for a compiler


def checksum(flat: Tensor, label: bytes) -> int:
    """The checksum, 0 <= it < 2**63, of `flat` [a multiple of 8] uint8 together with `label`, what the bytes are."""
    return RunningChecksum(flat).finish(label)


class RunningChecksum:
    """`checksum`, made along the way: each byte of `flat` is read while it is written, soon after, or shortly before it
    is used. Of a small buffer, and on a GPU, all are read at the end."""

    def __init__(self, flat: Tensor) -> None:
        assert flat.dtype == torch.uint8, flat.dtype
        assert flat.numel() % _WORD_BYTES == 0, flat.shape
        self._words = flat.view(torch.int64)
        self._num_seen = 0  # words
        self._rows = torch.zeros(-(-self._words.numel() // ROW_WORDS), dtype=torch.int64, device=flat.device)
        self._columns = torch.zeros(ROW_WORDS, dtype=torch.int64, device=flat.device)
        self._is_compiled = is_compiled(flat)

    def advance(self, end: int, *, lag: int = _AT_ONCE_BYTES) -> None:
        """The bytes before `end` do not change any more: take them in, unless they are fewer than `lag`."""
        if self._is_compiled and end - self._num_seen * _WORD_BYTES >= lag:
            self._take(end // _WORD_BYTES)

    def advance_past(self, end: int) -> None:
        """Take in at least what lies before byte `end`."""
        if end > self._num_seen * _WORD_BYTES:
            self.advance(min(end + _AT_ONCE_BYTES, self._words.numel() * _WORD_BYTES), lag=1)

    def copy(self, source: Tensor, start: int) -> None:
        """Copy `source` to the bytes from `start`; those before it do not change any more."""
        size = source.nbytes
        if self._is_compiled and size >= _AT_ONCE_BYTES and start % _WORD_BYTES == 0 and _is_words(source):
            self.advance(start, lag=1)
            self._take((start + size) // _WORD_BYTES, source)
        else:
            target = self._words.view(torch.uint8)[start : start + size]
            target.view(source.dtype).view(source.shape).copy_(source)

    def finish(self, label: bytes) -> int:
        """Take in the rest."""
        if self._is_compiled:
            self.advance(self._words.numel() * _WORD_BYTES, lag=1)
        else:
            _add_whole(self._words, self._rows, self._columns)
        digest = hashlib.blake2b(digest_size=_WORD_BYTES)
        digest.update(f"{self._words.numel()} {len(label)} ".encode() + label)
        for sums in (self._columns, self._rows):
            digest.update(sums.cpu().numpy().data)
        return int.from_bytes(digest.digest(), "big") >> 1

    def _take(self, end: int, source: Tensor | None = None) -> None:
        """Add the words before the `end`-th to their sums, after copying them from `source` if there is one."""
        words, rows, columns = (tensor.numpy() for tensor in (self._words, self._rows, self._columns))
        given = None if source is None else _as_words(source).numpy()
        compile_loop()(given, words, self._num_seen, end, rows, columns)
        self._num_seen = end


def is_compiled(flat: Tensor) -> bool:
    """Whether the checksum of `flat` [S] uint8 is made by the compiled loop."""
    return flat.device.type == "cpu" and flat.numel() >= _LEAST_COMPILED_BYTES


def _is_words(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return False
    return tensor.nbytes % _WORD_BYTES == 0 and tensor.data_ptr() % _WORD_BYTES == 0


def _as_words(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.int64)


def _add_whole(words: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Add `words` [n] to the sums of their rows [ceil(n / ROW_WORDS)] and columns [ROW_WORDS]; all int64."""
    whole = words.numel() // ROW_WORDS
    block = words[: whole * ROW_WORDS].view(whole, ROW_WORDS)
    rest = words[whole * ROW_WORDS :]
    rows[:whole] += block.sum(1)
    columns += block.sum(0)
    if rest.numel():
        rows[whole] += rest.sum()
        columns[: rest.numel()] += rest


@functools.cache
def compile_loop() -> Callable[..., None]:
    """The loop below as machine code, with and without a source, compiled once per process on first use (numba, half a
    second)."""
    from numba import njit

    sums = "i8[::1], i8, i8, i8[::1], i8[::1]"
    compiled: Callable[..., None] = njit([f"(none, {sums})", f"(i8[::1], {sums})"], nogil=True)(_add)
    return compiled


def _add(source: Any, words: Any, start: int, end: int, rows: Any, columns: Any) -> None:
    """As `_add_whole`, of the words from `start` to `end`, after copying them from `source` [end - start] where that is
    not None; numpy, int64."""
    at = start
    while at < end:
        row, column = at // ROW_WORDS, at % ROW_WORDS
        part = words[at : min(at - column + ROW_WORDS, end)]
        given = part if source is None else source[at - start : at - start + part.size]
        sums = columns[column : column + part.size]
        total = 0
        for i in range(part.size):
            word = given[i]
            if source is not None:
                part[i] = word
            sums[i] += word
            total += word
        rows[row] += total
        at += part.size
