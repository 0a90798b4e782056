"""An actor that leaves the device and comes back is the one that stayed, to the last bit, and says when it is away."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from offload_on_ranks import run_cases
from processes import run_ranks
from tiny_models import save_model

from megatron_fipo.actor.offload import Offloader


def case(model: str = "dense", *, keep: bool = False, layout: dict[str, Any] | None = None, **options: Any) -> Any:
    return {"model": model, "layout": layout or {}, "options": options, "keep": keep}


TWO_RANKS = {
    "tp2 bf16": case(layout={"tp": 2}, bf16=True),
    "tp2 sp fp32": case(layout={"tp": 2, "sp": True}, keep=True),
    "pp2 tied bf16": case(layout={"pp": 2}, bf16=True, keep=True),
    "pp2 vpp2 tied bf16": case(layout={"pp": 2, "vpp": 2}, bf16=True),
    "dp2 fp32": case(),
    "dp2 bf16 overlapping": case(bf16=True, overlap=True),
    "dp2 bf16 without distributed optimizer": case(bf16=True, distributed_optimizer=False, keep=True),
    "ep2 bf16": case("experts", layout={"ep": 2}, bf16=True, keep=True),
}
ONE_RANK = {
    "one rank bf16": case(bf16=True),
    "one rank fp32": case(keep=True),
    "one rank fp32 without distributed optimizer": case(distributed_optimizer=False),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Per case, what every rank found."""
    directory = tmp_path_factory.mktemp("offload")
    save_model(directory / "dense", "qwen2", tied=True)
    save_model(directory / "experts", "qwen3_moe", tied=False)
    model_dirs = {name: str(directory / name) for name in ("dense", "experts")}
    outcomes: dict[str, list[dict[str, Any]]] = {}
    for num_ranks, cases in ((1, ONE_RANK), (2, TWO_RANKS)):
        ranks = run_ranks(directory, num_ranks, run_cases, {"model_dirs": model_dirs, "cases": cases}, timeout_s=400.0)
        outcomes |= {name: [rank[name] for rank in ranks] for name in cases}
    return outcomes


@pytest.mark.parametrize("name", [*ONE_RANK, *TWO_RANKS])
def test_what_comes_back_is_what_left(found: dict[str, list[dict[str, Any]]], name: str) -> None:
    for rank in found[name]:
        assert rank["changed"] == []


@pytest.mark.parametrize("name", [*ONE_RANK, *TWO_RANKS])
def test_updates_after_coming_back_are_those_of_an_actor_that_stayed(
    found: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for rank in found[name]:
        assert rank["differences"] == []
        assert rank["exports_agree"]
        assert all(number > 10 for number in rank["num_tensors"].values())
    metrics = found[name][0]["metrics"]
    assert [still for still, _ in metrics] == [moved for _, moved in metrics]
    assert all(math.isfinite(still) for still, _ in metrics)
    assert len({still for still, _ in metrics}) == 3


@pytest.mark.parametrize("name", [*ONE_RANK, *TWO_RANKS])
def test_every_byte_of_parameters_gradients_and_optimizer_leaves(
    found: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for rank in found[name]:
        first, *_, last = rank["bytes"]
        assert last["left"] == last["returned"] == rank["wanted_bytes"]
        assert first["left"]["optimizer"] < last["left"]["optimizer"]  # Adam has no moments before its first step
        assert {part: first["left"][part] for part in ("parameters", "gradients")} == {
            part: last["left"][part] for part in ("parameters", "gradients")
        }


def test_bf16_takes_two_bytes_per_parameter_four_per_gradient_and_twelve_for_the_optimizer(
    found: dict[str, list[dict[str, Any]]],
) -> None:
    left = found["one rank bf16"][0]["bytes"][-1]["left"]
    assert left["gradients"] == 2 * left["parameters"]
    # the flat buffers are padded, the optimizer's shards are not
    assert 0.9 * 6 * left["parameters"] < left["optimizer"] <= 6 * left["parameters"]


@pytest.mark.parametrize("name", [*ONE_RANK, *TWO_RANKS])
def test_an_actor_that_is_away_says_so_instead_of_crashing(found: dict[str, list[dict[str, Any]]], name: str) -> None:
    for rank in found[name]:
        assert len(rank["refusals"]) >= 5
        assert all("the actor's tensors are in main memory while engines generate" in said for said in rank["refusals"])


@pytest.mark.parametrize("name", ["exp_avg_dtype", "exp_avg_sq_dtype"])
def test_moments_in_fp8_are_refused_before_anything_leaves(name: str) -> None:
    """Transformer Engine keeps them in tensors whose own memory is none."""
    dtypes = {"exp_avg_dtype": torch.float32, "exp_avg_sq_dtype": torch.float32, name: torch.uint8}
    optimizer: Any = SimpleNamespace(config=SimpleNamespace(**dtypes))
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is fp8, .* or --no-offload-trainer"):
        Offloader([], optimizer, torch.device("cpu"))
