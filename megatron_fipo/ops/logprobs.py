"""Log-probabilities and entropy from vocabulary-parallel logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def vocab_parallel_logprobs(
    logits: Tensor, labels: Tensor, *, vocab_size: int, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """log softmax(logits)[labels] and the entropy of softmax(logits), both [N].

    logits [N, V_local] is this rank's slice of the vocabulary, in rank order over `group` (the tensor-parallel axis;
    three all-reduces of [N]); None: the whole vocabulary. Columns from `vocab_size` on are padding and take no part.
    labels [N] int64 are global token ids. Computed in fp32, in float64 for float64 logits. The log-probs are
    differentiable, the entropy is not.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits must be [N, V] and labels [N], but are {list(logits.shape)} and {list(labels.shape)}")
    return _VocabParallelLogprobs.apply(logits, labels, vocab_size, group)


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        num_columns = logits.size(1)
        first = num_columns * (group.rank() if group is not None else 0)
        num_valid = max(0, min(num_columns, vocab_size - first))
        # fp32 at least: a sum of 150k exponentials in bf16 has three digits
        x = logits[:, :num_valid].to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        peak = x.amax(dim=1) if num_valid else x.new_full((x.size(0),), -torch.inf)
        _all_reduce(peak, dist.ReduceOp.MAX, group)
        x -= peak[:, None]
        is_local = (labels >= first) & (labels < first + num_valid)
        column = torch.where(is_local, labels - first, 0)
        target = torch.where(is_local, x.gather(1, column[:, None])[:, 0], 0) if num_valid else torch.zeros_like(peak)
        _all_reduce(target, dist.ReduceOp.SUM, group)
        probs = x.exp()
        sums = torch.stack([probs.sum(dim=1), torch.einsum("nv,nv->n", probs, x)])
        _all_reduce(sums, dist.ReduceOp.SUM, group)
        total, weighted = sums
        log_total = total.log()
        probs /= total[:, None]
        ctx.save_for_backward(probs, column, is_local)
        ctx.num_columns, ctx.dtype = num_columns, logits.dtype
        entropy = log_total - weighted / total
        ctx.mark_non_differentiable(entropy)
        return target - log_total, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        probs, column, is_local = ctx.saved_tensors
        grad = probs.new_zeros(probs.size(0), ctx.num_columns)
        valid = grad[:, : probs.size(1)]
        torch.mul(probs, -grad_logprobs[:, None], out=valid)
        if probs.size(1):
            valid.scatter_add_(1, column[:, None], torch.where(is_local, grad_logprobs, 0)[:, None])
        return grad.to(ctx.dtype), None, None, None


def _all_reduce(x: Tensor, op: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(x, op=op, group=group)
