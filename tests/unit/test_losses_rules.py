"""Single rules of the losses, each on a case small enough to work out by hand: clip, dual clip, safety, drop, range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo.config import FIPOSettings, PPOSettings
from megatron_fipo.losses import dapo_loss, fipo_loss


def one_token(ratio: float, advantage: float, settings: PPOSettings) -> tuple[float, float, dict[str, Any]]:
    """Loss and gradient of a single token of DAPO."""
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    loss, info = dapo_loss(logprobs, 0 * one, advantage * one, one, settings)
    loss.backward()
    return float(loss.detach()), float(logprobs.grad), info


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 1.0, -1.1, -1.1),
        (1.3, 1.0, -1.28, 0.0),  # clipped above
        (0.5, 1.0, -0.5, -0.5),
        (0.9, -1.0, 0.9, 0.9),
        (0.5, -1.0, 0.8, 0.0),  # clipped below
        (9.0, -1.0, 9.0, 9.0),
        (11.0, -1.0, 10.0, 0.0),  # dual clip
        (11.0, -2.0, 20.0, 0.0),
        (11.0, 1.0, -1.28, 0.0),  # dual clip leaves A > 0 alone
        (5.0, 0.0, 0.0, 0.0),
    ],
)
def test_clip_and_dual_clip(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    found = one_token(ratio, advantage, PPOSettings())
    assert found[:2] == (pytest.approx(loss, abs=1e-12), pytest.approx(gradient, abs=1e-12))
    assert found[2]["pg_clipfrac_lower"] == pytest.approx(float(ratio > 10 and advantage < 0), abs=1e-7)


def test_dual_clip_switched_off() -> None:
    assert one_token(11.0, -1.0, PPOSettings(dual_clip=None))[:2] == (pytest.approx(11.0), pytest.approx(11.0))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_shifts_are_clamped_to_twenty(sign: float) -> None:
    logprobs = torch.tensor([[sign * 20.5, sign * 19.5]], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 2, dtype=torch.float64)
    # no clip takes part where A r is the worse side: A < 0 above the range, A > 0 below it
    settings = PPOSettings(dual_clip=None)
    loss, info = dapo_loss(logprobs, 0 * ones, -sign * ones, ones, settings, denominator=1)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(sign * (math.exp(sign * 20) + math.exp(sign * 19.5)), rel=1e-12)
    assert logprobs.grad.tolist()[0] == pytest.approx([0.0, sign * math.exp(sign * 19.5)], rel=1e-12, abs=0)
    assert info["ppo_kl"] == pytest.approx(-sign * 19.75)


def rows_with_dual_clipped(counts: list[int], length: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row i holds counts[i] tokens of ratio e^3 and A = -1."""
    shifts = torch.zeros(len(counts), length, dtype=torch.float64)
    for row, count in enumerate(counts):
        shifts[row, :count] = 3.0
    ones = torch.ones_like(shifts)
    return shifts, torch.zeros_like(shifts), -ones, ones.bool()


def test_drop_fires_at_two_dual_clipped_tokens_in_released_only() -> None:
    batch = rows_with_dual_clipped([0, 1, 2, 5])
    for semantics, kept in (("released", [True, True, False, False]), ("paper", [True] * 4)):
        for mask in (batch[3], batch[3].double(), batch[3].int()):
            loss, info = fipo_loss(*batch[:3], mask, FIPOSettings(semantics=semantics))  # type: ignore[arg-type]
            assert info["loss_mask"].bool().all(1).tolist() == info["loss_mask"].bool().any(1).tolist() == kept
            assert int(info["num_kept"]) == 12 * sum(kept)
            assert info["pg_clipfrac_lower"] == pytest.approx(8 / 48)  # metrics look at the mask before the drop
            clipped = 1 if semantics == "released" else 8
            assert float(loss) == pytest.approx((10 * clipped + 12 * sum(kept) - clipped) / (12 * sum(kept)))
    assert dapo_loss(*batch, PPOSettings())[1]["loss_mask"].all()


def test_drop_counts_response_tokens_with_negative_advantage_only() -> None:
    shifts, old, advantages, mask = rows_with_dual_clipped([2, 2, 2])
    mask[0, 0] = False
    advantages[1, 0] = 1.0
    _, info = fipo_loss(shifts, old, advantages, mask, FIPOSettings(semantics="released"))
    assert info["loss_mask"].any(1).tolist() == [True, True, False]


def test_drop_stays_within_its_packed_sequence() -> None:
    shifts, old, advantages, mask = (tensor.flatten() for tensor in rows_with_dual_clipped([1, 1, 3, 0]))
    offsets = torch.tensor([0, 12, 12, 24, 36, 48], dtype=torch.int32)
    settings = FIPOSettings(semantics="released")
    _, info = fipo_loss(shifts, old, advantages, mask, settings, cu_seqlens=offsets)
    assert info["loss_mask"].view(4, 12).any(1).tolist() == [True, True, False, True]


@pytest.mark.parametrize("loss_agg", ["seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_a_dropped_sequence_still_counts_in_the_mean_over_sequences(loss_agg: Any) -> None:
    batch = rows_with_dual_clipped([0, 2, 2, 2])
    loss, info = fipo_loss(*batch, FIPOSettings(semantics="released", loss_agg=loss_agg))
    assert int(info["num_kept"]) == 4
    assert float(loss) == pytest.approx({"seq-mean-token-sum": 12 / 4}.get(loss_agg, 1 / 4))


def test_everything_dropped_gives_zero_and_no_gradient() -> None:
    shifts, old, advantages, mask = rows_with_dual_clipped([2, 3])
    for loss_agg in ("token-mean", "seq-mean-token-mean"):
        logprobs = shifts.clone().requires_grad_()
        settings = FIPOSettings(semantics="released", loss_agg=loss_agg)  # type: ignore[arg-type]
        loss, info = fipo_loss(logprobs, old, advantages, mask, settings)
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert info["pg_loss"] == 0.0
        assert torch.equal(logprobs.grad, torch.zeros_like(shifts))


@pytest.mark.parametrize(("semantics", "weights"), [("paper", [1.0, 1.0]), ("released", [0.8, 1.0])])
def test_safety_rule_scales_the_gradient_of_unsafe_tokens(semantics: Any, weights: list[float]) -> None:
    """At s = 3 an unsafe token (A < 0, r = 4) still has a gradient, and the two semantics differ in it."""
    settings = FIPOSettings(semantics=semantics, influence_low=0.8, influence_high=1.2, safety_threshold=3.0)
    shift = math.log(4.0)
    logprobs = torch.tensor([[shift, -9.0], [shift, 0.0]], dtype=torch.float64, requires_grad=True)
    ones = torch.ones_like(logprobs).detach()
    loss, info = fipo_loss(logprobs, 0 * ones, -ones, ones, settings, denominator=1)
    loss.backward()
    assert info["influence_weights"][:, 0].tolist() == pytest.approx(weights)
    assert logprobs.grad[:, 0].tolist() == pytest.approx([4.0 * weight for weight in weights])


def test_thirty_two_b_preset_gradients_do_not_depend_on_the_safety_rule() -> None:
    """s = c: an unsafe token is dual-clipped and has no gradient anyway."""
    shifts, old, advantages, mask = rows_with_dual_clipped([0, 1, 1])
    gradients = []
    for semantics in ("paper", "released"):
        logprobs = shifts.clone().requires_grad_()
        fipo_loss(logprobs, old, advantages, mask, FIPOSettings(semantics=semantics))[0].backward()  # type: ignore[arg-type]
        gradients.append(logprobs.grad)
    assert torch.equal(*gradients)
    assert gradients[0][1].tolist() == pytest.approx([0.0] + [1 / 36] * 11)


@pytest.mark.parametrize("shift", [2.0, -20.0, 20.0])
def test_long_fp32_responses_overflow_nowhere(shift: float) -> None:
    logprobs = torch.full((2, 200), shift, requires_grad=True)
    ones = torch.ones(2, 200)
    ones[1] = -1
    for semantics in ("paper", "released"):
        loss, info = fipo_loss(
            logprobs, torch.zeros(2, 200), ones, torch.ones(2, 200), FIPOSettings(semantics=semantics)
        )  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert all(math.isfinite(value) for value in info.values() if isinstance(value, float))
    if shift == 2.0:
        assert info["future_kl_max"] > 88
        assert info["raw_influence_weights_max"] == torch.finfo(torch.float32).max
        assert info["influence_weights_max"] == pytest.approx(1.2)
        assert 1e38 / 200 < info["influence_weights_mean_raw"] <= torch.finfo(torch.float32).max


def test_raw_weights_saturate_where_float64_overflows_too() -> None:
    logprobs, zeros, ones = torch.full((1, 5000), 2.0).double(), torch.zeros(1, 5000), torch.ones(1, 5000)
    _, info = fipo_loss(logprobs, zeros, ones, ones, FIPOSettings(half_life=1000.0))
    assert info["future_kl_max"] > 710
    assert info["raw_influence_weights_max"] == torch.finfo(torch.float32).max
    assert math.isfinite(info["influence_weights_mean_raw"])
