"""One FIPO update equals Hugging Face transformers' on one process, whatever the layout, budget and packing order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from actor_on_ranks import OPTIMIZER, run_layouts, settings_for
from processes import run_ranks
from tiny_models import hf_logprobs, make_old_logprobs, make_sequences, save_model

from megatron_fipo.losses import LOSSES
from megatron_fipo.ops.packing import pack

NUM_SEQUENCES = 16
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "tp2 sp pp2": (4, {"tp": 2, "pp": 2, "sp": True}),
    "pp2 dp2": (4, {"pp": 2}),
    "tp2 sp dp2": (4, {"tp": 2, "sp": True}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "cp2": (2, {"cp": 2}),
    "cp4": (4, {"cp": 4}),
    "tp2 cp2": (4, {"tp": 2, "cp": 2}),
    "tp2 sp cp2": (4, {"tp": 2, "sp": True, "cp": 2}),
    "pp2 cp2": (4, {"pp": 2, "cp": 2}),
    "pp2 vpp2 cp2": (4, {"pp": 2, "vpp": 2, "cp": 2}),
    "cp2 dp2": (4, {"cp": 2}),
    "pp4": (4, {"pp": 4}),
    "tp2 pp2 vpp2": (4, {"tp": 2, "pp": 2, "vpp": 2}),
}
# gradients are compared where every rank holds them whole; the distributed optimizer by what it does to parameters
CASES: list[dict[str, Any]] = [
    {"semantics": "paper", "budget": 64, "distributed_optimizer": False},
    {"semantics": "paper", "budget": 31, "reverse": True},
    {"semantics": "released", "budget": 1000, "reverse": True, "distributed_optimizer": False},
    {"semantics": "released", "budget": 47},
    {"algorithm": "dapo", "budget": 40},
    {"algorithm": "grpo", "budget": 40, "distributed_optimizer": False},
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen2")
    save_model(directory, "qwen2", tied=False)
    return directory


def reference(directory: Path, algorithm: str, semantics: str) -> dict[str, Any]:
    """The same two updates in plain transformers and torch, unpacked, on one process."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    sequences = make_sequences(NUM_SEQUENCES)
    old = make_old_logprobs(model, sequences)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": plain, "weight_decay": 0.0}],
        lr=OPTIMIZER["lr"],
        betas=(0.9, OPTIMIZER["adam_beta2"]),
        eps=OPTIMIZER["adam_eps"],
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result: dict[str, Any] = {"old": old, "metrics": []}
    half = NUM_SEQUENCES // 2
    for start in (0, half):
        members = range(start, start + half)
        batch = pack(sequences, members, old_logprobs=old)
        logprobs = torch.cat([hf_logprobs(model, sequences[i]) for i in members])
        loss, info = LOSSES[algorithm](
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.loss_mask,
            settings_for(algorithm, semantics),
            cu_seqlens=batch.cu_seqlens,
            max_response_len=32,
        )
        model.zero_grad()
        loss.backward()
        if start == 0:
            result["gradients"] = {name: p.grad.clone() for name, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip_grad"])
        optimizer.step()
        result["metrics"].append(
            {"pg_loss": float(loss.detach()), "num_kept": float(info["num_kept"])}
            | {name: float(value) for name, value in info.items() if isinstance(value, (int, float))}
        )
    result["changes"] = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    result["before"] = before
    return result


def assert_same_update(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for metrics, expected in zip(found["metrics"], wanted["metrics"]):
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, abs=2e-5, rel=2e-5), name
    for name, gradient in wanted["gradients"].items():
        if "gradients" in found:
            largest = gradient.abs().max()
            assert (found["gradients"][name] - gradient).abs().max() <= 1e-5 * largest, name
    for name, change in wanted["changes"].items():
        made = found["parameters"][name] - wanted["before"][name]
        assert change.abs().max() > 1e-4, name
        assert (made - change).abs().max() <= 1e-5, name


@pytest.fixture(scope="module")
def references(model_dir: Path) -> dict[tuple[str, str], dict[str, Any]]:
    keys = {(case.get("algorithm", "fipo"), case.get("semantics", "paper")) for case in CASES}
    return {key: reference(model_dir, *key) for key in keys}


def updates_of(
    layouts: dict[str, tuple[int, dict[str, Any]]],
    cases: list[dict[str, Any]],
    model_dir: Path,
    old_logprobs: list[torch.Tensor],
    directory: Path,
) -> dict[str, list[dict[str, Any]]]:
    """What the cases left on rank 0, by layout. Layouts of one number of ranks share their processes."""
    found: dict[str, list[dict[str, Any]]] = {}
    for num_ranks in sorted({num for num, _ in layouts.values()}):
        kwargs = {
            "model_dir": str(model_dir),
            "old_logprobs": old_logprobs,
            "num_sequences": NUM_SEQUENCES,
            "layouts": {name: options for name, (num, options) in layouts.items() if num == num_ranks},
            "cases": cases,
        }
        found |= run_ranks(directory, num_ranks, run_layouts, kwargs, timeout_s=600)[0]
    return found


@pytest.fixture(scope="module")
def updates(
    model_dir: Path, references: dict[tuple[str, str], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    old_logprobs = references["fipo", "paper"]["old"]
    return updates_of(LAYOUTS, CASES, model_dir, old_logprobs, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_update_is_the_same_in_every_layout(
    layout: str, updates: dict[str, list[dict[str, Any]]], references: dict[tuple[str, str], dict[str, Any]]
) -> None:
    for case, found in zip(CASES, updates[layout], strict=True):
        wanted = references[case.get("algorithm", "fipo"), case.get("semantics", "paper")]
        assert_same_update(found, wanted)
        assert ("gradients" in found) == (case.get("distributed_optimizer") is False)


def test_the_cases_exercise_what_they_claim(references: dict[tuple[str, str], dict[str, Any]]) -> None:
    released, paper = references["fipo", "released"]["metrics"], references["fipo", "paper"]["metrics"]
    assert all(r["num_kept"] < p["num_kept"] for r, p in zip(released, paper))  # sequences were dropped
    assert paper[0]["influence_weights_min"] < 1.0 < paper[0]["influence_weights_max"]
