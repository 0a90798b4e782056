"""Micro-batches within a token budget, and the packed layout itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.ops.packing import micro_batches, pack, padded_length, shared_micro_batches
from megatron_fipo.ops.zigzag import zigzag_indices
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.types import TrainSequence


def make_sequence(
    tokens: list[int], mask: list[int], *, advantage: float = 1.0, rollout: float = -0.5
) -> TrainSequence:
    return TrainSequence(
        uid="p/0",
        token_ids=np.array(tokens, dtype=np.int64),
        loss_mask=np.array(mask, dtype=bool),
        advantages=np.where(np.array(mask, dtype=bool), np.float32(advantage), np.float32(0)),
        rollout_logprobs=np.where(np.array(mask, dtype=bool), np.float32(rollout), np.float32(0)),
        token_versions=np.where(np.array(mask, dtype=bool), 0, -1),
    )


def random_costs() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 100, size=rng.integers(4, 60)).tolist() for _ in range(50)]


def test_micro_batches_stay_within_the_budget_and_hold_everything_once() -> None:
    for lengths in random_costs():
        for budget in (100, 130, 1000):
            batches = micro_batches(lengths, budget)
            assert all(sum(lengths[i] for i in batch) <= budget for batch in batches)
            assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
            assert len(batches) >= -(-sum(lengths) // budget)


def test_micro_batches_are_as_few_as_the_budget_allows() -> None:
    assert micro_batches([4, 4, 4, 4], 16) == [[0, 1, 2, 3]]
    assert [len(batch) for batch in micro_batches([4, 4, 4, 4], 15)] == [2, 2]
    assert len(micro_batches([7, 7, 7], 10)) == 3  # 21 tokens would fill 3 budgets of 10, two never fit together
    assert micro_batches([10], 10) == [[0]]


def test_a_sequence_over_the_budget_names_the_flag_and_the_budget_needed() -> None:
    message = r"--max-tokens-per-micro-batch is 12, but must be at least 13, the longest sequence"
    with pytest.raises(ValueError, match=message):
        micro_batches([3, 13, 5], 12)


def test_nothing_to_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sequences"):
        micro_batches([], 10)


def test_pack_lays_sequences_end_to_end_in_member_order() -> None:
    sequences = [
        make_sequence([5, 6, 7], [0, 1, 0], advantage=2.0),
        make_sequence([1, 2], [1, 0]),
        make_sequence([8, 9, 3, 4], [0, 1, 1, 0], advantage=-1.0, rollout=-0.25),
    ]
    old = [torch.tensor([0.0, -1.0, 0.0]), torch.tensor([-9.0, 0.0]), torch.tensor([0.0, -2.0, -3.0, 0.0])]
    batch = pack(sequences, [2, 0], old_logprobs=old)
    assert batch.token_ids.tolist() == [8, 9, 3, 4, 5, 6, 7]
    assert batch.labels.tolist() == [9, 3, 4, 0, 6, 7, 0]  # the next token of the same sequence
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.loss_mask.tolist() == [False, True, True, False, False, True, False]
    assert batch.advantages.tolist() == [0, -1, -1, 0, 0, 2, 0]
    assert batch.rollout_logprobs.tolist() == [0, -0.25, -0.25, 0, 0, -0.5, 0]
    assert batch.old_logprobs is not None
    assert batch.old_logprobs.tolist() == [0, -2, -3, 0, 0, -1, 0]
    assert batch.members == (2, 0)
    dtypes = [batch.token_ids.dtype, batch.labels.dtype, batch.position_ids.dtype, batch.cu_seqlens.dtype]
    assert dtypes == [torch.int64, torch.int64, torch.int64, torch.int32]
    assert (batch.loss_mask.dtype, batch.advantages.dtype) == (torch.bool, torch.float32)


@pytest.mark.parametrize(("multiple_of", "padding"), [(1, 0), (5, 0), (2, 1), (4, 3)])
def test_a_dummy_sequence_of_mask_0_fills_up_to_a_multiple(multiple_of: int, padding: int) -> None:
    sequences = [make_sequence([5, 6, 7], [1, 1, 0]), make_sequence([1, 2], [1, 0])]
    old = [torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([-3.0, 0.0])]
    batch = pack(sequences, [0, 1], old_logprobs=old, multiple_of=multiple_of)
    size = 5 + padding
    assert batch.cu_seqlens.tolist() == [0, 3, 5] + ([size] if padding else [])
    assert batch.members == (0, 1)
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, *range(padding)]
    assert batch.old_logprobs is not None
    for tensor in (batch.token_ids, batch.labels, batch.loss_mask, batch.advantages, batch.rollout_logprobs):
        assert tensor.shape == (size,)
        assert not tensor[5:].any()
    assert batch.old_logprobs.tolist() == [-1, -2, 0, -3, 0] + [0.0] * padding


def test_without_old_logprobs_there_are_none() -> None:
    assert pack([make_sequence([1, 2], [1, 0])], [0]).old_logprobs is None


def test_shared_prompts_are_computed_once_and_every_token_finds_its_row():
    prompt, other = np.array([5, 6, 7]), np.array([8])

    def sequence(prompt: np.ndarray, response: list[int]) -> TrainSequence:
        tokens = np.append(prompt, response)
        mask = np.zeros(len(tokens), dtype=bool)
        mask[len(prompt) - 1 : -1] = True
        floats = np.zeros(len(tokens), dtype=np.float32)
        return TrainSequence("s", tokens, mask, floats, floats, np.zeros(len(tokens), dtype=np.int64))

    sequences = [sequence(prompt, [1, 2]), sequence(other, [3]), sequence(prompt, [4]), sequence(prompt, [9, 9])]
    batch = pack(sequences, range(4), share_prompts=True, multiple_of=4)
    assert batch.token_ids.tolist() == [5, 6, 7, 1, 2, 8, 3, 4, 9, 9, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 3, 3, 4, 0, 1]
    tokens = np.concatenate([s.token_ids for s in sequences] + [[0, 0]])
    assert batch.token_ids[batch.rows].tolist() == tokens.tolist()  # T = 18 tokens on S = 12 rows
    assert torch.equal(batch.rows[batch.positions_of_rows], torch.arange(12))
    assert batch.cu_seqlens.tolist() == [0, 5, 7, 11, 16, 18]
    apart = pack(sequences, range(4))
    assert torch.equal(apart.rows, torch.arange(16))
    assert apart.labels.tolist() == batch.labels[:16].tolist()


def test_a_response_that_begins_with_a_hole_is_shared_as_far_as_its_tokens_are_the_same():
    def sequence(hole: list[int], response: list[int]) -> TrainSequence:
        tokens = [5, 6, *hole, *response]
        return make_sequence(tokens, [0] * (1 + len(hole)) + [1] * len(response) + [0])

    # what comes before the first trained token is as good as a prompt: nothing before it has a gradient of its own
    sequences = [sequence([7, 7], [1, 2]), sequence([7, 7], [3]), sequence([7, 8], [4])]
    batch = pack(sequences, range(3), share_prompts=True)
    assert batch.token_ids.tolist() == [5, 6, 7, 7, 1, 2, 3, 5, 6, 7, 8, 4]
    assert batch.rows.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7, 8, 9, 10, 11]
    assert batch.labels[batch.loss_mask].tolist() == [1, 2, 3, 4]


def test_reference_logprobs_are_packed_as_old_ones_are() -> None:
    sequences = [make_sequence([5, 6, 7], [1, 1, 0]), make_sequence([1, 2], [1, 0])]
    logprobs = [torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([-3.0, 0.0])]
    batch = pack(sequences, [1, 0], reference_logprobs=logprobs, cp_size=2, cp_rank=1)
    wanted = pack(sequences, [1, 0], old_logprobs=logprobs, cp_size=2, cp_rank=1)
    assert batch.old_logprobs is wanted.reference_logprobs is None
    assert batch.reference_logprobs.tolist() == wanted.old_logprobs.tolist()
    assert any(wanted.old_logprobs.tolist())


def test_micro_batches_keep_a_shared_prompt_together_up_to_the_budget():
    def sequence(first: int) -> TrainSequence:
        mask = np.array([False, False, True, True, False])
        floats = np.zeros(5, dtype=np.float32)
        return TrainSequence("s", np.array([first, 1, 2, 3, 4]), mask, floats, floats, np.zeros(5, dtype=np.int64))

    sequences = [sequence(0)] * 3 + [sequence(9)] * 2  # 3 prompt and 2 response tokens: 9 rows and 7 rows
    assert sorted(map(sorted, shared_micro_batches(sequences, 9))) == [[0, 1, 2], [3, 4]]
    assert sorted(map(sorted, shared_micro_batches(sequences, 7))) == [[0, 1], [2], [3, 4]]
    assert sorted(map(sorted, shared_micro_batches(sequences, 100))) == [[0, 1, 2, 3, 4]]


def test_more_micro_batches_than_needed_can_be_asked_for() -> None:
    assert [len(batch) for batch in micro_batches([4, 4, 4], 100, at_least=2)] == [2, 1]
    assert micro_batches([4, 4], 100, at_least=4) == [[0], [1], [], []]
    assert len(micro_batches([9, 9, 9, 9], 10, at_least=2)) == 4  # the budget asks for more


def test_a_pack_of_nothing_is_one_dummy_sequence() -> None:
    for cp_size, num_tokens in ((1, 1), (2, 2)):
        batch = pack([], (), cp_size=cp_size)
        assert batch.cu_seqlens.tolist() == [0, num_tokens * cp_size]
        assert batch.token_ids.shape == batch.labels.shape == (num_tokens,)
        assert not batch.loss_mask.any()


def test_context_parallel_shares_put_together_are_the_padded_pack() -> None:
    sequences = [make_sequence(list(range(10, 10 + n)), [0, *[1] * (n - 2), 0], advantage=n) for n in (5, 8, 3)]
    old = [torch.arange(len(s.token_ids)) + 0.5 for s in sequences]
    for cp_size, multiple_of, lengths in ((2, 1, [8, 8, 4]), (2, 4, [8, 8, 4, 4]), (4, 1, [8, 8, 8])):
        shares = [
            pack(sequences, (0, 1, 2), old_logprobs=old, cp_size=cp_size, cp_rank=rank, multiple_of=multiple_of)
            for rank in range(cp_size)
        ]
        offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        for rank, share in enumerate(shares):
            assert share.cu_seqlens.tolist() == offsets.tolist()
            assert len(share.token_ids) % multiple_of == 0
            mine = zigzag_indices(offsets, cp_size, rank).tolist()
            for place, token in enumerate(mine):
                index = int(torch.searchsorted(offsets, token, right=True)) - 1
                at = token - int(offsets[index])
                assert share.position_ids[place] == at
                if index < 3 and at < len(sequences[index].token_ids):
                    sequence = sequences[index]
                    assert share.token_ids[place] == sequence.token_ids[at]
                    assert share.loss_mask[place] == sequence.loss_mask[at]
                    assert share.advantages[place] == sequence.advantages[at]
                    assert share.old_logprobs[place] == old[index][at]
                    if at + 1 < len(sequence.token_ids):
                        assert share.labels[place] == sequence.token_ids[at + 1]
                else:
                    assert not share.loss_mask[place]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12),
    cp_size=st.sampled_from([1, 2, 3, 4]),
    multiple_of=st.sampled_from([1, 2, 4]),
    budget=st.integers(48, 200),
    at_least=st.integers(1, 5),
)
def test_whatever_the_cut_every_token_is_packed_once_and_in_its_place(
    lengths: list[int], cp_size: int, multiple_of: int, budget: int, at_least: int
) -> None:
    sequences = [make_sequence(list(range(100 * i, 100 * i + n)), [1] * (n - 1) + [0]) for i, n in enumerate(lengths)]
    padded = [padded_length(n, cp_size) for n in lengths]
    batches = micro_batches(padded, budget, at_least=at_least)
    assert len(batches) >= at_least
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for members in batches:
        shares = [
            pack(sequences, members, cp_size=cp_size, cp_rank=rank, multiple_of=multiple_of) for rank in range(cp_size)
        ]
        offsets = shares[0].cu_seqlens
        whole = torch.zeros(int(offsets[-1]), dtype=torch.int64)
        trained = torch.zeros_like(whole, dtype=torch.bool)
        for rank, share in enumerate(shares):
            assert len(share.token_ids) % multiple_of == 0
            mine = zigzag_indices(offsets, cp_size, rank)
            whole[mine], trained[mine] = share.token_ids, share.loss_mask
        for member, start in zip(members, offsets.tolist()):
            end = start + lengths[member]
            assert whole[start:end].tolist() == sequences[member].token_ids.tolist()
            assert trained[start:end].tolist() == sequences[member].loss_mask.tolist()
        assert int(trained.sum()) == sum(lengths[member] - 1 for member in members)
        assert sum(padded[member] for member in members) <= budget


def test_the_actor_says_what_budget_a_cut_sequence_needs_and_rounds_up_for_interleaved_stages() -> None:
    from megatron_fipo.actor.actor import Actor

    nothing = dict.fromkeys(Actor.__dataclass_fields__)
    budget = {"max_tokens_per_micro_batch": 8, "share_prompts": False}
    four_tokens = make_sequence([1] * 4, [1, 1, 1, 0])
    actor = Actor(**{**nothing, **budget, "layout": ParallelLayout(pp=2, vpp=2)})
    assert [len(batch) for batch in actor._micro_batches([four_tokens] * 5)] == [2, 1, 1, 1]
    cut = Actor(**{**nothing, **budget, "layout": ParallelLayout(cp=2)})
    assert cut._micro_batches([make_sequence([1] * 16, [1] * 15 + [0])]) == [[0]]
    with pytest.raises(ValueError, match="--max-tokens-per-micro-batch is 8, but must be >= 10, this rank's share"):
        cut._micro_batches([make_sequence([1] * 17, [1] * 16 + [0])])
