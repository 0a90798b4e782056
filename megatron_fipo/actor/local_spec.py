"""Transformer layers without Transformer Engine: packed attention through SDPA, a norm that knows sequence parallel.

megatron-core's own local layers refuse packed sequences (DotProductAttention) and sequence-parallel norms.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_fipo.actor.moe_layers import local_moe_spec
from megatron_fipo.ops.zigzag import local_cu_seqlens, zigzag_indices


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, as megatron-core builds its norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # read when gradients are finalised: each tensor-parallel rank saw its share of the tokens only
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> same shape and dtype; the mean of squares is taken in fp32."""
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


@dataclass
class Pack(PackedSeqParams):
    """Megatron's description of a packed batch, and how tokens and rows correspond (see types.PackedBatch)."""

    rows: Tensor = None  # type: ignore[assignment]  # [T] int64
    positions_of_rows: Tensor = None  # type: ignore[assignment]  # [S] int64


LENGTH_STEP = 16
# up to here SDPA's CPU backward is several times faster in fp32 than in bf16; from 1000 tokens on it is slower
LONGEST_IN_FP32 = 512


class PackedAttention(nn.Module):
    """Causal attention inside each packed sequence, cost sum of L^2.

    Sequences are padded at the end to a multiple of LENGTH_STEP, which the causal mask hides from their tokens, and
    those of one padded length share one SDPA call. It depends on the sequence alone, so no result depends on what else
    is in the pack.

    Under context parallelism keys and values are gathered over the ranks, and each sequence's local queries, two
    pieces of it, attend to that sequence's whole keys in one SDPA call.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal, attn_mask_type
        assert attention_type == "self", attention_type
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.cp_group: dist.ProcessGroup = pg_collection.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Pack | None = None,
    ) -> Tensor:
        """query [S, 1, heads, d], key and value [S, 1, groups, d] -> [S, 1, heads * d]."""
        assert packed_seq_params is not None, "the actor always packs"
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        if self.cp_group.size() > 1:
            return self._across_ranks(query, key, value, packed_seq_params.cu_seqlens_q).flatten(1)[:, None]
        cu_seqlens = packed_seq_params.cu_seqlens_q.tolist()
        same_length: dict[int, list[tuple[int, int]]] = {}
        for start, end in itertools.pairwise(cu_seqlens):
            same_length.setdefault(-(-(end - start) // LENGTH_STEP) * LENGTH_STEP, []).append((start, end))
        outputs: dict[int, Tensor] = {}
        for length, members in same_length.items():
            # padding repeats the last token: its queries are dropped, its keys come after every query that is kept
            tokens = torch.cat([torch.arange(start, start + length).clamp_(max=end - 1) for start, end in members])
            rows = packed_seq_params.rows[tokens.to(query.device)]
            padded = (x.index_select(0, rows).unflatten(0, (-1, length)) for x in (query, key, value))
            for (start, end), row in zip(members, self._attend(*padded)):
                outputs[start] = row[: end - start]
        out = torch.cat([outputs[start] for start in cu_seqlens[:-1]])  # [T, heads, d]
        return out.index_select(0, packed_seq_params.positions_of_rows).flatten(1)[:, None]

    def _across_ranks(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        """query [S, heads, d], key and value [S, groups, d], this rank's share of the pack -> [S, heads, d]."""
        cp_size, cp_rank = self.cp_group.size(), self.cp_group.rank()
        shares = [zigzag_indices(cu_seqlens, cp_size, rank) for rank in range(cp_size)]
        in_order = torch.cat(shares).argsort()  # where the gathered shares hold each token of the pack
        keys, values = _GatherShares.apply(torch.stack([key, value], dim=1), self.cp_group)[in_order].unbind(1)
        outputs = []
        bounds, local_bounds = cu_seqlens.tolist(), local_cu_seqlens(cu_seqlens, cp_size).tolist()
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            mine = slice(local_bounds[i], local_bounds[i + 1])
            is_visible = shares[cp_rank][mine, None] >= torch.arange(start, end, device=query.device)
            whole = slice(start, end)
            outputs.append(self._attend(query[None, mine], keys[None, whole], values[None, whole], is_visible)[0])
        return torch.cat(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, is_visible: Tensor | None = None) -> Tensor:
        """query [n, Q, heads, d], key and value [n, L, groups, d] -> [n, Q, heads, d].

        What each query sees is `is_visible` [Q, L]; without it, what lies at or before its own place.
        """
        dtype = query.dtype
        if query.device.type == "cpu" and key.size(1) <= LONGEST_IN_FP32:
            query, key, value = query.float(), key.float(), value.float()
        dropout = self.dropout if self.training else 0.0
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=is_visible,
            is_causal=is_visible is None,
            scale=self.scale,
            dropout_p=dropout,
            enable_gqa=True,
        )
        return out.transpose(1, 2).to(dtype)


class _GatherShares(torch.autograd.Function):
    """[S, ...] of every context-parallel rank, one after the other: [cp * S, ...]; backward sums over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        shares = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(shares, x.contiguous(), group=group)
        return torch.cat(shares)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None


def local_block_spec(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """The `num_layers` layers of one pipeline stage and the final norm."""
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    dense = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = local_moe_spec() if config.num_moe_experts else ModuleSpec(module=MLP, submodules=dense)
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
