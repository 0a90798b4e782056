"""Real engines hold the weights they were sent, by their own checksums in their own layout, and refuse any others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_fipo.rollout.engine import EngineError
from megatron_fipo.rollout.server_process import start_engine
from megatron_fipo.rollout.sglang_engine import SGLangEngine
from megatron_fipo.weights.architecture import Architecture, read_architecture
from megatron_fipo.weights.bucket import WeightBucket, make_buckets
from megatron_fipo.weights.engine_layout import expected_checksums, expected_of_tensors

SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 7,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
MODELS: dict[str, tuple[Any, Any, dict[str, Any], int]] = {  # with the engine's tensor-parallel ranks
    "llama tp1": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}, 1),
    "qwen2 tied tp2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}, 2),
    "qwen3 tp1": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True, "head_dim": 16}, 1),
    "qwen3_moe tp2": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**EXPERTS, "head_dim": 16}, 2),
}


def make_model(kind: str) -> PreTrainedModel:
    config, model, fields, _ = MODELS[kind]
    torch.manual_seed(0)
    return model(config(**{**SHAPE, **fields}, initializer_range=0.3)).eval()


def weights_of(model: PreTrainedModel, scale: float = 1.0) -> list[tuple[str, torch.Tensor]]:
    """Under the names of published checkpoints: transformers fuses a layer's experts."""
    found: list[tuple[str, torch.Tensor]] = []
    for name, parameter in model.named_parameters():
        tensor = parameter.detach() * scale + (scale - 1.0)  # biases are zeros at first
        prefix, _, fused = name.partition(".experts.")
        for expert, part in enumerate(tensor if fused else ()):
            if fused == "gate_up_proj":
                gate, up = part.chunk(2)
                found += [(f"{prefix}.experts.{expert}.gate_proj.weight", gate)]
                found += [(f"{prefix}.experts.{expert}.up_proj.weight", up)]
            else:
                found += [(f"{prefix}.experts.{expert}.{fused}.weight", part)]
        if not fused:
            found += [(name, tensor)]
    return found


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[SGLangEngine, Architecture]]]:
    """One engine for each model, all started together."""
    started: dict[str, tuple[SGLangEngine, Architecture]] = {}
    try:
        for kind, (_, _, _, tp_size) in MODELS.items():
            directory = tmp_path_factory.mktemp("engine")
            make_model(kind).save_pretrained(directory / "model")
            engine = start_engine(
                str(directory / "model"),
                name=kind,
                dtype="float32",
                tp_size=tp_size,
                context_length=128,
                random_seed=0,
                log_path=str(directory / "engine.log"),
                start_timeout_s=240,
                request_timeout_s=120,
                server_args={"max_total_tokens": 2048},
                use_cpu=True,
            )
            started[kind] = (engine, read_architecture(Path(directory) / "model"))
        for engine, _ in started.values():
            engine.wait_ready()
        yield started
    finally:
        for engine, _ in started.values():
            engine.shutdown()


@pytest.mark.parametrize("kind", MODELS)
def test_an_engine_reports_the_checksums_foretold_from_what_it_was_sent(
    kind: str, engines: dict[str, tuple[SGLangEngine, Architecture]]
) -> None:
    engine, arch = engines[kind]
    model, tp_size = make_model(kind), MODELS[kind][3]
    from_disk = expected_of_tensors(arch, weights_of(model), tp_size=tp_size)
    assert engine.weight_checksums() == from_disk

    def sent() -> Iterator[WeightBucket]:
        for bucket in make_buckets(weights_of(model, 1.5), 20_000):
            engine.push_bucket(bucket)
            yield bucket

    engine.begin_weight_update()
    expected = expected_checksums(arch, sent(), tp_size=tp_size)
    engine.end_weight_update(1)
    assert engine.weight_checksums() == expected
    assert all(
        expected[rank][name] != from_disk[rank][name] for rank in range(tp_size) for name in from_disk[rank]
    )  # nothing was left as it was


def test_what_an_engine_holds_of_other_weights_is_not_what_is_foretold(
    engines: dict[str, tuple[SGLangEngine, Architecture]],
) -> None:
    """Two layers swapped on the way: whole and uncorrupted buckets, and a wrong model."""
    kind = "llama tp1"
    engine, arch = engines[kind]
    weights = weights_of(make_model(kind))
    first, second = "model.layers.0.", "model.layers.1."
    swapped = [
        (name.replace(first, second) if first in name else name.replace(second, first), tensor)
        for name, tensor in weights
    ]
    engine.begin_weight_update()
    for bucket in make_buckets(swapped, 1 << 20):
        engine.push_bucket(bucket)
    engine.end_weight_update(2)
    (found,), (expected,) = engine.weight_checksums(), expected_of_tensors(arch, weights, tp_size=1)
    different = {name for name in expected if found[name] != expected[name]}
    # norms of ones are alike in both layers
    assert different == {name for name in expected if ".layers." in name and "layernorm" not in name}


@pytest.mark.parametrize("kind", ["qwen3 tp1", "qwen2 tied tp2"])
def test_an_engine_refuses_a_bucket_that_was_changed_on_the_way(
    kind: str, engines: dict[str, tuple[SGLangEngine, Architecture]]
) -> None:
    """The last test of these engines, which end of it."""
    engine, _ = engines[kind]
    (bucket,) = make_buckets(weights_of(make_model(kind)), 1 << 30)
    bucket.flat[bucket.size_bytes // 2] ^= 0x10
    engine.begin_weight_update()
    with pytest.raises(EngineError, match=r"weight bucket refused: its checksum is \w{16}, not \w{16}"):
        engine.push_bucket(bucket)
