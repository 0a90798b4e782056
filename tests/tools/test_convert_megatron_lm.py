"""Both ways between the converters and megatron-core itself: what they write any layout loads, what any layout wrote
they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from converting import LLAMA3, assert_same_files, run, save
from processes import run_ranks
from tiny_models import FAMILIES

from megatron_fipo.actor.inspection import inspect
from megatron_fipo.weights.hf_files import HFWeights

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 100, 23, 42]
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "tied": False},
    "llama": {"family": "llama", "tied": False, "rope_parameters": LLAMA3, "head_dim": 14},
    "qwen3_moe": {"family": "qwen3_moe", "tied": False},
}
LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    1: {"one rank": {}},
    2: {"tp2": {"tp": 2}, "pp2": {"pp": 2}},
    4: {"tp2 pp2": {"tp": 2, "pp": 2}},
}
EXPERT_LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    1: {"one rank": {}},
    2: {"ep2": {"ep": 2}},
    4: {"pp2 ep2": {"pp": 2, "ep": 2}},
}
ON_RANKS = "megatron_lm_on_ranks"


def layouts_of(family: str) -> dict[int, dict[str, dict[str, int]]]:
    return EXPERT_LAYOUTS if family == "qwen3_moe" else LAYOUTS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model, and what the converter made of it."""
    directory = tmp_path_factory.mktemp("models")
    for name, fields in MODELS.items():
        source = save(directory / name, **dict(fields))
        assert run("hf_to_megatron", "--hf-checkpoint", source, "--save", directory / f"{name} megatron") == 0
    return directory


@pytest.mark.parametrize("name", MODELS)
def test_megatron_core_loads_the_result_in_every_layout_and_answers_as_transformers_does(
    name: str, models: Path, tmp_path: Path
) -> None:
    model = FAMILIES[MODELS[name]["family"]][1].from_pretrained(models / name, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(torch.tensor(TOKENS)[None]).logits[0]
    assert wanted.std() > 0.3, "logits that say nothing"
    seen = []
    for num_ranks, layouts in layouts_of(name).items():
        kwargs = {
            "hf_dir": str(models / name),
            "checkpoint": str(models / f"{name} megatron" / "release"),
            "layouts": layouts,
            "tokens": TOKENS,
        }
        found = run_ranks(tmp_path, num_ranks, f"{ON_RANKS}:answer_in_layouts", kwargs)
        for layout, logits in found[-1].items():
            seen.append(layout)
            assert torch.allclose(logits, wanted, rtol=0, atol=2e-4 * float(wanted.abs().max())), layout
    assert seen == [layout for layouts in layouts_of(name).values() for layout in layouts]


@pytest.mark.parametrize(
    ("name", "num_ranks", "sizes", "form"),
    [
        ("qwen2", 2, {"tp": 2}, "stacked"),
        ("qwen3", 1, {}, "all apart"),
        ("llama", 4, {"tp": 2, "pp": 2}, "layer by layer"),
        ("qwen3_moe", 2, {"ep": 2}, "stacked"),
        ("qwen3_moe", 1, {}, "all apart"),
    ],
)
def test_what_megatron_lm_saved_comes_back_bit_equal(
    name: str, num_ranks: int, sizes: dict[str, int], form: str, models: Path, tmp_path: Path
) -> None:
    kwargs = {"hf_dir": str(models / name), "save": str(tmp_path), "sizes": sizes, "forms": [form], "changed": {}}
    run_ranks(tmp_path, num_ranks, f"{ON_RANKS}:save_forms", kwargs)
    options = ("--load", tmp_path / form, "--hf-checkpoint", models / name, "--save", tmp_path / "back")
    assert run("megatron_to_hf", *options) == 0
    assert_same_files(tmp_path / "back", models / name)
    found = inspect(tmp_path / form, verify=True)
    assert (found.kind, found.iteration, found.problems) == ("Megatron-LM checkpoint", 123, [])
    assert (found.holds["random states"], found.holds["scheduler"]) == (True, True)
    assert (found.holds["optimizer"] is not None) == (form == "stacked")
    assert found.holds["arguments"]["num_layers"] == 4


def test_what_megatron_lm_says_of_another_model_is_all_listed(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {
        "rotary_base": 50000,
        "norm_epsilon": 1e-5,
        "squared_relu": True,
        "rotary_percent": 0.5,
        "mtp_num_layers": 1,
    }
    kwargs = {"hf_dir": str(models / "qwen2"), "save": str(tmp_path), "sizes": {}, "forms": ["stacked"]}
    run_ranks(tmp_path, 1, f"{ON_RANKS}:save_forms", {**kwargs, "changed": changed})
    options = ("--load", tmp_path / "stacked", "--hf-checkpoint", models / "qwen2", "--save", tmp_path / "back")
    assert run("megatron_to_hf", *options) == 2
    said = capsys.readouterr().err
    for part in (
        "common.pt: args says rotary_base 50000, but config.json makes it 10000",
        "norm_epsilon 1e-05, but config.json makes it 1e-06",
        "rotary_percent 0.5, but config.json makes it 1.0",
        "squared_relu True, which a model of qwen2 does not have",
        "mtp_num_layers 1, which",
    ):
        assert part in said
    assert not (tmp_path / "back").exists()


def test_the_tensors_differ_between_models(models: Path) -> None:
    """What the other tests compare is not constant."""
    weights = HFWeights(models / "qwen2")
    names = [name for name in weights.names if name.endswith("q_proj.weight")]
    assert len({float(weights.read(name).sum()) for name in names}) == len(names)
