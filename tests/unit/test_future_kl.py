"""The Future-KL scan and the influence weights against their definitions."""

from __future__ import annotations

import math
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo.ops.future_kl import (
    _segment_scan,
    future_kl,
    future_kl_reference,
    influence_weights,
)

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
HALF_LIVES = (0.5, 8.0, 32.0, 256.0)
PRESET = {
    "half_life": 32.0,
    "dual_clip": 10.0,
    "influence_low": 0.8,
    "influence_high": 1.2,
    "safety_threshold": 3.0,
    "semantics": "paper",
}


def random_shifts(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Shifts ~ N(0, 0.1) and a mask with holes."""
    generator = torch.Generator().manual_seed(seed)
    delta = 0.1 * torch.randn(*shape, generator=generator, dtype=dtype)
    return delta, torch.rand(*shape, generator=generator) < 0.8


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def assert_scan_equal(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
    torch.testing.assert_close(found.double(), exact.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


def test_reference_is_the_sum_over_the_future() -> None:
    delta, mask = random_shifts(2, 50)
    gamma = 2 ** (-1 / 8)
    wanted = torch.zeros_like(delta)
    for t in range(50):
        for j in range(t, 50):
            wanted[:, t] += gamma ** (j - t) * delta[:, j] * mask[:, j]
    torch.testing.assert_close(future_kl_reference(delta, mask, 8.0), wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 4097])
def test_scan_equals_the_reference(dtype: torch.dtype, length: int) -> None:
    for half_life in HALF_LIVES:
        delta, mask = random_shifts(3, length, dtype=dtype)
        exact = future_kl_reference(delta.double(), mask, half_life)
        assert_scan_equal(future_kl(delta, mask, half_life), exact, dtype)


@pytest.mark.parametrize("seed", range(40))
def test_packed_scan_equals_each_sequence_alone(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_sequences = int(torch.randint(1, 9, (), generator=generator))
    lengths = torch.randint(0, 150, (num_sequences,), generator=generator).tolist()
    half_life = 10 ** float(torch.empty(()).uniform_(-1.3, 3.0, generator=generator))
    delta, mask = random_shifts(sum(lengths), seed=seed)
    found = future_kl(delta, mask, half_life, cu_seqlens=offsets_of(lengths))
    alone = [
        future_kl_reference(part[None], part_mask[None], half_life)[0]
        for part, part_mask in zip(delta.split(lengths), mask.split(lengths))
    ]
    assert_scan_equal(found, torch.cat(alone), torch.float64)


@pytest.mark.parametrize(("a", "b", "length"), [(1.0, 1.0, 64), (-3.0, 0.5, 300), (0.0, -2.0, 1)])
def test_scan_is_linear(a: float, b: float, length: int) -> None:
    x, mask = random_shifts(2, length, seed=length)
    y, _ = random_shifts(2, length, seed=length + 1)
    combined = a * future_kl(x, mask, 32.0) + b * future_kl(y, mask, 32.0)
    torch.testing.assert_close(future_kl(a * x + b * y, mask, 32.0), combined, rtol=0, atol=1e-11)


def test_scan_resets_at_sequence_start() -> None:
    delta, mask = random_shifts(1000)
    mask[:] = True
    offsets = offsets_of([130, 0, 1, 500, 369])
    before = future_kl(delta, mask, 32.0, cu_seqlens=offsets)
    delta[131:631] = torch.nan
    after = future_kl(delta, mask, 32.0, cu_seqlens=offsets)
    assert torch.equal(after[:131], before[:131])
    assert after[131:631].isnan().all()
    assert torch.equal(after[631:], before[631:])
    assert float(before[130]) == float(delta[130])  # a sequence of one token


def test_a_shift_reaches_back_with_its_half_life_through_masked_tokens() -> None:
    delta = torch.full((1, 200), torch.nan, dtype=torch.float64)
    mask = torch.zeros(1, 200, dtype=torch.bool)
    delta[0, 150], mask[0, 150] = 0.5, True
    found = future_kl(delta, mask, 32.0)[0]
    assert found[151:].tolist() == [0.0] * 49
    assert found[[150, 118, 86, 54]].tolist() == pytest.approx([0.5, 0.25, 0.125, 0.0625], rel=1e-13)


def test_empty_tensors_and_empty_responses_have_no_future() -> None:
    assert future_kl(torch.empty(0), torch.empty(0, dtype=torch.bool), 32.0, cu_seqlens=offsets_of([])).shape == (0,)
    assert future_kl(torch.empty(3, 0), torch.empty(3, 0, dtype=torch.bool), 32.0).shape == (3, 0)
    garbage, nothing = torch.full((2, 70), torch.inf), torch.zeros(2, 70, dtype=torch.bool)
    assert torch.equal(future_kl(garbage, nothing, 32.0), torch.zeros(2, 70))


def test_mask_may_be_of_any_dtype_and_tensors_strided() -> None:
    delta, mask = random_shifts(100, 6)
    wanted = future_kl_reference(delta.T.contiguous(), mask.T.contiguous(), 32.0)
    for strided_mask in (mask.T, mask.T.double(), mask.T.int()):
        assert_scan_equal(future_kl(delta.T, strided_mask, 32.0), wanted, torch.float64)


def test_scan_has_no_gradient_and_its_dtype_is_fp32_or_float64() -> None:
    delta, mask = random_shifts(2, 8)
    assert not future_kl(delta.requires_grad_(), mask, 32.0).requires_grad
    assert future_kl(delta.bfloat16(), mask, 32.0).dtype == torch.float32


def test_decay_does_not_pile_up_rounding_over_a_long_response() -> None:
    delta, mask = random_shifts(1, 20480, dtype=torch.float32)
    delta, mask = delta + 0.05, torch.ones_like(mask)
    for half_life in (256.0, 1e6):
        exact = future_kl_reference(delta.double(), mask, half_life)
        assert_scan_equal(future_kl(delta, mask, half_life), exact, torch.float32)


def test_a_group_of_one_rank_is_no_group() -> None:
    delta, mask = random_shifts(2, 8)
    alone: Any = SimpleNamespace(size=lambda: 1)
    assert torch.equal(future_kl(delta, mask, 32.0, group=alone), future_kl(delta, mask, 32.0))


def test_cuda_without_triton_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "megatron_fipo.ops.future_kl_triton", raising=False)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(RuntimeError, match="CUDA tensors needs triton, but it is not installed"):
        _segment_scan(on_gpu)


def test_a_device_without_a_scan_is_an_error_that_names_it() -> None:
    elsewhere: Any = SimpleNamespace(device=torch.device("xpu"))
    with pytest.raises(ValueError, match="log-probs are on xpu, but must be on cpu or cuda"):
        _segment_scan(elsewhere)


@pytest.mark.parametrize(
    ("shape", "cu_seqlens", "message"),
    [
        ((2, 4), None, r"shape \(2, 4\), but must be packed \[T_local\] with cu_seqlens over 2 context-parallel ranks"),
        ((8,), None, "cu_seqlens is missing"),
        ((8,), [0, 8], "from 0 to 8, but must run from 0 to T_local \\* cp = 8 \\* 2 = 16"),
        ((8,), [4, 16], "from 4 to 16"),
        ((8,), [0, 20, 16], "never fall"),
        ((8,), [0, 6, 16], r"sequences of \[6, 10\] tokens, but over 2 context-parallel ranks.*multiple of 4"),
    ],
)
def test_what_cannot_be_a_rank_s_share_is_refused(
    shape: tuple[int, ...], cu_seqlens: list[int] | None, message: str
) -> None:
    group: Any = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    offsets = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    delta, mask = torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        future_kl(delta, mask, 32.0, cu_seqlens=offsets, group=group)
    with pytest.raises(ValueError, match=message):
        influence_weights(delta, delta, mask, **PRESET, cu_seqlens=offsets, group=group)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"half_life": 0.0}, "half_life is 0.0, but must be > 0"),
        ({"half_life": -1.0}, "half_life is -1.0"),
        ({"half_life": math.nan}, "half_life is nan"),
        ({"mask": torch.ones(9, dtype=torch.bool)}, r"mask has shape \(9,\)"),
        ({"mask": torch.full((10,), 0.5)}, "other than 0 and 1"),
        ({"mask": torch.full((10,), torch.nan)}, "other than 0 and 1"),
        ({"delta_logprobs": torch.zeros(10, dtype=torch.long)}, "floating dtype"),
        ({"delta_logprobs": torch.zeros(2, 5)}, r"must be \[T\] when cu_seqlens is given"),
        ({"delta_logprobs": torch.zeros(2, 5, 1)}, r"must be \[B, L\]"),
        ({"cu_seqlens": None}, "cu_seqlens is missing"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "must be int32"),
        ({"cu_seqlens": torch.tensor([[0, 10]], dtype=torch.int32)}, "must be int32"),
        ({"cu_seqlens": torch.tensor([1, 10], dtype=torch.int32)}, "from 1 to 10"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "from 0 to 9"),
        ({"cu_seqlens": torch.tensor([0, 7, 6, 10], dtype=torch.int32)}, "never fall"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "delta_logprobs": torch.zeros(10),
        "mask": torch.ones(10, dtype=torch.bool),
        "half_life": 32.0,
        "cu_seqlens": torch.tensor([0, 4, 10], dtype=torch.int32),
    }
    future_kl(**arguments)
    with pytest.raises(ValueError, match=message):
        future_kl(**{**arguments, **change})
    with pytest.raises(ValueError, match=message):
        future_kl_reference(**{**arguments, **change})


def weights_of(delta: Tensor, advantages: Tensor | None = None, **change: Any) -> tuple[Tensor, Tensor]:
    if advantages is None:
        advantages = torch.ones_like(delta)
    return influence_weights(delta, advantages, torch.ones_like(delta, dtype=torch.bool), **{**PRESET, **change})


def test_no_shift_means_no_influence() -> None:
    weights, history = weights_of(torch.zeros(2, 64))
    assert torch.equal(history, torch.zeros(2, 64))
    assert torch.equal(weights, torch.ones(2, 64))


def test_weights_are_the_clamped_exponential_of_the_future() -> None:
    delta, _ = random_shifts(2, 300)
    weights, history = weights_of(delta)
    torch.testing.assert_close(history, future_kl_reference(delta, torch.ones_like(delta), 32.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, history.exp().clamp(0.8, 1.2), rtol=0, atol=1e-15)
    inside = (weights > 0.8) & (weights < 1.2)
    assert 0 < int(inside.sum()) < 600


def test_tokens_above_the_dual_clip_bound_do_not_take_part_whatever_their_advantage() -> None:
    limit = math.log(10.0)
    delta = torch.tensor([[0.1, limit + 1e-9, 0.1], [0.1, limit, 0.1]], dtype=torch.float64)
    for sign in (1.0, -1.0):
        _, history = weights_of(delta, torch.full_like(delta, sign))
        gamma = 2 ** (-1 / 32)
        assert float(history[0, 0]) == pytest.approx(0.1 + gamma**2 * 0.1, abs=1e-12)
        assert float(history[1, 0]) == pytest.approx(0.1 + gamma * limit + gamma**2 * 0.1, abs=1e-12)


def test_shifts_are_clamped_to_twenty_on_both_sides() -> None:
    delta = torch.tensor([[-50.0, 0.0], [-20.0, 0.0]], dtype=torch.float64)
    _, history = weights_of(delta)
    assert float(history[0, 0]) == float(history[1, 0]) == -20.0


@pytest.mark.parametrize(("semantics", "unsafe_weights"), [("paper", [1.0, 1.0]), ("released", [1.0, 0.8])])
def test_safety_rule_holds_above_the_threshold_for_negative_advantages(
    semantics: str, unsafe_weights: list[float]
) -> None:
    above, below = math.log(3.001), math.log(2.999)
    # rows: a future that pushes f to 1.2, one that pushes it to 0.8
    delta = torch.tensor([[above, 1.0], [above, -9.0], [below, 1.0], [below, -9.0]], dtype=torch.float64)
    negative = torch.full_like(delta, -1.0)
    weights, _ = weights_of(delta, negative, semantics=semantics)
    assert weights[:2, 0].tolist() == pytest.approx(unsafe_weights)
    assert weights[2:, 0].tolist() == pytest.approx([1.2, 0.8])
    weights, _ = weights_of(delta, -negative, semantics=semantics)
    assert weights[:, 0].tolist() == pytest.approx([1.2, 0.8, 1.2, 0.8])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_weights_stay_finite_where_the_exponential_overflows(dtype: torch.dtype) -> None:
    weights, history = weights_of(torch.full((1, 200), 2.0, dtype=dtype))
    assert float(history[0, 0]) > 88
    assert torch.equal(weights[:, :190], torch.full((1, 190), 1.2, dtype=dtype))
    weights, history = weights_of(torch.full((1, 200), -20.0, dtype=dtype))
    assert float(history[0, 0]) < -900
    assert torch.equal(weights, torch.full((1, 200), 0.8, dtype=dtype))


def test_nan_under_the_mask_is_not_hidden_by_the_filter() -> None:
    delta = torch.zeros(1, 6)
    delta[0, 3] = torch.nan
    weights, history = weights_of(delta)
    assert history[0].isnan().tolist() == weights[0].isnan().tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("shape", [(4, 1), (1, 6), (6,), (4, 7)])
def test_advantages_of_another_shape_are_refused_and_not_spread(shape: tuple[int, ...]) -> None:
    message = f"advantages have shape {re.escape(str(shape))}, but must have the log-probs' " + r"\(4, 6\)"
    with pytest.raises(ValueError, match=message):
        weights_of(torch.zeros(4, 6), torch.ones(shape))


def test_entries_outside_the_mask_are_never_read() -> None:
    delta, mask = random_shifts(4, 100)
    advantages = torch.randn(4, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    clean = influence_weights(torch.where(mask, delta, 0), torch.where(mask, advantages, 0), mask, **PRESET)
    for garbage in (torch.nan, torch.inf, -torch.inf, 1e30):
        dirty = influence_weights(
            torch.where(mask, delta, garbage), torch.where(mask, advantages, garbage), mask, **PRESET
        )
        assert torch.equal(dirty[0], clean[0])
        assert torch.equal(dirty[1], clean[1])
