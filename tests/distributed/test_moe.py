"""A mixture of experts: one FIPO update is transformers' on one process, however the experts are spread over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_invariance import NUM_SEQUENCES, assert_same_update, reference, updates_of
from tiny_models import hf_logits, make_sequences, published, save_model

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "ep2": (2, {"ep": 2}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "tp2 sp ep2 etp1": (2, {"tp": 2, "sp": True, "ep": 2, "etp": 1}),
    "ep4": (4, {"ep": 4}),
    "ep2 dp4": (4, {"ep": 2}),
    "ep2 etp2": (4, {"ep": 2, "etp": 2}),
    "tp2 sp ep2": (4, {"tp": 2, "sp": True, "ep": 2}),
    "pp2 ep2": (4, {"pp": 2, "ep": 2}),
    "pp2 vpp2 ep2": (4, {"pp": 2, "vpp": 2, "ep": 2}),
    "cp2 ep2": (2, {"cp": 2, "ep": 2}),
}
CASES: list[dict[str, Any]] = [
    {"semantics": "paper", "budget": 31, "reverse": True, "distributed_optimizer": False},
    {"semantics": "released", "budget": 64},
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen3-moe")
    save_model(directory, "qwen3_moe", tied=False)
    return directory


@pytest.fixture(scope="module")
def references(model_dir: Path) -> dict[str, dict[str, Any]]:
    found = {semantics: reference(model_dir, "fipo", semantics) for semantics in ("paper", "released")}
    for outcome in found.values():
        for part in ("gradients", "changes", "before"):
            outcome[part] = published(outcome[part])
    return found


@pytest.fixture(scope="module")
def updates(
    model_dir: Path, references: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    cases = dict.fromkeys(LAYOUTS, CASES)
    return updates_of(LAYOUTS, cases, model_dir, references["paper"]["old"], tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_update_is_the_same_however_the_experts_are_spread(
    layout: str, updates: dict[str, list[dict[str, Any]]], references: dict[str, dict[str, Any]]
) -> None:
    for case, found in zip(CASES, updates[layout]):
        assert_same_update(found, references[case["semantics"]])


def test_no_token_is_near_a_change_of_experts_and_none_is_idle(model_dir: Path) -> None:
    """Routing jumps: were two router logits as near as rounding, layouts could differ without being wrong."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    logits: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: logits.append(output[0].detach()))
    with torch.no_grad():
        for sequence in make_sequences(NUM_SEQUENCES):
            hf_logits(model, sequence)
    best = torch.cat(logits).topk(3, dim=-1)
    assert (best.values[:, 1] - best.values[:, 2]).min() > 1e-4
    assert best.indices[:, :2].unique().tolist() == list(range(8))
