"""The update's metrics: exact over several micro-batches, and each definition on a case worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megatron_fipo.config import FIPOSettings, PPOSettings
from megatron_fipo.losses import (
    LOSSES,
    collect_token_stats,
    dapo_loss,
    fipo_loss,
    update_histograms,
    update_metrics,
)

SETTINGS = FIPOSettings(influence_low=0.8, influence_high=1.2, safety_threshold=3.0, semantics="released")


def noisy_batch(num_rows: int, length: int, *, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shifts = 1.2 * torch.randn(num_rows, length, generator=generator)
    mask = torch.rand(num_rows, length, generator=generator) < 0.7
    mask[2] = False
    return shifts, torch.zeros_like(shifts), torch.randn(num_rows, length, generator=generator), mask


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("loss_agg", ["token-mean", "seq-mean-token-mean"])
def test_metrics_over_micro_batches_are_those_of_the_whole(name: str, loss_agg: str) -> None:
    settings = FIPOSettings(**{**vars(SETTINGS), "loss_agg": loss_agg})
    batch = noisy_batch(6, 300)
    _, whole = LOSSES[name](*batch, settings)
    parts = []
    for rows in ([5], [0, 3], [2], [1, 4]):  # one of them without any response token
        packed = [tensor[rows].flatten() for tensor in batch]
        offsets = torch.arange(len(rows) + 1, dtype=torch.int32) * 300
        parts.append(LOSSES[name](*packed, settings, cu_seqlens=offsets, denominator=1)[1]["token_stats"])
    found = update_metrics(collect_token_stats(parts), settings)
    wanted = {key: value for key, value in whole.items() if isinstance(value, float)}
    assert found == pytest.approx(wanted, rel=1e-6 if name == "pg_loss" else 1e-7)
    in_order = update_metrics(collect_token_stats([whole["token_stats"]]), settings)
    assert in_order == wanted
    for key in ("neg_is_p75", "neg_is_max", "pos_is_median", "pos_is_p995", "neg_ratio_2_3", "pg_clipfrac"):
        assert wanted[key] > 0  # the case says something about every kind


def test_ratio_bands_and_extremes_are_fractions_of_all_response_tokens() -> None:
    ratios = torch.tensor([[2.0, 2.999, 3.0, 4.0, 9.99, 10.0, 50.0, 1.0, 9.9e-4, 1.1e-3]], dtype=torch.float64)
    zeros, ones = torch.zeros_like(ratios), torch.ones_like(ratios)
    _, info = dapo_loss(ratios.log() + 1e-12, zeros, -ones, ones, PPOSettings())
    bands = {key: info[key] for key in ("neg_ratio_2_3", "neg_ratio_3_4", "neg_ratio_4_10", "pos_mini_frac")}
    assert bands == pytest.approx(
        {"neg_ratio_2_3": 0.2, "neg_ratio_3_4": 0.1, "neg_ratio_4_10": 0.2, "pos_mini_frac": 0.0}, abs=1e-7
    )
    assert info["neg_is_max"] == pytest.approx(50.0)
    assert info["pos_is_max"] == info["pos_is_median"] == 0.0
    _, info = dapo_loss(ratios.log() + 1e-12, zeros, ones, ones, PPOSettings())
    assert info["pos_mini_frac"] == pytest.approx(0.1)
    assert info["pos_is_min"] == pytest.approx(9.9e-4)
    assert info["neg_ratio_2_3"] == info["neg_is_max"] == 0.0
    _, info = dapo_loss(ratios.log() + 1e-12, zeros, -ones, ones, PPOSettings(dual_clip=None))
    assert info["neg_ratio_4_10"] == pytest.approx(0.4)


def test_quantiles_are_linear() -> None:
    ratios = torch.tensor([[1.0, 2.0, 3.0, 5.0]], dtype=torch.float64)
    ones = torch.ones_like(ratios)
    _, info = dapo_loss(ratios.log(), 0 * ones, ones, ones, PPOSettings())
    names = ("pos_is_min", "pos_is_p25", "pos_is_median", "pos_is_p75", "pos_is_p995", "pos_is_p999", "pos_is_max")
    assert [info[name] for name in names] == pytest.approx([1.0, 1.75, 2.5, 3.5, 4.97, 4.994, 5.0])


def test_ppo_kl_and_future_kl_statistics() -> None:
    shifts = torch.tensor([[0.1, -0.3, 9.0]], dtype=torch.float64)
    ones = torch.ones_like(shifts)
    mask = torch.tensor([[True, True, False]])
    _, info = fipo_loss(shifts, 0 * ones, ones, mask, FIPOSettings(half_life=1.0))
    assert info["ppo_kl"] == pytest.approx(0.1, rel=1e-7)
    # F = 0.1 - 0.15, -0.3
    assert info["future_kl_mean"] == pytest.approx(-0.175, rel=1e-7)
    assert info["future_kl_std"] == pytest.approx(0.125, rel=1e-7)
    assert (info["future_kl_min"], info["future_kl_max"]) == pytest.approx((-0.3, -0.05))
    assert info["influence_weights_mean_raw"] == pytest.approx((math.exp(-0.05) + math.exp(-0.3)) / 2, rel=1e-7)


def test_weights_at_a_bound_count_as_clipped_in_fp32_too() -> None:
    for dtype in (torch.float32, torch.float64):
        shifts = torch.tensor([[1.0], [-1.0], [0.0], [0.1]], dtype=dtype)
        ones = torch.ones_like(shifts)
        _, info = fipo_loss(shifts, 0 * ones, ones, ones, SETTINGS)
        ratios = [info[f"IW_{name}_clip_ratio"] for name in ("overall", "upper", "lower")]
        assert ratios == pytest.approx([0.5, 0.25, 0.25])


def test_algorithms_without_influence_weights_report_none() -> None:
    batch = noisy_batch(4, 20)
    _, info = dapo_loss(*batch, PPOSettings())
    assert not [name for name in info if "influence_weights_" in name or "IW_" in name or "future_kl_" in name]


def test_stats_of_different_algorithms_do_not_mix() -> None:
    batch = noisy_batch(4, 20)
    fipo, dapo = (fn(*batch, SETTINGS)[1]["token_stats"] for fn in (fipo_loss, dapo_loss))
    with pytest.raises(ValueError, match="differ"):
        collect_token_stats([fipo, dapo])
    with pytest.raises(ValueError, match="empty"):
        collect_token_stats([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_histograms_count_every_response_token_once_whatever_its_value(dtype: torch.dtype) -> None:
    shifts, old, advantages, mask = noisy_batch(6, 300)
    shifts[0, :2], mask[0, :2] = torch.tensor([15.0, -15.0]), True
    _, info = fipo_loss(shifts.to(dtype), old.to(dtype), advantages.to(dtype), mask, SETTINGS)
    stats = info["token_stats"]
    found = update_histograms(stats, SETTINGS)
    assert json.loads(json.dumps(found)) == found
    ratio, weights = found["ratio_histogram"], found["influence_weights_histogram"]
    for histogram in found.values():
        assert sum(histogram["counts"]) == int(mask.sum())
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1
        assert histogram["edges"] == sorted(histogram["edges"])
    assert (weights["edges"][0], weights["edges"][-1]) == (0.8, 1.2)
    # many weights of so noisy a batch lie on a bound: in the outer bins, however they were rounded
    assert weights["counts"][-1] >= int((stats["influence_weights"] >= 1.2 - 1e-6).sum()) > 0
    assert weights["counts"][0] >= int((stats["influence_weights"] <= 0.8 + 1e-6).sum()) > 0
    beyond = stats["shift"].double().exp() > ratio["edges"][-2]
    assert ratio["counts"][-1] == int(beyond.sum()) > 0
    middle = len(ratio["counts"]) // 2
    assert ratio["edges"][middle] < 1 < ratio["edges"][middle + 1]


def test_algorithms_without_influence_weights_have_no_histogram_of_them() -> None:
    _, info = dapo_loss(*noisy_batch(4, 20), PPOSettings())
    assert list(update_histograms(info["token_stats"], PPOSettings())) == ["ratio_histogram"]
