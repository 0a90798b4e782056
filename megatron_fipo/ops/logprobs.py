"""Log-probabilities and entropy from vocabulary-parallel logits, and the row functions that make them.

Rows are worked off in tiles small enough for a core's cache, so that no second array of the logits' size is needed but
the gradient. Without the logits as a whole: linear_logprobs.py, which is made of the same row functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_NUMEL = {"cpu": 2**16, "cuda": 2**24}  # elements of a tile: a core's cache; enough work for a kernel


def vocab_parallel_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[labels] and the entropy of softmax(logits / temperature), both [N].

    logits [N, V_local] is this rank's slice of the vocabulary, in rank order over `group` (the tensor-parallel axis;
    one all-reduce of [N] and one of [3, N]); None: the whole vocabulary. Columns from `vocab_size` on are padding and
    take no part. labels [N] int64 are global token ids. Computed in fp32, in float64 for float64 logits. The log-probs
    are differentiable, the entropy is not; the logits are kept for the backward pass and never written to.
    Raises ValueError on shapes that do not fit, labels outside the vocabulary and a temperature that is not positive.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits must be [N, V] and labels [N], but are {list(logits.shape)} and {list(labels.shape)}")
    require_temperature(temperature)
    return _VocabParallelLogprobs.apply(logits, labels, vocab_size, group, temperature)


class LocalColumns(NamedTuple):
    """Which columns of its slice a rank counts, and where each label lies in them."""

    num_valid: int  # columns before the padding, at the slice's start
    index: Tensor  # [N] int64, the label's column; 0 where it is another rank's
    is_local: Tensor  # [N] bool


class RowSums(NamedTuple):
    """What is known of each row, in fp32 or float64: s = (x - peak) / temperature for its logits x."""

    peak: Tensor  # [N], the largest x
    total: Tensor  # [N], sum of exp(s)
    weighted: Tensor  # [N], sum of exp(s) s
    target: Tensor  # [N], s of the label; 0 where it is another rank's

    @classmethod
    def empty(cls, num_rows: int, like: Tensor) -> RowSums:
        """Uninitialised sums for rows of logits like these."""
        return cls(*like.new_empty(4, num_rows, dtype=_compute_dtype(like)))

    def rows(self, rows: slice) -> RowSums:
        """A view of some rows."""
        return RowSums(*(x[rows] for x in self))

    def logprobs(self) -> Tensor:
        """[N], once the sums are over the whole vocabulary."""
        return self.target - self.total.log()

    def entropy(self) -> Tensor:
        """[N], once the sums are over the whole vocabulary: -sum p log p with log p = s - log total."""
        return self.total.log() - self.weighted / self.total


def local_columns(
    labels: Tensor, *, num_columns: int, vocab_size: int, group: dist.ProcessGroup | None
) -> LocalColumns:
    """Place labels [N] in this rank's slice of `num_columns` columns.

    Raises ValueError for labels outside the vocabulary, and for a vocabulary that the ranks' columns do not hold.
    """
    rank, num_ranks = (0, 1) if group is None else (group.rank(), group.size())
    if not 1 <= vocab_size <= num_columns * num_ranks:
        raise ValueError(f"vocab_size is {vocab_size}, but must be from 1 to the {num_columns * num_ranks} columns")
    if labels.numel() > 0:  # a label that no rank has would pass for the likeliest token
        lowest, highest = torch.stack(labels.aminmax()).tolist()
        if lowest < 0 or highest >= vocab_size:
            raise ValueError(f"labels go from {lowest} to {highest}, but must be in [0, {vocab_size})")
    first = num_columns * rank
    num_valid = max(0, min(num_columns, vocab_size - first))
    is_local = (labels >= first) & (labels < first + num_valid)
    return LocalColumns(num_valid, torch.where(is_local, labels - first, 0), is_local)


def sum_rows(logits: Tensor, index: Tensor, is_local: Tensor, temperature: float, out: RowSums) -> None:
    """Fill `out` from this rank's logits [n, num_valid] alone; the logits are left as they are."""
    if logits.size(1) == 0:  # nothing but padding on this rank: a sum of nothing
        out.peak.fill_(-torch.inf)
        for sums in (out.total, out.weighted, out.target):
            sums.zero_()
        return
    shifted, powers = (torch.empty(0) for _ in range(2))
    for rows in row_tiles(logits):
        x = logits[rows]
        if len(shifted) != len(x):  # the first tile and the last
            shifted, powers = logits.new_empty(2, *x.shape, dtype=_compute_dtype(logits))
        out.peak[rows] = x.amax(dim=1)
        torch.sub(x, out.peak[rows, None], out=shifted)
        if temperature != 1.0:
            shifted /= temperature
        torch.exp(shifted, out=powers)
        out.target[rows] = shifted.gather(1, index[rows, None])[:, 0]
        torch.sum(powers, dim=1, out=out.total[rows])
        torch.sum(powers.mul_(shifted), dim=1, out=out.weighted[rows])
    out.target.masked_fill_(~is_local, 0.0)


def sum_over_ranks(sums: RowSums, is_local: Tensor, temperature: float, group: dist.ProcessGroup | None) -> RowSums:
    """Sums over this rank's columns to sums over the vocabulary: an all-reduce of [N] and one of [3, N] over `group`.

    A sum relative to a rank's own peak moves to the common one: with s' = s + m, exp(s') = exp(m) exp(s).
    """
    if group is None or group.size() == 1:
        return sums
    peak = sums.peak.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    move = (sums.peak - peak) / temperature  # <= 0; -inf on a rank without columns
    scale = move.exp()
    moved = torch.stack(
        [
            sums.total * scale,
            torch.where(scale == 0, 0, (sums.weighted + move * sums.total) * scale),  # no -inf * 0
            torch.where(is_local, sums.target + move, 0),
        ]
    )
    dist.all_reduce(moved, group=group)
    return RowSums(peak, *moved)


def logits_gradient(
    logits: Tensor,
    index: Tensor,
    is_local: Tensor,
    sums: RowSums,
    grad_logprobs: Tensor,
    temperature: float,
    out: Tensor,
) -> None:
    """d(logprobs * grad_logprobs) / d logits = grad_logprobs / temperature * (onehot(label) - softmax), into `out`.

    logits, out [n, num_valid], which may be one and the same; `sums` [n] over the whole vocabulary; grad_logprobs [n].
    """
    if logits.size(1) == 0:
        return
    grad = grad_logprobs.to(sums.total.dtype) / temperature
    on_softmax = -grad / sums.total
    on_label = torch.where(is_local, grad, 0)[:, None]
    scratch = torch.empty(0)
    for rows in row_tiles(logits):
        x, tile = logits[rows], out[rows]
        if tile.dtype != grad.dtype:  # bf16 logits: fp32 in between, rounded once
            if len(scratch) != len(x):
                scratch = torch.empty_like(x, dtype=grad.dtype)
            tile = scratch
        torch.sub(x, sums.peak[rows, None], out=tile)
        if temperature != 1.0:
            tile /= temperature
        tile.exp_().mul_(on_softmax[rows, None]).scatter_add_(1, index[rows, None], on_label[rows])
        if tile is scratch:
            out[rows] = tile


def row_tiles(x: Tensor) -> Iterator[slice]:
    """The rows of x [n, m] in stretches of about `TILE_NUMEL` elements."""
    num_rows, num_columns = x.shape
    step = max(1, TILE_NUMEL.get(x.device.type, TILE_NUMEL["cuda"]) // num_columns)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def require_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is a positive number."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature!r}, but must be a number > 0")


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, group: dist.ProcessGroup | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        columns = local_columns(labels, num_columns=logits.size(1), vocab_size=vocab_size, group=group)
        local_sums = RowSums.empty(logits.size(0), logits)
        sum_rows(logits[:, : columns.num_valid], columns.index, columns.is_local, temperature, local_sums)
        sums = sum_over_ranks(local_sums, columns.is_local, temperature, group)
        ctx.save_for_backward(logits, columns.index, columns.is_local, *sums)
        ctx.num_valid, ctx.temperature = columns.num_valid, temperature
        entropy = sums.entropy()
        ctx.mark_non_differentiable(entropy)
        return sums.logprobs(), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, index, is_local, *sums = ctx.saved_tensors
        grad = torch.empty_like(logits)
        valid = slice(ctx.num_valid)
        logits_gradient(
            logits[:, valid], index, is_local, RowSums(*sums), grad_logprobs, ctx.temperature, grad[:, valid]
        )
        grad[:, ctx.num_valid :] = 0
        return grad, None, None, None, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """fp32 at least: a sum of 150k exponentials in bf16 has three digits."""
    return torch.promote_types(x.dtype, torch.float32)
