"""A checkpoint resumes bit for bit in its layout, to rounding in any other, and refuses what is not its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_on_ranks import (
    NUM_STEPS,
    NUM_UPDATES,
    SAVED_STEP,
    WARMUP_UPDATES,
    run_both_ways,
    run_checks,
    run_expert_checks,
)
from processes import run_ranks
from tiny_models import save_model

TWO_RANKS: dict[str, dict[str, Any]] = {
    "dp2 bf16": {"layout": {}, "bf16": True, "is_async": True},
    "pp2 tied bf16": {"layout": {"pp": 2}, "bf16": True},
    "tp2 fp32": {"layout": {"tp": 2}, "bf16": False, "is_async": True},
    "tp2 sp bf16": {"layout": {"tp": 2, "sp": True}, "bf16": True},
    "pp2 vpp2 bf16": {"layout": {"pp": 2, "vpp": 2}, "bf16": True, "is_async": True},
    "cp2 bf16": {"layout": {"cp": 2}, "bf16": True},
}
ONE_RANK: dict[str, dict[str, Any]] = {"one rank fp32": {"layout": {}, "bf16": False}}


RESHARDED = "tp2 fp32"
EXPERTS: dict[str, dict[str, Any]] = {
    "ep2 fp32": {"layout": {"ep": 2}, "bf16": False, "is_async": True},
    "tp2 sp fp32": {"layout": {"tp": 2, "sp": True}, "bf16": False},
}
EXPERTS_RESHARDED: dict[str, list[dict[str, Any]]] = {  # the first is the layout that saved
    "ep2 fp32": [{"ep": 2}, {"pp": 2}, {"tp": 2, "sp": True}, {}],
    "tp2 sp fp32": [{"tp": 2, "sp": True}, {"ep": 2}, {"tp": 2, "sp": True, "ep": 2, "etp": 1}],
}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What every rank found, on two ranks and on one, which loads what two wrote."""
    directory = tmp_path_factory.mktemp("checkpoints")
    save_model(directory / "model", "qwen2", tied=True)
    save_model(directory / "other", "qwen3", tied=True)
    (directory / "not a directory").write_text("")
    shared = {"model_dir": str(directory / "model"), "roots": str(directory), "reshard_from": RESHARDED}
    two = {
        "cases": TWO_RANKS,
        "reshard_to": [{"tp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"cp": 2}, {}],
        "other_model_dir": str(directory / "other"),
    }
    one = {"cases": ONE_RANK, "reshard_to": [{}], "other_model_dir": None}
    return {num: run_ranks(directory, num, run_checks, {**shared, **wanted}) for num, wanted in ((2, two), (1, one))}


@pytest.fixture(scope="module")
def resumed(on_ranks: dict[int, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The outcome of every case on rank 0."""
    return {**on_ranks[2][0], **on_ranks[1][0]}


@pytest.mark.parametrize("case", [*ONE_RANK, *TWO_RANKS])
def test_a_resumed_run_is_the_undisturbed_one_to_the_last_bit(resumed: dict[str, Any], case: str) -> None:
    outcome = resumed[case]
    assert outcome["same_layout"]
    assert outcome["num_tensors"] > 20
    assert outcome["saving_disturbs"] == []
    assert outcome["differences"] == []
    assert outcome["metrics_equal"]
    is_async = {**ONE_RANK, **TWO_RANKS}[case].get("is_async", False)
    assert outcome["latest"] == ["nothing" if is_async else "step_0000001", "step_0000001"]
    assert outcome["state"]["step"] == SAVED_STEP
    assert outcome["state"]["trainer"] == {"position": 7}


@pytest.mark.parametrize("case", [*ONE_RANK, *TWO_RANKS])
def test_no_rank_gathers_what_others_hold_of_the_optimizer(resumed: dict[str, Any], case: str) -> None:
    assert resumed[case]["gathered"] == [[], []]


def test_data_parallel_ranks_share_out_the_optimizer_state(resumed: dict[str, Any]) -> None:
    """Of 14 bytes a parameter the second rank writes 6: its half of masters and moments."""
    for case in ("dp2 bf16", "cp2 bf16"):
        first, second = resumed[case]["bytes_written"]
        assert second / (first + second) == pytest.approx(6 / 14, abs=0.04)


def test_the_warm_up_crosses_the_checkpoint(resumed: dict[str, Any]) -> None:
    lrs = resumed["one rank fp32"]["lrs"]
    assert len(lrs) == NUM_STEPS * NUM_UPDATES
    assert lrs[SAVED_STEP * NUM_UPDATES] < lrs[WARMUP_UPDATES] == lrs[-1]


def test_a_checkpoint_is_loaded_in_other_layouts(on_ranks: dict[int, list[dict[str, Any]]]) -> None:
    same, *others = on_ranks[2][0]["resharded"]
    assert same["same_layout"]
    for other in (*others, *on_ranks[1][0]["resharded"]):
        assert not other["same_layout"]
        assert other["parameters"].keys() == same["parameters"].keys()
        for name, value in same["parameters"].items():
            assert (other["parameters"][name] - value).abs().max() <= 1e-6, name


def test_every_rank_learns_why_a_checkpoint_is_refused(on_ranks: dict[int, list[dict[str, Any]]]) -> None:
    for found in on_ranks[2]:
        errors = found["refusals"]
        assert "is of another model: its family is 'qwen2', but this run's" in errors["model"]
        assert "was trained with lr_warmup_steps 4, but this run's flags say 0" in errors["schedule"]
        assert "not a directory" in errors["write"]
        assert ".distcp was changed: its SHA-256" in errors["damage"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 of two found with a mixture of experts."""
    directory = tmp_path_factory.mktemp("experts")
    save_model(directory / "model", "qwen3_moe", tied=False)
    kwargs = {"model_dir": str(directory / "model"), "roots": str(directory)}
    return run_ranks(directory, 2, run_expert_checks, {**kwargs, "cases": EXPERTS, "reshard_to": EXPERTS_RESHARDED})[0]


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_resume_to_the_last_bit_and_move_between_layouts(experts: dict[str, Any], case: str) -> None:
    outcome = experts[case]
    assert outcome["same_layout"]
    assert outcome["saving_disturbs"] == []
    assert outcome["differences"] == []
    assert outcome["metrics_equal"]
    same, *others = experts["resharded"][case]
    assert same["same_layout"]
    for other in others:
        assert not other["same_layout"]
        assert other["parameters"].keys() == same["parameters"].keys()
        for name, value in same["parameters"].items():
            assert (other["parameters"][name] - value).abs().max() <= 1e-6, name


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A grid of two by two in bf16, saved both ways: on every rank."""
    directory = tmp_path_factory.mktemp("four")
    save_model(directory / "model", "qwen2", tied=True)
    kwargs = {"model_dir": str(directory / "model"), "roots": str(directory), "layout": {"tp": 2, "pp": 2}}
    return run_ranks(directory, 4, run_both_ways, {**kwargs, "saved_step": SAVED_STEP}, timeout_s=400)


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_grid_of_tensor_and_pipeline_ranks_resumes_to_the_last_bit(
    four_ranks: list[dict[str, Any]], way: str
) -> None:
    for found in four_ranks:
        assert found[way]["same_layout"]
        assert found[way]["saving_disturbs"] == []
        assert found[way]["differences"] == []
        assert found[way]["metrics_equal"]


def test_an_asynchronous_save_writes_the_same_bytes(four_ranks: list[dict[str, Any]]) -> None:
    found = four_ranks[0]
    assert found["unlike"] == []
    shards = [name for name in found["names"] if name.endswith(".distcp")]
    assert shards == [f"__{rank}_{part}.distcp" for rank in range(4) for part in range(2)]


def test_a_save_before_the_first_update_resumes_to_the_last_bit(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "qwen2", tied=True)
    kwargs = {"model_dir": str(tmp_path / "model"), "roots": str(tmp_path), "layout": {}, "saved_step": 0}
    (found,) = run_ranks(tmp_path, 1, run_both_ways, kwargs, timeout_s=300)
    for way in ("sync", "async"):
        assert found[way]["saving_disturbs"] == []
        assert found[way]["differences"] == []
        assert found[way]["metrics_equal"]
