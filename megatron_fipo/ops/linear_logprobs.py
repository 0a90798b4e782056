"""Log-probabilities and entropy from hidden states and the vocabulary projection, without the logits as a whole.

Logits exist for `chunk_size` tokens at a time, in one buffer. Forward keeps four numbers per token; backward makes
each chunk's logits again and turns them into their gradient where they lie. The reference is
`vocab_parallel_logprobs(F.linear(hidden, weight), ...)`, whose row functions are used here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fipo.ops.logprobs import (
    LocalColumns,
    RowSums,
    local_columns,
    logits_gradient,
    require_temperature,
    row_tiles,
    sum_over_ranks,
    sum_rows,
)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature)[labels] and the entropy of that softmax, both [N].

    hidden [N, h]; weight [V_local, h] of the same dtype is this rank's slice of the vocabulary, in rank order over
    `group` (the tensor-parallel axis; one all-reduce of [N] and one of [3, N], whatever the number of chunks); None:
    the whole vocabulary. Rows of the weight from `vocab_size` on are padding and take no part. labels [N] int64 are
    global token ids. The matrix products are in the inputs' dtype, the rest in fp32, in float64 for float64.

    The log-probs are differentiable by hidden and weight, the entropy is not. The gradient by hidden is what this
    rank's columns contribute: the caller sums it over `group`, as after `F.linear`. The gradient by weight is summed
    over the chunks in fp32 and rounded to the weight's dtype once: in bf16, a sum of many chunks would stop growing.

    Memory beyond inputs and gradients: chunk_size x V_local elements of the inputs' dtype, and for bf16 weights the
    fp32 sum of their gradient when there are several chunks. The last chunk's logits stay from forward to backward, so
    that up to `chunk_size` tokens nothing is computed twice. With and without autograd the values are the same bits.
    Raises ValueError on shapes and dtypes that do not fit, labels outside the vocabulary, chunk_size < 1, and a
    temperature that is not positive.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1) or labels.shape != hidden.shape[:1]:
        raise ValueError(
            "hidden must be [N, h], weight [V, h] and labels [N], but are "
            f"{list(hidden.shape)}, {list(weight.shape)} and {list(labels.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, but must be {weight.dtype}, as the weight is")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, but must be >= 1 token")
    require_temperature(temperature)
    return _LinearLogprobs.apply(hidden, weight, labels, vocab_size, group, temperature, chunk_size)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        temperature: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        columns = local_columns(labels, num_columns=weight.size(0), vocab_size=vocab_size, group=group)
        local_sums = RowSums.empty(hidden.size(0), hidden)
        buffer = _new_buffer(hidden, columns, chunk_size)
        for rows in _chunks(hidden.size(0), chunk_size):
            logits = _project(hidden[rows], weight, buffer)
            sum_rows(logits, columns.index[rows], columns.is_local[rows], temperature, local_sums.rows(rows))
        sums = sum_over_ranks(local_sums, columns.is_local, temperature, group)
        ctx.save_for_backward(hidden, weight, columns.index, columns.is_local, *sums)
        ctx.num_valid, ctx.temperature, ctx.chunk_size = columns.num_valid, temperature, chunk_size
        ctx.last_logits = buffer
        entropy = sums.entropy()
        ctx.mark_non_differentiable(entropy)
        return sums.logprobs(), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, index, is_local, *saved = ctx.saved_tensors
        columns, sums = LocalColumns(ctx.num_valid, index, is_local), RowSums(*saved)
        buffer, is_kept = ctx.last_logits, ctx.last_logits is not None
        ctx.last_logits = None  # overwritten below: a second backward has to make them again
        if buffer is None:
            buffer = _new_buffer(hidden, columns, ctx.chunk_size)
        chunks = list(_chunks(hidden.size(0), ctx.chunk_size))
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = _WeightGradient(weight, columns.num_valid, len(chunks)) if ctx.needs_input_grad[1] else None
        for rows in reversed(chunks):  # the last chunk's logits are in the buffer
            grad = buffer[: rows.stop - rows.start] if is_kept else _project(hidden[rows], weight, buffer)
            is_kept = False
            logits_gradient(
                grad, index[rows], is_local[rows], sums.rows(rows), grad_logprobs[rows], ctx.temperature, out=grad
            )
            if grad_hidden is not None:
                torch.mm(grad, weight[: columns.num_valid], out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.add(grad, hidden[rows])
        return grad_hidden, None if grad_weight is None else grad_weight.result(), None, None, None, None, None


class _WeightGradient:
    """The sum over chunks of grad_logits.T @ hidden, in fp32 at least where there is more than one chunk."""

    def __init__(self, weight: Tensor, num_valid: int, num_chunks: int) -> None:
        self.gradient = torch.zeros_like(weight)
        self.valid = self.gradient[:num_valid]
        dtype = weight.dtype if num_chunks <= 1 else torch.promote_types(weight.dtype, torch.float32)
        self.total = self.valid if dtype == weight.dtype else torch.zeros_like(self.valid, dtype=dtype)

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """grad_logits [n, num_valid], hidden [n, h]."""
        if self.total is self.valid:
            self.total.addmm_(grad_logits.t(), hidden)
        else:  # the result's own memory holds the product until the end
            torch.mm(grad_logits.t(), hidden, out=self.valid)
            for rows in row_tiles(self.total):  # at once, the conversion to fp32 would take the total's memory again
                self.total[rows] += self.valid[rows]

    def result(self) -> Tensor:
        """[V_local, h] in the weight's dtype, 0 on padding."""
        if self.total is not self.valid:
            self.valid.copy_(self.total)
        return self.gradient


def _new_buffer(hidden: Tensor, columns: LocalColumns, chunk_size: int) -> Tensor:
    return hidden.new_empty(min(chunk_size, hidden.size(0)), columns.num_valid)


def _project(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Logits [n, num_valid] of hidden [n, h], in the buffer's first rows."""
    return torch.mm(hidden, weight[: buffer.size(1)].t(), out=buffer[: hidden.size(0)])


def _chunks(num_rows: int, chunk_size: int) -> Iterator[slice]:
    for start in range(0, num_rows, chunk_size):
        yield slice(start, min(start + chunk_size, num_rows))
