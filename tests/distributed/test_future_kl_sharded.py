"""Future-KL and influence weights of sequences cut over 2 and 4 ranks equal those of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo.ops.future_kl import decay_factor, future_kl, future_kl_reference, influence_weights, scan_in_order
from megatron_fipo.ops.future_kl_sharded import carries_between_pieces, piece_carries
from megatron_fipo.ops.zigzag import zigzag_indices

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
RANKS = (2, 4)
HALF_LIVES = (0.5, 32.0, 256.0)
# Lengths are multiples of 8, as for 4 ranks; of each sequence the response: [first, last) token under the mask.
CASES: dict[str, list[tuple[int, int, int]]] = {
    "one long": [(1600, 100, 1590)],
    "many": [(160, 10, 150), (8, 1, 7), (64, 60, 63), (320, 5, 310), (1024, 1000, 1001), (16, 0, 15)],
    "empty sequences": [(0, 0, 0), (40, 3, 30), (0, 0, 0), (0, 0, 0), (24, 0, 23), (0, 0, 0)],
    "nothing but empty sequences": [(0, 0, 0), (0, 0, 0)],
    "no sequence": [],
    "empty responses": [(48, 20, 20), (80, 40, 79), (16, 5, 5)],
    "one real token, then padding": [(8, 0, 1), (8, 0, 1), (64, 0, 1)],
    "a shard without responses": [(80, 30, 50), (160, 60, 100)],  # pieces 3 and 4 of 8, both rank 3's
    "responses end on a cut": [(64, 8, 32), (64, 16, 48), (64, 32, 64)],
}
PRESET: dict[str, Any] = {
    "half_life": 32.0,
    "dual_clip": 10.0,
    "influence_low": 0.8,
    "influence_high": 1.2,
    "safety_threshold": 3.0,
}


def make_case(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The whole pack: shifts ~ N(0, 0.1), some beyond every bound, NaN outside the mask; advantages per sequence."""
    parts = CASES[name]
    lengths = torch.tensor([length for length, _, _ in parts], dtype=torch.int64)
    generator = torch.Generator().manual_seed(len(name))
    num_tokens = int(lengths.sum())
    mask = torch.cat(
        [torch.zeros(0, dtype=torch.bool)]
        + [(torch.arange(length) >= first) & (torch.arange(length) < last) for length, first, last in parts]
    )
    mask &= torch.rand(num_tokens, generator=generator) < 0.9
    delta = 0.1 * torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    wild = torch.where(torch.rand(num_tokens, generator=generator) < 0.03, 30 * delta, delta)
    advantages = torch.randn(len(parts), generator=generator, dtype=torch.float64).repeat_interleave(lengths)
    return {
        "delta": torch.where(mask, delta, torch.nan).to(dtype),
        "wild": torch.where(mask, wild, torch.nan).to(dtype),
        "advantages": advantages.to(dtype),
        "mask": mask,
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
    }


def share_of(case: dict[str, Tensor], rank: int, num_ranks: int) -> dict[str, Tensor]:
    index = zigzag_indices(case["cu_seqlens"], num_ranks, rank)
    return {name: tensor if name == "cu_seqlens" else tensor[index] for name, tensor in case.items()}


def scan_shards() -> dict[str, Tensor]:
    """Every case, dtype and half-life on this rank's share."""
    group: Any = torch.distributed.group.WORLD
    found: dict[str, Tensor] = {}
    for name in CASES:
        for dtype in TOLERANCE:
            case = share_of(make_case(name, dtype), group.rank(), group.size())
            given: dict[str, Any] = {"cu_seqlens": case["cu_seqlens"], "group": group}
            for half_life in HALF_LIVES:
                found[f"{name}/{dtype}/{half_life}"] = future_kl(case["delta"], case["mask"], half_life, **given)
            for semantics in ("paper", "released"):
                weights, history = influence_weights(
                    case["wild"], case["advantages"], case["mask"], **PRESET, semantics=semantics, **given
                )
                found[f"{name}/{dtype}/{semantics}/f"], found[f"{name}/{dtype}/{semantics}/F"] = weights, history
    found["fixed pieces"], found["fixed carries"] = scan_fixed_pieces(group)
    found["nan"] = scan_nan(group)
    return found


def fixed_pieces() -> tuple[Tensor, Tensor]:
    """Eight pieces of each of three sequences [8, 3, 37] fp32 (the second's are 20 tokens long), and their lengths."""
    generator = torch.Generator().manual_seed(5)
    return 0.1 * torch.randn(8, 3, 37, generator=generator), torch.tensor([37, 20, 0])


def scan_fixed_pieces(group: Any) -> tuple[Tensor, Tensor]:
    """The eight pieces spread over the ranks by fours, twos or one pair each: F and carries of this rank's."""
    values, piece_lens = fixed_pieces()
    gamma, num_ranks = decay_factor(32.0), 1 if group is None else group.size()
    rank = 0 if group is None else group.rank()
    held = [piece for piece in range(8) if min(piece, 7 - piece) % num_ranks == rank]
    offsets = torch.tensor([0, *(piece_lens.tolist() * len(held))]).cumsum(0)
    tokens = torch.cat([values[piece, i, :length] for piece in held for i, length in enumerate(piece_lens.tolist())])
    _, totals = scan_in_order(tokens, torch.ones_like(tokens, dtype=torch.bool), offsets, gamma)
    every = totals.new_empty(8, 3)
    gathered = [torch.empty_like(totals) for _ in range(num_ranks)]
    if group is None:
        gathered = [totals]
    else:
        torch.distributed.all_gather(gathered, totals, group=group)
    for other, theirs in enumerate(gathered):
        every[[piece for piece in range(8) if min(piece, 7 - piece) % num_ranks == other]] = theirs.view(-1, 3)
    carries = carries_between_pieces(every, piece_lens, gamma)[held]
    if num_ranks == 4:  # the product's own exchange: one early and one late piece a rank
        assert torch.equal(
            piece_carries(totals.view(2, 3).T.reshape(-1), piece_lens, gamma, group), carries.T.reshape(-1)
        )
    future, _ = scan_in_order(tokens, torch.ones_like(tokens, dtype=torch.bool), offsets, gamma, carries.reshape(-1))
    whole, whole_carries = torch.zeros(8, 3, 37), torch.zeros(8, 3, dtype=torch.float64)
    for k, part in enumerate(future.split(offsets.diff().tolist())):
        whole[held[k // 3], k % 3, : len(part)] = part
    whole_carries[held] = carries
    return whole, whole_carries


def scan_nan(group: Any) -> Tensor:
    """Three sequences of 80 tokens, a NaN under the mask at token 37 of the second."""
    delta = torch.ones(240)
    delta[117] = torch.nan
    cu_seqlens = torch.tensor([0, 80, 160, 240], dtype=torch.int32)
    share = delta[zigzag_indices(cu_seqlens, group.size(), group.rank())]
    return future_kl(share, torch.ones_like(share), 0.05, cu_seqlens=cu_seqlens, group=group)


@pytest.fixture(scope="module", params=RANKS, ids=[f"{n} ranks" for n in RANKS])
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    from processes import run_ranks

    return run_ranks(tmp_path_factory.mktemp("shards"), request.param, scan_shards, {})


def put_together(shards: list[dict[str, Tensor]], key: str, cu_seqlens: Tensor) -> Tensor:
    whole = torch.full((int(cu_seqlens[-1]),), torch.nan, dtype=shards[0][key].dtype)
    for rank, found in enumerate(shards):
        whole[zigzag_indices(cu_seqlens, len(shards), rank)] = found[key]
    return whole


def assert_near(found: Tensor, exact: Tensor, tolerance: float) -> None:
    scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
    torch.testing.assert_close(found.double(), exact.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_shards_find_what_the_reference_finds(name: str, dtype: torch.dtype, shards: list[dict[str, Tensor]]) -> None:
    case = make_case(name, dtype)
    for half_life in HALF_LIVES:
        exact = future_kl_reference(case["delta"].double(), case["mask"], half_life, cu_seqlens=case["cu_seqlens"])
        found = put_together(shards, f"{name}/{dtype}/{half_life}", case["cu_seqlens"])
        assert found.dtype == dtype
        assert_near(found, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("semantics", ["paper", "released"])
@pytest.mark.parametrize("name", CASES)
def test_shards_find_the_influence_weights_of_the_whole(
    name: str, semantics: Any, shards: list[dict[str, Tensor]]
) -> None:
    for dtype, tolerance in TOLERANCE.items():
        case = make_case(name, dtype)
        wanted = influence_weights(
            case["wild"], case["advantages"], case["mask"], **PRESET, semantics=semantics, cu_seqlens=case["cu_seqlens"]
        )
        for key, exact in zip("fF", wanted):
            found = put_together(shards, f"{name}/{dtype}/{semantics}/{key}", case["cu_seqlens"])
            assert_near(found, exact, tolerance)


def test_no_bit_depends_on_how_many_ranks_share_the_pieces(shards: list[dict[str, Tensor]]) -> None:
    alone, carries = scan_fixed_pieces(None)
    assert torch.equal(sum(found["fixed pieces"] for found in shards), alone)
    assert torch.equal(sum(found["fixed carries"] for found in shards), carries)
    values, piece_lens = fixed_pieces()
    for i, length in enumerate(piece_lens.tolist()):
        whole = values[:, i, :length].reshape(1, -1)
        exact = future_kl_reference(whole.double(), torch.ones_like(whole), 32.0)
        assert_near(alone[:, i, :length].reshape(1, -1), exact, 1e-6)


def test_a_nan_reaches_the_start_of_its_sequence_on_every_rank(shards: list[dict[str, Tensor]]) -> None:
    found = put_together(shards, "nan", torch.tensor([0, 80, 160, 240], dtype=torch.int32))
    assert found.isnan().nonzero().flatten().tolist() == list(range(80, 118))
