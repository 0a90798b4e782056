"""One FIPO update equals Hugging Face transformers' on one process, whatever the layout, budget and packing order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from actor_on_ranks import OPTIMIZER, run_layouts, settings_for
from processes import run_ranks
from tiny_models import hf_logprobs, make_old_logprobs, make_sequences, save_model, with_rollout_logprobs

from megatron_fipo.config import CorrectionSettings
from megatron_fipo.losses import LOSSES, correction_metrics, correction_weights
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
# Four ranks repeat two of them: what the others add, no more than two ranks can get wrong.
CASES_OF = {name: CASES if num_ranks < 4 else CASES[1:3] for name, (num_ranks, _) in LAYOUTS.items()}
# token weights that meet both bounds and a KL term, in layouts that cut the model and the sequences
CORRECTIONS: dict[str, dict[str, Any]] = {
    "tis": {"use_tis": True, "tis_clip": 1.2, "tis_clip_low": 0.8, "kl_coef": 0.3},
    "icepop": {"use_icepop": True, "icepop_low": 0.8, "icepop_high": 1.3, "kl_coef": 0.3},
}
CORRECTED_LAYOUTS = ("one process", "pp2 cp2", "tp2 sp dp2")
CORRECTED_CASES: list[dict[str, Any]] = [
    {"semantics": "released", "budget": 47, "corrections": CORRECTIONS["tis"], "distributed_optimizer": False},
    {"algorithm": "grpo", "budget": 40, "corrections": CORRECTIONS["icepop"]},
]
OVERLAPPED_CASE = {"semantics": "paper", "budget": 31, "overlap": True}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen2")
    save_model(directory, "qwen2", tied=False)
    return directory


def reference(
    directory: Path, algorithm: str, semantics: str, corrections: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The same two updates in plain transformers and torch, unpacked, on one process."""
    correction = CorrectionSettings(**corrections or {})
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    sequences = make_sequences(NUM_SEQUENCES)
    old = make_old_logprobs(model, sequences)
    sequences = with_rollout_logprobs(sequences, old)
    initial = [hf_logprobs(model, sequence).detach() for sequence in sequences]
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
        batch = pack(sequences, members, old_logprobs=old, reference_logprobs=initial)
        corrected = correction_weights(batch.old_logprobs, batch.rollout_logprobs, batch.loss_mask, correction)
        logprobs = torch.cat([hf_logprobs(model, sequences[i]) for i in members])
        loss, info = LOSSES[algorithm](
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.loss_mask,
            settings_for(algorithm, semantics),
            cu_seqlens=batch.cu_seqlens,
            max_response_len=32,
            token_weights=corrected and corrected[0],
            reference_logprobs=batch.reference_logprobs if correction.kl_coef else None,
            kl_coef=correction.kl_coef,
        )
        model.zero_grad()
        loss.backward()
        if start == 0:
            result["gradients"] = {name: p.grad.clone() for name, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip_grad"])
        optimizer.step()
        result["metrics"].append(
            {"num_kept": float(info["num_kept"])}
            | (correction_metrics(corrected[1], correction) if corrected else {"pg_loss": float(loss.detach())})
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


@pytest.fixture(scope="module")
def corrected_references(model_dir: Path) -> list[dict[str, Any]]:
    return [
        reference(model_dir, case.get("algorithm", "fipo"), case.get("semantics", "paper"), case["corrections"])
        for case in CORRECTED_CASES
    ]


def updates_of(
    layouts: dict[str, tuple[int, dict[str, Any]]],
    cases: dict[str, list[dict[str, Any]]],
    model_dir: Path,
    old_logprobs: list[torch.Tensor],
    directory: Path,
) -> dict[str, list[dict[str, Any]]]:
    """What each layout's cases left on rank 0. Layouts of one number of ranks share their processes."""
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
    more_cases = {**dict.fromkeys(CORRECTED_LAYOUTS, CORRECTED_CASES), "dp2": [OVERLAPPED_CASE]}
    cases = {name: CASES_OF[name] + more_cases.get(name, []) for name in LAYOUTS}
    return updates_of(LAYOUTS, cases, model_dir, old_logprobs, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_update_is_the_same_in_every_layout(
    layout: str, updates: dict[str, list[dict[str, Any]]], references: dict[tuple[str, str], dict[str, Any]]
) -> None:
    for case, found in zip(CASES_OF[layout], updates[layout]):
        wanted = references[case.get("algorithm", "fipo"), case.get("semantics", "paper")]
        assert_same_update(found, wanted)
        assert ("gradients" in found) == (case.get("distributed_optimizer") is False)


def test_what_is_exported_right_after_an_update_is_new_where_parameters_are_gathered_late(
    updates: dict[str, list[dict[str, Any]]], references: dict[tuple[str, str], dict[str, Any]]
) -> None:
    (found,) = updates["dp2"][len(CASES) :]
    assert_same_update(found, references["fipo", "paper"])


@pytest.mark.parametrize("layout", CORRECTED_LAYOUTS)
def test_so_is_one_with_token_weights_and_a_kl_term(
    layout: str, updates: dict[str, list[dict[str, Any]]], corrected_references: list[dict[str, Any]]
) -> None:
    found = updates[layout][len(CASES_OF[layout]) :]
    assert len(found) == len(CORRECTED_CASES)
    for update, wanted in zip(found, corrected_references):
        assert_same_update(update, wanted)
    tis, icepop = (update["metrics"] for update in found)
    assert tis[0]["tis/min"] == pytest.approx(0.8)
    assert tis[0]["tis/max"] == pytest.approx(1.2)
    assert 0.05 < tis[0]["tis/clip_low_frac"] < 0.5 > tis[0]["tis/clip_high_frac"] > 0.05
    assert 0.05 < icepop[0]["icepop/masked_frac"] < 0.8
    # the second mini-batch is scored after an update, by the weights of before it
    assert min(tis[0]["kl_loss"], icepop[0]["kl_loss"]) == pytest.approx(0.0, abs=1e-8)
    assert min(tis[1]["kl_loss"], icepop[1]["kl_loss"]) > 1e-5


def test_the_cases_exercise_what_they_claim(references: dict[tuple[str, str], dict[str, Any]]) -> None:
    released, paper = references["fipo", "released"]["metrics"], references["fipo", "paper"]["metrics"]
    assert all(r["num_kept"] < p["num_kept"] for r, p in zip(released, paper))  # sequences were dropped
    assert paper[0]["influence_weights_min"] < 1.0 < paper[0]["influence_weights_max"]
