"""Real engines told to hold FP8 weights take them and report what is foretold. They cannot generate on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_fipo.rollout.engine import EngineError
from megatron_fipo.rollout.server_process import start_engine
from megatron_fipo.rollout.sglang_engine import SGLangEngine
from megatron_fipo.weights import fp8
from megatron_fipo.weights.architecture import Architecture, read_architecture
from megatron_fipo.weights.bucket import WeightBucket, make_buckets
from megatron_fipo.weights.engine_layout import expected_checksums, expected_of_tensors

SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "initializer_range": 0.1,
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any], int]] = {  # with the engine's tensor-parallel ranks
    "qwen3 tp1": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": False, "head_dim": 64}, 1),
    "qwen2 tied tp2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}, 2),
}
BUCKET_BYTES = 300_000


def make_model(kind: str) -> PreTrainedModel:
    config, model, fields, _ = MODELS[kind]
    torch.manual_seed(0)
    return model(config(**SHAPE, **fields)).eval()


def fp8_weights(kind: str, scale: float = 1.0) -> list[tuple[str, torch.Tensor]]:
    """As the actor exports them with --rollout-fp8: bf16, linear weights as FP8 with the scales behind each."""
    tensors: list[tuple[str, torch.Tensor]] = []
    for name, parameter in make_model(kind).named_parameters():
        tensor = (parameter.detach() * scale + (scale - 1.0)).bfloat16()  # biases are zeros at first
        if fp8.is_quantised(name):
            tensors += zip((name, f"{name}_scale_inv"), fp8.quantise(tensor), strict=True)
        else:
            tensors.append((name, tensor))
    return tensors


def push(engine: SGLangEngine, weights: list[tuple[str, torch.Tensor]], version: int) -> Iterator[WeightBucket]:
    """The buckets as they were pushed; the update ends with the last."""
    engine.begin_weight_update()
    for bucket in make_buckets(weights, BUCKET_BYTES):
        engine.push_bucket(bucket)
        yield bucket
    engine.end_weight_update(version)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[SGLangEngine, Architecture]]]:
    """One engine for each model, started together with what --rollout-fp8 starts it with on a GPU."""
    started: dict[str, tuple[SGLangEngine, Architecture]] = {}
    try:
        for kind, (_, _, _, tp_size) in MODELS.items():
            directory = tmp_path_factory.mktemp("engine")
            make_model(kind).save_pretrained(directory / "model")
            arch = read_architecture(directory / "model")
            fp8.check_fp8(arch, tp_size)
            engine = start_engine(
                str(directory / "model"),
                name=kind,
                dtype="bfloat16",
                tp_size=tp_size,
                context_length=128,
                random_seed=0,
                log_path=str(directory / "engine.log"),
                start_timeout_s=240,
                request_timeout_s=120,
                server_args={"max_total_tokens": 1024, **fp8.engine_arguments()},
                use_cpu=True,
            )
            started[kind] = (engine, arch)
        for engine, _ in started.values():
            engine.wait_ready()
        yield started
    finally:
        for engine, _ in started.values():
            engine.shutdown()


@pytest.mark.parametrize("kind", MODELS)
def test_an_fp8_engine_reports_the_checksums_foretold_from_what_it_was_sent(
    kind: str, engines: dict[str, tuple[SGLangEngine, Architecture]]
) -> None:
    engine, arch = engines[kind]
    tp_size = MODELS[kind][3]
    told: list[list[dict[str, str]]] = []
    for version, scale in ((1, 1.0), (2, 1.5)):
        buckets = push(engine, fp8_weights(kind, scale), version)
        told.append(expected_checksums(arch, buckets, tp_size=tp_size, fp8=True))
        assert engine.weight_checksums() == told[-1]
        assert engine.weight_version == version
    first, second = told
    assert len(first) == len(second) == tp_size
    assert all(first[rank][name] != second[rank][name] for rank in range(tp_size) for name in first[rank])


@pytest.mark.parametrize(
    ("tensor", "parameter"),
    [
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_up_proj.weight"),
        ("model.layers.0.self_attn.o_proj.weight_scale_inv", "model.layers.0.self_attn.o_proj.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
@pytest.mark.parametrize("kind", MODELS)
def test_one_bit_that_is_not_as_foretold_shows_in_its_parameter_and_nowhere_else(
    kind: str, tensor: str, parameter: str, engines: dict[str, tuple[SGLangEngine, Architecture]]
) -> None:
    engine, arch = engines[kind]
    tp_size = MODELS[kind][3]
    weights = fp8_weights(kind)
    expected = expected_of_tensors(arch, weights, tp_size=tp_size, fp8=True)
    flat = dict(weights)[tensor].view(torch.uint8).flatten()
    flat[2] ^= 0x40  # of a weight's own byte, a scale's mantissa, a norm's exponent
    for _ in push(engine, weights, 3):
        pass
    found = engine.weight_checksums()
    different = {
        (rank, name) for rank in range(tp_size) for name in expected[rank] if found[rank][name] != expected[rank][name]
    }
    ranks = range(tp_size) if tensor == "model.norm.weight" else [0]  # of the first byte's share
    assert different == {(rank, parameter) for rank in ranks}


@pytest.mark.parametrize("kind", MODELS)
def test_an_fp8_bucket_that_was_changed_on_the_way_is_refused(
    kind: str, engines: dict[str, tuple[SGLangEngine, Architecture]]
) -> None:
    """The last test of these engines, which end of it."""
    engine, _ = engines[kind]
    (bucket,) = make_buckets(fp8_weights(kind), 1 << 30)
    bucket.flat[bucket.size_bytes // 2] ^= 0x01
    engine.begin_weight_update()
    with pytest.raises(EngineError, match=r"weight bucket refused: its checksum is \w{16}, not \w{16}"):
        engine.push_bucket(bucket)
