"""The authors' released loss, six cases in float64: loss, gradient, Future-KL, weights, drop mask and metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_fipo.config import FIPOSettings
from megatron_fipo.losses import collect_token_stats, fipo_loss, update_metrics

TOLERANCE = 1e-9
NUM_CASES = 6


@pytest.fixture(scope="module")
def golden() -> tuple[Any, list[dict[str, Any]]]:
    arrays = np.load(Path(__file__).parents[1] / "golden" / "fipo_loss.npz")
    cases = json.loads(bytes(arrays["meta_json"]))
    assert len(cases) == NUM_CASES
    return arrays, cases


def settings_of(case: dict[str, Any]) -> FIPOSettings:
    config = case["config"]
    return FIPOSettings(
        clip_low=config["clip_ratio_low"],
        clip_high=config["clip_ratio_high"],
        dual_clip=config["dual_clip"],
        loss_agg=config["loss_agg"],
        half_life=config["half_life"],
        influence_low=config["influence_low"],
        influence_high=config["influence_high"],
        safety_threshold=config["safety_threshold"],
        semantics="released",
    )


def inputs_of(arrays: Any, index: int) -> list[Tensor]:
    return [
        torch.from_numpy(arrays[f"{index}/{name}"])
        for name in ("log_prob", "old_log_prob", "advantages", "response_mask")
    ]


def assert_metrics(info: dict[str, Any], wanted: dict[str, float]) -> None:
    assert {name: info[name] for name in wanted} == pytest.approx(wanted, rel=TOLERANCE, abs=TOLERANCE)


def assert_close(found: Tensor, wanted: Any) -> None:
    torch.testing.assert_close(found.detach(), torch.as_tensor(wanted, dtype=torch.float64), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("index", range(NUM_CASES))
def test_padded_batch_equals_the_released_loss(golden: Any, index: int, fused: bool) -> None:
    arrays, cases = golden
    logprobs, old, advantages, mask = inputs_of(arrays, index)
    logprobs.requires_grad_()
    loss, info = fipo_loss(logprobs, old, advantages, mask, settings_of(cases[index]), fused=fused)
    loss.backward()
    assert_close(loss, cases[index]["metrics"]["pg_loss"])
    assert_close(logprobs.grad, arrays[f"{index}/grad_log_prob"])
    for name in ("future_kl", "influence_weights", "loss_mask"):
        assert_close(info[name], arrays[f"{index}/{name}"])
    assert_metrics(info, cases[index]["metrics"])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("index", range(NUM_CASES))
def test_packed_batch_without_padding_equals_the_released_loss(golden: Any, index: int, fused: bool) -> None:
    arrays, cases = golden
    lengths = arrays[f"{index}/response_mask"].sum(1).astype(int)
    response = torch.from_numpy(arrays[f"{index}/response_mask"]).bool()  # every golden mask is a prefix of its row
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    logprobs, old, advantages, mask = (tensor[response] for tensor in inputs_of(arrays, index))
    logprobs.requires_grad_()
    loss, info = fipo_loss(logprobs, old, advantages, mask, settings_of(cases[index]), cu_seqlens=offsets, fused=fused)
    loss.backward()
    assert_close(loss, cases[index]["metrics"]["pg_loss"])
    assert_close(logprobs.grad, torch.from_numpy(arrays[f"{index}/grad_log_prob"])[response])
    for name in ("future_kl", "influence_weights", "loss_mask"):
        assert_close(info[name], torch.from_numpy(arrays[f"{index}/{name}"])[response])
    assert_metrics(info, cases[index]["metrics"])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("index", range(NUM_CASES))
def test_one_row_at_a_time_adds_up_to_the_released_loss_and_metrics(golden: Any, index: int, fused: bool) -> None:
    arrays, cases = golden
    settings = settings_of(cases[index])
    inputs = inputs_of(arrays, index)
    logprobs = inputs[0].requires_grad_()
    results = [
        fipo_loss(*(tensor[row : row + 1] for tensor in inputs), settings, denominator=1, fused=fused)
        for row in range(len(logprobs))
    ]
    total = sum(int(info["num_kept"]) for _, info in results)
    loss = torch.stack([loss for loss, _ in results]).sum() / total
    loss.backward()
    assert_close(loss, cases[index]["metrics"]["pg_loss"])
    assert_close(logprobs.grad, arrays[f"{index}/grad_log_prob"])
    stats = collect_token_stats([info["token_stats"] for _, info in results])
    assert_metrics(update_metrics(stats, settings), cases[index]["metrics"])


def test_the_cases_exercise_the_drop_the_safety_rule_and_the_filter(golden: Any) -> None:
    arrays, cases = golden
    dropped = [(arrays[f"{i}/response_mask"] != arrays[f"{i}/loss_mask"]).any() for i in range(NUM_CASES)]
    assert sum(dropped) == 2
    for i in (1, 3):  # paper semantics give another loss, so these cases tell the two apart
        paper = FIPOSettings(**{**vars(settings_of(cases[i])), "semantics": "paper"})
        assert abs(float(fipo_loss(*inputs_of(arrays, i), paper)[0]) - cases[i]["metrics"]["pg_loss"]) > 1e-3
