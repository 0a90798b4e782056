"""Properties of the Future-KL scan and of the zigzag cut, over cases that hypothesis makes up."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_fipo.ops.future_kl import (
    decay_factor,
    future_kl,
    future_kl_reference,
    scan_in_order,
)
from megatron_fipo.ops.future_kl_sharded import carries_between_pieces, piece_offsets
from megatron_fipo.ops.zigzag import local_cu_seqlens, zigzag_indices

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True, database=None)
CP_SIZES = st.sampled_from([2, 3, 4])
HALF_LIVES = st.floats(0.2, 1e4)
DTYPES = {torch.float32: 1e-6, torch.float64: 1e-12}


def pack(lengths: list[int], seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Shifts ~ N(0, 0.1) [T], a mask whose density differs from sequence to sequence, cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.rand(len(lengths), generator=generator).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    mask = torch.rand(sum(lengths), generator=generator) < density
    delta = 0.1 * torch.randn(sum(lengths), generator=generator, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return torch.where(mask, delta, torch.nan).to(dtype), mask, cu_seqlens


def scan_on_ranks(delta: Tensor, mask: Tensor, half_life: float, cu_seqlens: Tensor, cp_size: int) -> Tensor:
    """Cut, scan every rank's pieces as `future_kl` does, exchange, scan on, and put the whole together again."""
    gamma = decay_factor(half_life)
    pieces = piece_offsets(local_cu_seqlens(cu_seqlens, cp_size).long())
    piece_lens = pieces.diff()[::2]
    indices = [zigzag_indices(cu_seqlens, cp_size, rank) for rank in range(cp_size)]
    shares = [(delta[index], mask[index]) for index in indices]

    def scan(rank: int, carries: Tensor | None) -> tuple[Tensor, Tensor]:
        return scan_in_order(*shares[rank], pieces, gamma, carries)

    totals = torch.stack([scan(rank, None)[1].view(-1, 2) for rank in range(cp_size)])
    behind = carries_between_pieces(torch.cat([totals[:, :, 0], totals[:, :, 1].flip(0)]), piece_lens, gamma)
    whole = torch.full_like(delta, torch.nan, dtype=torch.float64)
    for rank, index in enumerate(indices):
        whole[index] = scan(rank, torch.stack([behind[rank], behind[-1 - rank]], dim=1).view(-1))[0]
    return whole


def assert_near(found: Tensor, exact: Tensor, tolerance: float) -> None:
    scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
    torch.testing.assert_close(found.double(), exact.double(), rtol=0, atol=tolerance * scale)


@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=8),
    half_life=HALF_LIVES,
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**31),
)
@EXAMPLES
def test_scan_is_the_reference(lengths: list[int], half_life: float, dtype: torch.dtype, seed: int) -> None:
    delta, mask, cu_seqlens = pack(lengths, seed, dtype)
    found = future_kl(delta, mask, half_life, cu_seqlens=cu_seqlens)
    exact = future_kl_reference(delta.double(), mask, half_life, cu_seqlens=cu_seqlens)
    assert_near(found, exact, DTYPES[dtype])


@given(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=6), half_life=HALF_LIVES, cut=st.integers(0, 90))
@EXAMPLES
def test_scan_from_the_value_behind_a_cut_is_the_scan_of_the_whole(
    lengths: list[int], half_life: float, cut: int
) -> None:
    delta, mask, cu_seqlens = pack(lengths, seed=cut)
    whole = future_kl_reference(delta, mask, half_life, cu_seqlens=cu_seqlens)
    offsets = torch.unique(torch.tensor([*cu_seqlens.tolist(), min(cut, sum(lengths))]))
    behind = torch.cat([whole, torch.zeros(1).double()])[offsets[1:]]
    carries = torch.where(torch.isin(offsets[1:], cu_seqlens.long()), 0.0, behind)
    found, _ = scan_in_order(delta, mask, offsets, decay_factor(half_life), carries)
    assert_near(found, whole, 1e-12)


@given(
    piece_lens=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    cp_size=CP_SIZES,
    half_life=HALF_LIVES,
    seed=st.integers(0, 2**31),
)
@EXAMPLES
def test_cut_and_scanned_on_ranks_it_is_the_whole(
    piece_lens: list[int], cp_size: int, half_life: float, seed: int
) -> None:
    delta, mask, cu_seqlens = pack([2 * cp_size * length for length in piece_lens], seed)
    exact = future_kl_reference(delta, mask, half_life, cu_seqlens=cu_seqlens)
    assert_near(scan_on_ranks(delta, mask, half_life, cu_seqlens, cp_size), exact, 1e-12)


@given(piece_lens=st.lists(st.integers(0, 9), max_size=6), cp_size=CP_SIZES)
@EXAMPLES
def test_zigzag_gives_every_token_to_one_rank_and_keeps_the_order_of_pieces(
    piece_lens: list[int], cp_size: int
) -> None:
    lengths = [2 * cp_size * length for length in piece_lens]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    shares = [zigzag_indices(cu_seqlens, cp_size, rank) for rank in range(cp_size)]
    assert torch.cat(shares).sort().values.tolist() == list(range(sum(lengths)))
    local = local_cu_seqlens(cu_seqlens, cp_size)
    pieces = piece_offsets(local.long())
    assert pieces[::2].tolist() == local.tolist()
    for rank, share in enumerate(shares):
        assert len(share) == int(local[-1])
        for i, (start, length) in enumerate(zip(cu_seqlens.tolist(), piece_lens)):
            for which, number in enumerate((rank, 2 * cp_size - 1 - rank)):
                first = start + number * length
                found = share[pieces[2 * i + which] : pieces[2 * i + which + 1]]
                assert found.tolist() == list(range(first, first + length))


@given(
    piece_lens=st.lists(st.integers(0, 40), min_size=1, max_size=5), half_life=HALF_LIVES, seed=st.integers(0, 2**31)
)
@EXAMPLES
def test_no_bit_depends_on_which_rank_scans_a_piece(piece_lens: list[int], half_life: float, seed: int) -> None:
    """Eight pieces a sequence, scanned by one rank, by two and by four, each its pieces in one packed call."""
    num_pieces, gamma = 8, decay_factor(half_life)
    delta, mask, cu_seqlens = pack([num_pieces * length for length in piece_lens], seed, torch.float32)
    results = []
    for num_ranks in (1, 2, 4):
        held = [[p for p in range(num_pieces) if min(p, 7 - p) % num_ranks == rank] for rank in range(num_ranks)]
        totals = torch.full((num_pieces, len(piece_lens)), torch.nan, dtype=torch.float64)
        future = torch.full_like(delta, torch.nan)
        carries: Tensor | None = None
        for _ in range(2):
            for pieces in held:
                index, offsets = held_tokens(cu_seqlens, piece_lens, pieces)
                given_carries = None if carries is None else carries[pieces].T.reshape(-1)
                future[index], found = scan_in_order(delta[index], mask[index], offsets, gamma, given_carries)
                if carries is None:
                    totals[pieces] = found.view(-1, len(pieces)).T
            carries = carries_between_pieces(totals, torch.tensor(piece_lens), gamma)
        results.append((future, carries))
    exact = future_kl_reference(delta.double(), mask, half_life, cu_seqlens=cu_seqlens)
    assert_near(results[0][0], exact, 1e-6)
    for future, carries in results[1:]:
        assert torch.equal(future, results[0][0])
        assert torch.equal(carries, results[0][1])


def held_tokens(cu_seqlens: Tensor, piece_lens: list[int], pieces: list[int]) -> tuple[Tensor, Tensor]:
    """Where the tokens of these pieces of every sequence lie in the whole, and the offsets of the pieces as held."""
    starts = [(start + p * length, length) for start, length in zip(cu_seqlens.tolist(), piece_lens) for p in pieces]
    index = [torch.arange(start, start + length) for start, length in starts]
    return torch.cat(index), torch.tensor([0, *(length for _, length in starts)]).cumsum(0)
