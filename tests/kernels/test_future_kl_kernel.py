"""The Future-KL kernel against the definition, mostly in tiles of 64 tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo.ops.future_kl import (
    decay_factor,
    future_kl,
    future_kl_reference,
    influence_weights,
)
from megatron_fipo.ops.future_kl_sharded import carries_between_pieces

triton = pytest.importorskip("triton", reason="triton is not on the path: bash tests/run.sh kernels")
tl = pytest.importorskip("triton.language")
kernels: Any = pytest.importorskip("megatron_fipo.ops.future_kl_triton")

TILE_LEN = 64
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
HALF_LIVES = (0.05, 8.0, 32.0, 1e6)
# ends on tile boundaries and beside them, several in a tile, none in a tile, empty sequences first, last and between
PACKS = ([1], [63], [64], [65], [1000], [0, 10, 0, 3, 1, 0, 100, 14, 63, 1, 64, 1, 1, 200, 0], [0, 0], [127, 1, 128])


def random_shifts(num_tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Shifts ~ N(0, 0.1) [T] and a mask with holes; what it leaves out is NaN."""
    generator = torch.Generator().manual_seed(seed)
    delta = 0.1 * torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    mask = torch.rand(num_tokens, generator=generator) < 0.8
    return torch.where(mask, delta, torch.nan).to(dtype), mask


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def scan(
    delta: Tensor, mask: Tensor, offsets: Tensor, half_life: float, device: torch.device, **options: Any
) -> tuple[Tensor, Tensor]:
    options = {"tile_len": TILE_LEN, **options}
    future, totals = kernels.scan_future_kl(
        delta.to(device), mask.to(device), offsets.to(device), decay_factor(half_life), **options
    )
    return future.cpu(), totals.cpu()


def assert_near(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
    torch.testing.assert_close(found.double(), exact.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_packed_scan_and_totals_equal_the_reference(
    lengths: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    delta, mask = random_shifts(sum(lengths), dtype)
    offsets = offsets_of(lengths)
    for half_life in HALF_LIVES:
        exact = future_kl_reference(delta.double(), mask, half_life, cu_seqlens=offsets.int())
        future, totals = scan(delta, mask, offsets, half_life, device)
        assert_near(future, exact, dtype)
        first = [float(exact[start]) if length else 0.0 for start, length in zip(offsets.tolist(), lengths)]
        assert_near(totals, torch.tensor(first, dtype=torch.float64), torch.float64)


@pytest.mark.parametrize(("num_rows", "row_len"), [(1, 1), (70, 1), (13, 10), (3, 63), (3, 64), (3, 65), (2, 300)])
def test_rows_need_no_offsets(num_rows: int, row_len: int, device: torch.device) -> None:
    delta, mask = random_shifts(num_rows * row_len)
    exact = future_kl_reference(delta.view(num_rows, row_len), mask.view(num_rows, row_len), 32.0)
    no_offsets = torch.full((num_rows + 1,), -1)
    future, _ = scan(delta, mask, no_offsets, 32.0, device, row_len=row_len)
    assert_near(future, exact.view(-1), torch.float64)


def test_scan_at_the_tile_length_of_the_product(device: torch.device) -> None:
    delta, mask = random_shifts(kernels.TILE_LEN + 300, torch.float32)
    offsets = offsets_of([kernels.TILE_LEN - 100, 400])
    exact = future_kl_reference(delta.double(), mask, 32.0, cu_seqlens=offsets.int())
    future, _ = scan(delta, mask, offsets, 32.0, device, tile_len=kernels.TILE_LEN)
    assert_near(future, exact, torch.float32)


@pytest.mark.parametrize("half_life", [0.05, 32.0])
def test_a_nan_reaches_the_start_of_its_sequence_and_nothing_else(half_life: float, device: torch.device) -> None:
    lengths = [70, 300, 70]
    delta, mask = random_shifts(sum(lengths))
    offsets = offsets_of(lengths)
    before, _ = scan(delta, mask, offsets, half_life, device)
    delta[350], mask[350] = torch.nan, True
    after, totals = scan(delta, mask, offsets, half_life, device)
    assert after[70:351].isnan().all()
    assert torch.equal(after[:70], before[:70])
    assert torch.equal(after[351:], before[351:])
    assert totals.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("lengths", [[64, 64], [10, 200], [1, 1], [128, 37]], ids=str)
def test_scan_goes_on_from_carries(lengths: list[int], device: torch.device) -> None:
    delta, mask = random_shifts(sum(lengths))
    whole = future_kl_reference(delta[None], mask[None], 8.0)[0]
    carries = torch.stack([whole[lengths[0]], torch.zeros((), dtype=torch.float64)])
    future, totals = scan(delta, mask, offsets_of(lengths), 8.0, device, carries=carries.to(device))
    assert_near(future, whole, torch.float64)
    assert_near(totals, whole[[0, lengths[0]]], torch.float64)


def test_pieces_scanned_apart_make_the_whole(device: torch.device) -> None:
    piece_lens, num_pieces = torch.tensor([50, 0, 1, 7]), 4
    lengths = (num_pieces * piece_lens).tolist()
    delta, mask = random_shifts(sum(lengths))
    whole = future_kl_reference(delta, mask, 32.0, cu_seqlens=offsets_of(lengths).int())
    pieces = offsets_of(piece_lens.repeat_interleave(num_pieces).tolist())
    _, totals = scan(delta, mask, pieces, 32.0, device)
    carries = carries_between_pieces(totals.view(-1, num_pieces).T, piece_lens, decay_factor(32.0))
    future, _ = scan(delta, mask, pieces, 32.0, device, carries=carries.T.reshape(-1).to(device))
    assert_near(future, whole, torch.float64)


@pytest.mark.parametrize("semantics", ["paper", "released"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_fused_influence_weights_equal_the_composition(
    dtype: torch.dtype, semantics: Any, device: torch.device
) -> None:
    lengths = [130, 0, 1, 64, 105]
    delta, mask = random_shifts(300, dtype)
    # beyond the safety threshold, beyond the dual clip, beyond the clamp on both sides, NaN
    for place, shift in ((20, 1.5), (70, 2.5), (90, 30.0), (110, -30.0), (230, 1.5), (280, 1.2), (150, torch.nan)):
        delta[place], mask[place] = shift, True
    generator = torch.Generator().manual_seed(1)
    advantages = torch.where(mask, torch.randn(300, generator=generator).to(dtype), torch.nan)
    advantages[[20, 230, 280]] = -1.0
    settings: dict[str, Any] = {"influence_low": 0.8, "influence_high": 1.2, "safety_threshold": 3.0}
    offsets = offsets_of(lengths)
    wanted = influence_weights(
        delta,
        advantages,
        mask,
        half_life=32.0,
        dual_clip=10.0,
        semantics=semantics,
        cu_seqlens=offsets.int(),
        **settings,
    )
    bounds = kernels.InfluenceBounds(float(torch.tensor(10.0).double().log()), 0.8, 1.2, 3.0, semantics == "released")
    found, _ = kernels.scan_influence(
        delta.to(device),
        mask.to(device),
        advantages.to(device),
        bounds,
        offsets.to(device),
        decay_factor(32.0),
        tile_len=TILE_LEN,
    )
    assert wanted[1].isnan().sum() == 20  # of the sequence of the NaN
    for ours, theirs in zip(found, wanted):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=20 * TOLERANCE[dtype], equal_nan=True)
    assert not torch.equal(wanted[0][mask], wanted[0][mask].clamp(0.8, 1.0))  # there was something to clamp


@pytest.mark.parametrize("is_packed", [True, False])
def test_the_public_functions_reach_the_kernels(
    is_packed: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    delta, mask = random_shifts(120)
    cu_seqlens = offsets_of([0, 50, 70]).int() if is_packed else None
    delta, mask = (x if is_packed else x.view(3, 40) for x in (delta, mask))
    settings: dict[str, Any] = {"half_life": 32.0, "dual_clip": 10.0, "influence_low": 0.9, "influence_high": 1.2}
    settings |= {"safety_threshold": 1.01, "semantics": "paper", "cu_seqlens": cu_seqlens}
    wanted = influence_weights(delta, -torch.ones_like(delta), mask, **settings)
    monkeypatch.setattr("megatron_fipo.ops.future_kl._runs_triton", lambda _: True)
    delta, mask = delta.to(device), mask.to(device)
    found = influence_weights(delta, -torch.ones_like(delta), mask, **settings)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-12)
    history = future_kl(delta, mask, 32.0, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(history.cpu(), wanted[1], rtol=0, atol=1e-12)


def test_nothing_to_scan_is_no_error(device: torch.device) -> None:
    nothing = torch.zeros(0)
    future, totals = scan(nothing, nothing.bool(), offsets_of([0, 0]), 32.0, device)
    assert (future.shape, totals.tolist()) == ((0,), [0.0, 0.0])


def test_joining_windows_is_associative_and_reads_nothing_behind_an_end(device: torch.device) -> None:
    """The interpreter scans in order; a GPU joins windows in a tree."""
    windows = torch.tensor([(0.5, 1.0), (0.0, 2.0), (0.25, -3.0), (0.5, torch.nan), (0.0, torch.nan)]).double()
    index = torch.cartesian_prod(*[torch.arange(5)] * 3)
    given = windows[index].permute(1, 2, 0).contiguous().to(device)  # [3, 2, 125]: which, decay and total, case
    for is_tiny in (False, True):
        found = torch.empty(2, 2, 128, dtype=torch.float64, device=device)
        _join_both_ways[(1,)](given, found, NUM_CASES=125, IS_TINY=is_tiny)
        decays, totals = found[..., :125].cpu().unbind(dim=1)
        assert torch.equal(decays[0], decays[1])
        assert torch.equal(totals[0].isnan(), totals[1].isnan())
        torch.testing.assert_close(totals[0], totals[1], rtol=1e-15, atol=0, equal_nan=True)
        ends_left = index[:, 2] == 1
        assert totals[0][ends_left].tolist() == [2.0] * 25


@triton.jit
def _join_both_ways(given_ptr, found_ptr, NUM_CASES: tl.constexpr, IS_TINY: tl.constexpr):
    case = tl.arange(0, 128)
    inside = case < NUM_CASES
    a0 = tl.load(given_ptr + case, mask=inside, other=0.0)
    x0 = tl.load(given_ptr + NUM_CASES + case, mask=inside, other=0.0)
    a1 = tl.load(given_ptr + 2 * NUM_CASES + case, mask=inside, other=0.0)
    x1 = tl.load(given_ptr + 3 * NUM_CASES + case, mask=inside, other=0.0)
    a2 = tl.load(given_ptr + 4 * NUM_CASES + case, mask=inside, other=0.0)
    x2 = tl.load(given_ptr + 5 * NUM_CASES + case, mask=inside, other=0.0)
    if IS_TINY:
        a01, x01 = kernels._join_tiny(a0, x0, a1, x1)
        a12, x12 = kernels._join_tiny(a1, x1, a2, x2)
        a_serial, x_serial = kernels._join_tiny(a01, x01, a2, x2)
        a_tree, x_tree = kernels._join_tiny(a0, x0, a12, x12)
    else:
        a01, x01 = kernels._join(a0, x0, a1, x1)
        a12, x12 = kernels._join(a1, x1, a2, x2)
        a_serial, x_serial = kernels._join(a01, x01, a2, x2)
        a_tree, x_tree = kernels._join(a0, x0, a12, x12)
    tl.store(found_ptr + case, a_serial)
    tl.store(found_ptr + 128 + case, x_serial)
    tl.store(found_ptr + 256 + case, a_tree)
    tl.store(found_ptr + 384 + case, x_tree)


def test_kernel_compiles_for_a_gpu_without_one(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).with_name("compile_future_kl.py")
    found = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.splitlines()[-1] == "8 compiled"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="that programs wait for each other shows only on a GPU")
def test_many_programs_at_once_agree_with_the_cpu_and_with_themselves() -> None:
    lengths = [20480] * 50 + [1, 0, 7, 131072, 3000]
    delta, mask = random_shifts(sum(lengths), torch.float32)
    offsets = offsets_of(lengths).int()
    wanted = future_kl(delta, mask, 32.0, cu_seqlens=offsets)
    runs = [future_kl(delta.cuda(), mask.cuda(), 32.0, cu_seqlens=offsets.cuda()) for _ in range(20)]
    assert_near(runs[0].cpu(), wanted, torch.float32)
    assert all(torch.equal(run, runs[0]) for run in runs)
