"""Token weights from the two log-probs of a token, the KL estimate, and what is logged about both."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_fipo.config import LOSS_SETTINGS, CorrectionSettings, PPOSettings
from megatron_fipo.losses import (
    LOSSES,
    collect_token_stats,
    correction_metrics,
    correction_weights,
    dapo_loss,
    update_metrics,
)
from megatron_fipo.losses.kl import kl_estimates

TIS = CorrectionSettings(use_tis=True, tis_clip=2.0, tis_clip_low=0.5)
ICEPOP = CorrectionSettings(use_icepop=True, icepop_low=0.5, icepop_high=5.0)
RATIOS = torch.tensor([0.1, 0.6, 1.0, 1.9, 2.1, 4.5, 6.0, 1e30])
ALL = torch.ones(8, dtype=torch.bool)


def test_tis_truncates_the_ratio_of_trainer_over_engine() -> None:
    found = correction_weights(RATIOS.log(), torch.zeros(8), ALL, TIS)
    assert found is not None
    torch.testing.assert_close(found[0], torch.tensor([0.5, 0.6, 1.0, 1.9, 2.0, 2.0, 2.0, 2.0]))
    assert correction_metrics(found[1], TIS) == pytest.approx(
        {
            "tis/mean": 12.0 / 8,
            "tis/min": 0.5,
            "tis/max": 2.0,
            "tis/clip_low_frac": 1 / 8,
            "tis/clip_high_frac": 4 / 8,
        },
        rel=1e-6,
    )


def test_icepop_drops_what_is_out_of_bounds_and_keeps_the_ratio_inside() -> None:
    found = correction_weights(RATIOS.log(), torch.zeros(8), ALL, ICEPOP)
    assert found is not None
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.6, 1.0, 1.9, 2.1, 4.5, 0.0, 0.0]))
    assert correction_metrics(found[1], ICEPOP) == pytest.approx(
        {
            "icepop/mean": 10.1 / 8,
            "icepop/masked_frac": 3 / 8,
            "icepop/masked_low_frac": 1 / 8,
            "icepop/masked_high_frac": 2 / 8,
        },
        rel=1e-6,
    )


def test_without_a_correction_there_is_neither_weight_nor_metric() -> None:
    assert correction_weights(RATIOS.log(), torch.zeros(8), ALL, CorrectionSettings(kl_coef=0.1)) is None
    assert correction_metrics({}, CorrectionSettings()) == {}


@pytest.mark.parametrize("correction", [TIS, ICEPOP])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_broken_logprob_makes_a_broken_weight_and_is_not_read_off_the_mask(
    correction: CorrectionSettings, value: float, which: int
) -> None:
    logprobs = [torch.zeros(8), torch.zeros(8)]
    logprobs[which][3] = value
    found = correction_weights(*logprobs, ALL, correction)
    assert found is not None
    assert found[0].isnan().tolist() == [i == 3 for i in range(8)]
    found = correction_weights(*logprobs, ALL & (torch.arange(8) != 3), correction)
    assert found is not None
    assert found[0].tolist() == [1.0] * 8
    assert len(found[1]["correction_ratio"]) == 7


@pytest.mark.parametrize("correction", [TIS, ICEPOP])
def test_weight_metrics_over_micro_batches_are_those_of_the_whole(correction: CorrectionSettings) -> None:
    generator = torch.Generator().manual_seed(0)
    old, rollout = torch.randn(2, 300, generator=generator)
    mask = torch.rand(300, generator=generator) < 0.7
    mask[100:200] = False
    parts = [
        correction_weights(*(x[start : start + 100] for x in (old, rollout, mask)), correction)
        for start in (200, 0, 100)
    ]
    whole = correction_weights(old, rollout, mask, correction)
    assert whole is not None
    collected = collect_token_stats([part[1] for part in parts if part is not None])
    assert correction_metrics(collected, correction) == pytest.approx(correction_metrics(whole[1], correction))
    empty = correction_weights(old, rollout, torch.zeros_like(mask), correction)
    assert empty is not None
    assert set(correction_metrics(empty[1], correction).values()) == {0.0}


def test_the_kl_estimate_is_k3_and_its_gradient_is_that_of_the_formula() -> None:
    difference = torch.tensor([0.0, 1e-6, -1e-6, 0.5, -2.0, 19.0, 25.0, -25.0, 3.0], dtype=torch.float64)
    logprobs = (-difference).requires_grad_()
    kl = kl_estimates(logprobs, torch.zeros(9, dtype=torch.float64), torch.arange(9) < 8)
    bounded = difference.clamp(-20, 20).tolist()
    # by its series near 0, where the formula as written loses all digits
    wanted = [x * x / 2 * (1 + x / 3) if abs(x) < 1e-3 else math.exp(x) - x - 1 for x in bounded[:8]]
    assert kl.tolist() == pytest.approx([*wanted, 0.0], rel=1e-9, abs=1e-21)
    kl.sum().backward()
    assert logprobs.grad is not None
    slopes = [-math.expm1(x) if abs(x) < 20 else 0.0 for x in bounded[:8]]
    assert logprobs.grad.tolist() == pytest.approx([*slopes, 0.0], rel=1e-9)


def test_the_kl_estimate_of_fp32_logprobs_keeps_its_digits() -> None:
    logprobs = torch.tensor([-1.0, -3.0])
    reference = logprobs + torch.tensor([2.0**-12, -(2.0**-12)])
    wanted = [x * x / 2 + x**3 / 6 + x**4 / 24 for x in (reference.double() - logprobs.double()).tolist()]
    found = kl_estimates(logprobs, reference, torch.ones(2, dtype=torch.bool))
    assert found.tolist() == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("loss_agg", ["token-mean", "seq-mean-token-mean"])
def test_the_kl_metric_is_the_mean_over_the_response_and_no_part_of_pg_loss(loss_agg: Any) -> None:
    zeros = torch.zeros(2, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    reference = torch.tensor([[1.0, 1, 1, 9], [2, 9, 9, 9]], dtype=torch.float64)
    settings = PPOSettings(loss_agg=loss_agg)
    one, two = math.e - 2, math.exp(2) - 3
    loss, info = dapo_loss(zeros, zeros, zeros, mask, settings, reference_logprobs=reference, kl_coef=0.5)
    mean = (3 * one + two) / 4
    assert info["kl_loss"] == pytest.approx(mean)
    assert info["pg_loss"] == 0.0
    assert float(loss) == pytest.approx(0.5 * (mean if loss_agg == "token-mean" else (one + two) / 2))
    parts = [
        dapo_loss(
            *(x[rows] for x in (zeros, zeros, zeros, mask)),
            settings,
            reference_logprobs=reference[rows],
            kl_coef=0.5,
            denominator=1,
        )[1]["token_stats"]
        for rows in ([1], [0])
    ]
    assert update_metrics(collect_token_stats(parts), settings)["kl_loss"] == pytest.approx(mean)


@pytest.mark.parametrize("name", LOSSES)
def test_bad_weights_and_references_are_named(name: str) -> None:
    ones = torch.ones(2, 3)
    for options, message in (
        ({"token_weights": ones[0]}, r"token_weights has shape \(3,\)"),
        ({"reference_logprobs": ones[0]}, r"reference_logprobs has shape \(3,\)"),
        ({"kl_coef": 0.1}, "kl_coef is 0.1, but must be 0, or a number > 0 with reference_logprobs"),
        ({"kl_coef": -0.1, "reference_logprobs": ones}, "kl_coef is -0.1"),
        ({"kl_coef": math.nan, "reference_logprobs": ones}, "kl_coef is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            LOSSES[name](ones, ones, ones, ones, LOSS_SETTINGS[name], **options)
