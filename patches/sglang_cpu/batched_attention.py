"""Attention over the paged KV cache with one SDPA call per group of equal query lengths, not one per sequence.

Why: SGLang's torch_native backend loops over the sequences in Python (about ten small operators each, per layer: half
    of a decode step at 64 sequences) and pads each query to the whole sequence when a prefix is cached.
Upstream: sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend; hook:
    sglang.srt.layers.attention.attention_registry.register_attention_backend
Drop-when: upstream's torch_native backend is batched.
Test: tests/unit/test_patch_sglang_attention.py, tests/distributed/test_patch_sglang.py, tests/e2e/test_engine.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

REPLACES: Final = {
    "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend": "83049e22e6b51075",
    "sglang.srt.layers.attention.attention_registry:register_attention_backend": "6c70425bf5450862",
}


def register_batched_attention() -> None:
    """Serve the backend name "torch_native" by the batched version. To be called before the model runner is built."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.layers.radix_attention import AttentionType

    class BatchedTorchAttention(TorchNativeAttnBackend):
        """Decoder self-attention is batched; cross-attention and sliding windows stay with SGLang's loop."""

        def init_forward_metadata(self, forward_batch: Any) -> None:
            super().init_forward_metadata(forward_batch)
            decode = forward_batch.forward_mode.is_decode()
            self.groups = plan_groups(
                self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices],
                forward_batch.seq_lens,
                torch.ones_like(forward_batch.seq_lens) if decode else forward_batch.extend_seq_lens,
            )

        def forward_decode(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            layer: Any,
            forward_batch: Any,
            save_kv_cache: bool = True,
        ) -> Tensor:
            if not self._is_plain(layer, forward_batch):
                return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
            return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

        def forward_extend(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            layer: Any,
            forward_batch: Any,
            save_kv_cache: bool = True,
        ) -> Tensor:
            if not self._is_plain(layer, forward_batch):
                return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
            return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

        def _is_plain(self, layer: Any, forward_batch: Any) -> bool:
            return (
                layer.attn_type == AttentionType.DECODER
                and not layer.is_cross_attention
                and forward_batch.encoder_lens is None
                and not self.use_sliding_window_kv_pool
                and (layer.sliding_window_size is None or layer.sliding_window_size < 0)
                and layer.qk_head_dim == layer.v_head_dim
            )

        def _attend(
            self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool
        ) -> Tensor:
            from sglang.srt.mem_cache.memory_pool import KVWriteLoc

            if save_kv_cache:
                location = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
                self.token_to_kv_pool.set_kv_buffer(layer, location, k, v)
            key_cache = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
            value_cache = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
            query = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
            return attend(query, key_cache, value_cache, self.groups, layer.scaling).view(query.shape[0], -1)

    assert "torch_native" in ATTENTION_BACKENDS, "sglang's attention registry has changed"
    register_attention_backend("torch_native")(BatchedTorchAttention)


@dataclass(frozen=True, eq=False)
class AttentionGroup:
    """b sequences with the same number e of query tokens; S is the longest of their contexts."""

    query_rows: Tensor | None  # [b * e] int64 rows of the batch's query tokens; None: all rows in order
    cache_slots: Tensor  # [b * S] int64 rows of the KV cache; slot 0 (SGLang's padding slot) past a context's end
    mask: Tensor  # [b, 1, e, S] bool, True where a query may look
    num_sequences: int
    query_len: int


def plan_groups(slots: Tensor, context_lens: Tensor, query_lens: Tensor) -> tuple[AttentionGroup, ...]:
    """Group the sequences of a batch by their number of query tokens, which are the last ones of a sequence's context.

    slots: [B, >= max context] int, KV cache rows of each sequence's tokens. context_lens, query_lens: [B] int.
    """
    starts = torch.cumsum(query_lens, 0) - query_lens
    groups = []
    for query_len in torch.unique(query_lens).tolist():
        members = torch.nonzero(query_lens == query_len).squeeze(-1)
        contexts = context_lens[members]
        longest = int(contexts.max())
        position = torch.arange(longest)
        offset = torch.arange(query_len)
        query_position = (contexts - query_len).unsqueeze(-1) + offset  # [b, e]
        mask = position <= query_position.unsqueeze(-1)  # [b, e, S]: causal, and inside the context
        cache_slots = slots[members, :longest].to(torch.int64)
        cache_slots.masked_fill_(position >= contexts.unsqueeze(-1), 0)
        everything = len(members) == len(query_lens)
        rows = None if everything else (starts[members].unsqueeze(-1) + offset).reshape(-1)
        groups.append(AttentionGroup(rows, cache_slots.reshape(-1), mask.unsqueeze(1), len(members), query_len))
    return tuple(groups)


def attend(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, groups: tuple[AttentionGroup, ...], scaling: float
) -> Tensor:
    """Causal attention of every query token to its sequence's cached keys and values.

    query: [T, H, D]. key_cache, value_cache: [slots, KV, D], H a multiple of KV. Returns [T, H, D] in query's dtype.
    """
    heads, head_dim = query.shape[1:]
    kv_heads = key_cache.shape[1]
    share = heads // kv_heads
    output = torch.empty_like(query)
    for group in groups:
        b, e = group.num_sequences, group.query_len
        rows = query if group.query_rows is None else query[group.query_rows]
        # The heads that share a key head become extra query positions: no copy of keys and values.
        q = rows.view(b, e, kv_heads, share, head_dim).permute(0, 2, 3, 1, 4).reshape(b, kv_heads, share * e, head_dim)
        k = key_cache.index_select(0, group.cache_slots).view(b, -1, kv_heads, head_dim).transpose(1, 2)
        v = value_cache.index_select(0, group.cache_slots).view(b, -1, kv_heads, head_dim).transpose(1, 2)
        mask = group.mask.repeat(1, 1, share, 1) if e > 1 else group.mask
        result = scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, scale=scaling)
        result = result.view(b, kv_heads, share, e, head_dim).permute(0, 3, 1, 2, 4).reshape(b * e, heads, head_dim)
        if group.query_rows is None:
            output.copy_(result)
        else:
            output[group.query_rows] = result
    return output
