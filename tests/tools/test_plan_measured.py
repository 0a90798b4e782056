"""What planning works out is what real actors on the CPU take: states to the byte, activations within 10 %."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from plan_on_ranks import run_cases
from processes import run_ranks

from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.planning.activations import activation_bytes, chunk_bytes, head_saved_bytes, norm_bytes
from megatron_fipo.planning.states import state_bytes
from megatron_fipo.planning.training import OptimizerBytes, Recompute, Training
from megatron_fipo.weights.architecture import read_architecture

SAVED_TOLERANCE = 0.03  # of what one forward pass keeps
PEAK_TOLERANCE = 0.10  # of an update's peak
LEAST_PEAK_BYTES = 20_000_000  # below it the constant terms that are left out would show

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 160, "norm_topk_prob": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4}),
    "tied": (
        "Llama",
        {
            "vocab_size": 1000,
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": (
        "Qwen3",
        {
            "vocab_size": 1000,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "head_dim": 32,
            "tie_word_embeddings": False,
        },
    ),
    "experts": (
        "Qwen3Moe",
        {
            "vocab_size": 1000,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "head_dim": 32,
            "tie_word_embeddings": False,
            **EXPERTS,
        },
    ),
}


def case(model: str = "qwen2", layout: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    chosen = {"lengths": [256] * 4, "micro_batches": 1, "chunk_size": 256, "bf16": True, **changes}
    own = {name: chosen.pop(name) for name in ("lengths", "micro_batches", "chunk_size")}
    return {"model": model, "layout": layout or {}, "options": chosen, **own}


def full(num_layers: int, method: str = "uniform") -> dict[str, Any]:
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": num_layers}


ONE_RANK = {
    "fp32": case(bf16=False),
    "bf16": case(),
    "long": case(lengths=[1024]),
    "tied embedding": case("tied"),
    "norms of queries and keys": case("qwen3"),
    "experts": case("experts"),
    "all logits at once": case(chunk_size=1 << 20),
    "short chunks of logits": case(chunk_size=64),
    "every layer made again": case(transformer=full(1)),
    "the first layers made again": case(transformer=full(2, "block")),
    "attention made again": case(transformer={"recompute_granularity": "selective"}),
    "MLP made again": case(transformer={"recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
}
TWO_RANKS = {
    "tp2": case(layout={"tp": 2}),
    "tp2 sp": case(layout={"tp": 2, "sp": True}),
    "pp2": case(layout={"pp": 2}, micro_batches=3),
    "pp2 tied": case("tied", {"pp": 2}, micro_batches=3),
    "pp2 vpp2": case(layout={"pp": 2, "vpp": 2}, micro_batches=4),
    "cp2": case(layout={"cp": 2}, lengths=[1024]),
    "dp2": case("tied"),
    "dp2 gradients reduced in bf16": case("tied", ddp={"grad_reduce_in_fp32": False}),
    "dp2 without distributed optimizer": case("tied", ddp={"use_distributed_optimizer": False}),
    "ep2": case("experts", {"ep": 2}),
}
CASES = [*ONE_RANK, *TWO_RANKS]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Training, dict[str, Any]]]]:
    """Per case, on every rank: what is planned for, and what was measured."""
    directory = tmp_path_factory.mktemp("plan")
    torch.manual_seed(0)
    for name, (family, fields) in MODELS.items():
        config = getattr(transformers, f"{family}Config")(**{"tie_word_embeddings": False, **HEADS, **fields})
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(directory / name)
    found = {}
    for num_ranks, cases in ((1, ONE_RANK), (2, TWO_RANKS)):
        started = {
            name: {**{k: v for k, v in one.items() if k != "model"}, "model_dir": str(directory / one["model"])}
            for name, one in cases.items()
        }
        ranks = run_ranks(directory, num_ranks, run_cases, {"cases": started}, timeout_s=400.0)
        for name, one in cases.items():
            found[name] = [
                (as_routed(training_of(directory / one["model"], one, num_ranks, rank), outcome[name]), outcome[name])
                for rank, outcome in enumerate(ranks)
            ]
    return found


def training_of(model_dir: Path, one: dict[str, Any], num_ranks: int, rank: int) -> Training:
    sizes, options = dict(one["layout"]), one["options"]
    sp, bf16, ddp, fields = (
        sizes.pop("sp", False),
        options["bf16"],
        options.get("ddp", {}),
        options.get("transformer", {}),
    )
    layout = ParallelLayout.for_world(num_ranks, rank, sequence_parallel=sp, **sizes)
    in_fp32 = ddp.get("grad_reduce_in_fp32", True)
    return Training(
        arch=read_architecture(model_dir),
        layout=layout,
        vocab_divisible_by=1,
        dtype_bytes=2 if bf16 else 4,
        gradient_bytes=4 if in_fp32 else 2,
        optimizer=OptimizerBytes(4 if bf16 else 0, 8, 0 if in_fp32 else 4),
        is_sharded=ddp.get("use_distributed_optimizer", True),
        overlaps_gradients=False,
        transformer_impl="local",
        on_cpu=True,
        rows=sum(one["lengths"]) // layout.cp,
        longest=max(one["lengths"]),
        micro_batches=one["micro_batches"],
        chunk_size=one["chunk_size"],
        recompute=Recompute(
            fields.get("recompute_granularity"),
            fields.get("recompute_method"),
            fields.get("recompute_num_layers", 0),
            frozenset(fields.get("recompute_modules", ["core_attn"])),
        ),
    )


def as_routed(training: Training, found: dict[str, Any]) -> Training:
    """With the experts' share of the tokens that this rank had; how evenly a router spreads them cannot be planned."""
    if not found["rows_to_experts"]:
        return training
    mean = sum(found["rows_to_experts"]) / len(found["rows_to_experts"])
    return replace(training, expert_imbalance=mean / training.expert_rows)


@pytest.mark.parametrize("name", CASES)
def test_parameters_gradients_and_optimizer_are_what_an_actor_has_to_the_byte(
    measured: dict[str, list[tuple[Training, dict[str, Any]]]], name: str
) -> None:
    stages: dict[int, list[dict[str, int]]] = {}
    for _, found in measured[name]:
        stages.setdefault(found["stage"], []).append(found["states"])
    for stage, ranks in stages.items():
        planned = state_bytes(measured[name][0][0], stage)
        for part in ("parameters", "gradients", "optimizer"):  # planned is the rank whose shard is fullest
            assert getattr(planned, part) == max(rank[part] for rank in ranks), part


@pytest.mark.parametrize("name", CASES)
def test_the_measured_micro_batches_are_full(
    measured: dict[str, list[tuple[Training, dict[str, Any]]]], name: str
) -> None:
    for training, found in measured[name]:
        assert found["rows"] == [training.rows] * training.micro_batches


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("pp2")])
def test_what_forward_keeps_is_what_autograd_holds(
    measured: dict[str, list[tuple[Training, dict[str, Any]]]], name: str
) -> None:
    for training, found in measured[name]:
        planned = (
            chunk_bytes(training)[0] + norm_bytes(training, training.arch.hidden_size) + head_saved_bytes(training)
        )
        assert planned == pytest.approx(found["saved"], rel=SAVED_TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_an_update_is_what_the_allocator_counts(
    measured: dict[str, list[tuple[Training, dict[str, Any]]]], name: str
) -> None:
    for training, found in measured[name]:
        assert found["peak"] > LEAST_PEAK_BYTES
        assert activation_bytes(training, found["stage"]).total == pytest.approx(found["peak"], rel=PEAK_TOLERANCE)


def test_the_tolerance_tells_layouts_apart(
    measured: dict[str, list[tuple[Training, dict[str, Any]]]],
) -> None:
    training, found = measured["tp2 sp"][0]
    without = replace(training, layout=replace(training.layout, sequence_parallel=False))
    assert activation_bytes(without, 0).total > (1 + PEAK_TOLERANCE) * found["peak"]
    training, found = measured["pp2"][0]
    assert activation_bytes(replace(training, micro_batches=1), 0).total < (1 - PEAK_TOLERANCE) * found["peak"]
