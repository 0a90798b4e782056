"""Batched attention over a paged cache equals attention computed one sequence at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_fipo.patches.sglang_cpu.batched_attention import attend, plan_groups

KV_HEADS, HEAD_DIM = 2, 16


def one_by_one(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, contexts: list[int], queries: list[int]
) -> Tensor:
    outputs, start = [], 0
    share = query.shape[1] // KV_HEADS
    for row, (context, num_queries) in enumerate(zip(contexts, queries, strict=True)):
        k = key_cache[slots[row, :context]].repeat_interleave(share, 1)
        v = value_cache[slots[row, :context]].repeat_interleave(share, 1)
        for offset in range(num_queries):
            last = context - num_queries + offset + 1
            scores = torch.einsum("hd,shd->hs", query[start + offset], k[:last]) * 0.3
            outputs.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v[:last]))
        start += num_queries
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("contexts", "queries"),
    [
        ([5, 17, 1, 9], [1, 1, 1, 1]),  # decode
        ([5, 17, 1, 9], [5, 17, 1, 9]),  # prefill of whole prompts
        ([5, 17, 12, 9, 30], [1, 7, 1, 7, 30]),  # cached prefixes, two groups and a single
        ([1], [1]),
    ],
)
@pytest.mark.parametrize("heads", [2, 6])
def test_batched_attention_equals_one_by_one(contexts: list[int], queries: list[int], heads: int) -> None:
    generator = torch.Generator().manual_seed(len(contexts))
    num_slots = sum(contexts) + 1
    key_cache = torch.randn(num_slots, KV_HEADS, HEAD_DIM, generator=generator)
    value_cache = torch.randn(num_slots, KV_HEADS, HEAD_DIM, generator=generator)
    query = torch.randn(sum(queries), heads, HEAD_DIM, generator=generator)
    shuffled = 1 + torch.randperm(num_slots - 1, generator=generator)
    # Past a context's end a row holds what an earlier request left there.
    slots = torch.randint(1, num_slots, (len(contexts), 40), generator=generator, dtype=torch.int32)
    for row, piece in enumerate(shuffled.split(contexts)):
        slots[row, : len(piece)] = piece.to(torch.int32)
    groups = plan_groups(slots, torch.tensor(contexts), torch.tensor(queries))
    result = attend(query, key_cache, value_cache, groups, 0.3)
    expected = one_by_one(query, key_cache, value_cache, slots.long(), contexts, queries)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)
    assert len(groups) == len(set(queries))
