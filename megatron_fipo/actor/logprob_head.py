"""What the last pipeline stage makes of hidden states: log-probs and entropies of the tokens that are trained on."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_fipo.actor.local_spec import Pack
from megatron_fipo.ops.linear_logprobs import linear_logprobs


@dataclass(frozen=True, eq=False)
class LogprobHead:
    """How log-probs are made: what `policy_output` needs beside the model's tensors."""

    tp_group: dist.ProcessGroup
    sequence_parallel: bool
    vocab_size: int  # without the padding of the projection's rows
    temperature: float
    chunk_size: int  # tokens whose logits exist at a time


def policy_output(
    *,
    hidden_states: Tensor,
    output_layer: nn.Module,
    output_weight: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    packed_seq_params: Pack,
    context: LogprobHead,
    **_: Any,
) -> Tensor:
    """`[2, T]` fp32: log-prob and entropy of every token, 0 where `loss_mask` [1, T] is False.

    The signature of megatron-core's `output_processor`. hidden_states [S, 1, h] (this rank's share of S under sequence
    parallelism), labels [1, T]; output_weight [V_local, h] is the tied embedding, None: the output layer's own weight.
    Only the masked positions go through the projection, so prompts cost no logits.
    """
    if context.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=True, group=context.tp_group
        )
    # the layer itself is never called: with overlap_param_gather its hook is what waits for its weight
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())
    labels, loss_mask = labels[0], loss_mask[0]
    positions = loss_mask.nonzero()[:, 0]
    chosen = hidden_states.index_select(0, packed_seq_params.rows[positions])  # [N, 1, h]
    if not context.sequence_parallel:
        chosen = _SumGradients.apply(chosen, context.tp_group)
    logprobs, entropy = linear_logprobs(
        chosen[:, 0],
        output_layer.weight if output_weight is None else output_weight,
        labels[positions],
        vocab_size=context.vocab_size,
        group=context.tp_group,
        temperature=context.temperature,
        chunk_size=context.chunk_size,
    )
    out = logprobs.new_zeros(2, labels.numel())
    return out.index_copy(1, positions, torch.stack([logprobs, entropy]))


@functools.cache
def model_takes_output_processor() -> bool:
    """Whether the installed megatron-core has the hook `GPTModel.forward(output_processor=...)`: 0.19 does."""
    return "output_processor" in inspect.signature(GPTModel.forward).parameters


class _SumGradients(torch.autograd.Function):
    """Identity forward; backward sums the gradient over the tensor-parallel ranks: each saw its own columns only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.group.size() > 1:
            grad = grad.contiguous()
            dist.all_reduce(grad, group=ctx.group)
        return grad, None
