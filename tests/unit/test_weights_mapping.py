"""Megatron shards cut from Hugging Face files, and back, against layouts written out row by row."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from megatron_fipo.weights.architecture import Architecture, hf_shapes, padded_vocab_size, read_architecture
from megatron_fipo.weights.hf_files import HFWeights, check_hf_shapes
from megatron_fipo.weights.mapping import (
    canonical_name,
    checked_stream,
    expected_megatron_names,
    expert_of,
    hf_from_shards,
    hf_names_of,
    partition_of,
    shard_from_hf,
    shard_shape,
)

MODEL_CLASSES = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True}


def save_tiny_model(
    directory: Path, family: str, *, tied: bool = False, kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A model of odd sizes with every parameter random, saved by transformers. Returns its tensors by name."""
    config_class, model_class = MODEL_CLASSES[family]
    config = config_class(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=88 if kv_heads == 2 else 93,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        **({"head_dim": 10} if family.startswith("qwen3") else {}),
        **(EXPERTS if family == "qwen3_moe" else {}),
    )
    model = model_class(config).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return dict(model.named_parameters()) if family != "qwen3_moe" else load_file(directory / "model.safetensors")


def all_names(arch: Architecture) -> list[str]:
    names = expected_megatron_names(arch, range(arch.num_layers), first_stage=True, last_stage=True)
    return sorted(names)


def shards_of(name: str, arch: Architecture, weights: HFWeights, tp: int, padded: int | None = None) -> list[Tensor]:
    padded = padded or padded_vocab_size(arch.vocab_size, tp)
    return [shard_from_hf(name, arch, weights, tp_rank=r, tp_size=tp, padded_vocab=padded) for r in range(tp)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "tied"),
    [*((family, tied) for family in ("qwen2", "qwen3", "llama") for tied in (False, True)), ("qwen3_moe", False)],
)
def test_round_trip_is_bit_equal_in_every_cut(tmp_path, family, tied, dtype):
    for kv_heads, cuts in ((2, (1, 2)), (3, (1, 3))):
        directory = tmp_path / str(kv_heads)
        wanted = save_tiny_model(directory, family, tied=tied, kv_heads=kv_heads, dtype=dtype)
        arch, weights = read_architecture(directory), HFWeights(directory)
        check_hf_shapes(arch, weights)
        for tp in cuts:
            stream = (
                tensor
                for name in all_names(arch)
                for tensor in hf_from_shards(name, arch, shards_of(name, arch, weights, tp))
            )
            found = dict(checked_stream(arch, stream))
            assert found.keys() == wanted.keys() == hf_shapes(arch).keys()
            assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == dtype for name in wanted)


@pytest.mark.parametrize("suffix", ["weight", "bias"])
def test_qkv_lies_group_by_group(tmp_path, suffix):
    hf = save_tiny_model(tmp_path, "qwen2")
    arch, weights = read_architecture(tmp_path), HFWeights(tmp_path)
    q, k, v = (hf[f"model.layers.1.self_attn.{which}_proj.{suffix}"] for which in "qkv")
    dim, heads_per_group = 8, 3
    for tp, tp_rank in ((1, 0), (2, 0), (2, 1)):
        shard = shards_of(f"decoder.layers.1.self_attention.linear_qkv.{suffix}", arch, weights, tp)[tp_rank]
        rows = []
        for group in range(2)[tp_rank * 2 // tp : (tp_rank + 1) * 2 // tp]:
            heads = range(group * heads_per_group, (group + 1) * heads_per_group)
            rows += [q[head * dim + i] for head in heads for i in range(dim)]
            rows += [k[group * dim + i] for i in range(dim)]
            rows += [v[group * dim + i] for i in range(dim)]
        assert torch.equal(shard, torch.stack(rows))


def test_fc1_is_the_ranks_gate_then_its_up(tmp_path):
    hf = save_tiny_model(tmp_path, "llama")
    arch, weights = read_architecture(tmp_path), HFWeights(tmp_path)
    gate, up = hf["model.layers.0.mlp.gate_proj.weight"], hf["model.layers.0.mlp.up_proj.weight"]
    second = shards_of("decoder.layers.0.mlp.linear_fc1.weight", arch, weights, 2)[1]
    assert torch.equal(second[:44], gate[44:])
    assert torch.equal(second[44:], up[44:])


def test_row_parallel_weights_are_cut_by_columns(tmp_path):
    hf = save_tiny_model(tmp_path, "llama")
    arch, weights = read_architecture(tmp_path), HFWeights(tmp_path)
    first, second = shards_of("decoder.layers.0.self_attention.linear_proj.weight", arch, weights, 2)
    assert torch.equal(first, hf["model.layers.0.self_attn.o_proj.weight"][:, :24])
    assert torch.equal(second, hf["model.layers.0.self_attn.o_proj.weight"][:, 24:])


def test_vocab_rows_are_padded_with_zeros_and_trimmed(tmp_path):
    hf = save_tiny_model(tmp_path, "llama")
    arch, weights = read_architecture(tmp_path), HFWeights(tmp_path)
    shards = shards_of("output_layer.weight", arch, weights, 4, padded=256)  # ranks 2 and 3: 3 rows and none
    whole = torch.cat(shards)
    assert torch.equal(whole[:131], hf["lm_head.weight"])
    assert torch.equal(whole[131:], torch.zeros(125, 48))
    for shard in shards:
        shard[:] = shard  # not a read-only mapping
    ((name, trimmed),) = hf_from_shards("output_layer.weight", arch, shards)
    assert name == "lm_head.weight"
    assert torch.equal(trimmed, hf["lm_head.weight"])


def test_tied_output_layer_is_read_from_the_embedding_and_not_exported(tmp_path):
    hf = save_tiny_model(tmp_path, "qwen3", tied=True)
    arch, weights = read_architecture(tmp_path), HFWeights(tmp_path)
    shards = shards_of("output_layer.weight", arch, weights, 2)
    assert torch.equal(torch.cat(shards)[:131], hf["model.embed_tokens.weight"])
    assert hf_from_shards("output_layer.weight", arch, shards) == []


def test_stages_together_hold_every_name_once(tmp_path):
    save_tiny_model(tmp_path, "qwen2")
    arch = read_architecture(tmp_path)
    first = expected_megatron_names(arch, range(1), first_stage=True, last_stage=False)
    last = expected_megatron_names(arch, range(1, 2), first_stage=False, last_stage=True)
    assert first | last == set(all_names(arch))
    assert not first & last
    assert "embedding.word_embeddings.weight" in first
    assert {"decoder.final_layernorm.weight", "output_layer.weight"} <= last
    assert sorted(hf for name in all_names(arch) for hf in hf_names_of(name)) == sorted(hf_shapes(arch))


def test_tied_last_stage_has_its_own_copy_only_under_pipeline_parallelism(tmp_path):
    save_tiny_model(tmp_path, "llama", tied=True)
    arch = read_architecture(tmp_path)
    assert "output_layer.weight" not in expected_megatron_names(arch, range(2), first_stage=True, last_stage=True)
    assert "output_layer.weight" in expected_megatron_names(arch, range(1, 2), first_stage=False, last_stage=True)


def test_names_follow_the_family(tmp_path):
    for family, has_bias, has_qk_norm in (("qwen2", True, False), ("qwen3", False, True), ("llama", False, False)):
        save_tiny_model(tmp_path / family, family)
        names = all_names(read_architecture(tmp_path / family))
        assert ("decoder.layers.0.self_attention.linear_qkv.bias" in names) is has_bias
        assert ("decoder.layers.1.self_attention.k_layernorm.weight" in names) is has_qk_norm


def test_transformer_engine_norms_are_aliases(tmp_path):
    hf = save_tiny_model(tmp_path, "llama")
    arch, weights = read_architecture(tmp_path), HFWeights(tmp_path)
    fused = "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
    assert canonical_name(fused) == "decoder.layers.1.pre_mlp_layernorm.weight"
    assert canonical_name("decoder.final_layernorm.weight") == "decoder.final_layernorm.weight"
    (shard, _) = shards_of(fused, arch, weights, 2)
    assert torch.equal(shard, hf["model.layers.1.post_attention_layernorm.weight"])
    assert hf_from_shards(fused, arch, [shard])[0][0] == "model.layers.1.post_attention_layernorm.weight"


def test_partitions():
    layer = "decoder.layers.11."
    assert partition_of("embedding.word_embeddings.weight") == partition_of("output_layer.weight") == "vocab"
    assert partition_of(layer + "self_attention.linear_qkv.bias") == "qkv"
    assert partition_of(layer + "mlp.linear_fc2.weight") == "row"
    assert partition_of(layer + "self_attention.linear_qkv.layer_norm_weight") == "replicated"


def test_an_experts_shard_is_its_ranks_gate_then_its_up(tmp_path):
    hf = save_tiny_model(tmp_path, "qwen3_moe")
    arch, weights = read_architecture(tmp_path), HFWeights(tmp_path)
    name, prefix = "decoder.layers.1.mlp.experts.4.", "model.layers.1.mlp.experts.4."
    second = shards_of(name + "linear_fc1.weight", arch, weights, 2)[1]
    assert torch.equal(second, torch.cat([hf[f"{prefix}{which}_proj.weight"][6:] for which in ("gate", "up")]))
    second = shards_of(name + "linear_fc2.weight", arch, weights, 2)[1]
    assert torch.equal(second, hf[f"{prefix}down_proj.weight"][:, 6:])
    (router, other) = shards_of("decoder.layers.1.mlp.router.weight", arch, weights, 2)
    assert torch.equal(router, hf["model.layers.1.mlp.gate.weight"])
    assert torch.equal(router, other)


def test_experts_are_counted_over_all_ranks_under_either_of_megatrons_names():
    layer = "decoder.layers.3.mlp.experts."
    one_by_one, grouped = layer + "local_experts.1.linear_fc2.weight", layer + "linear_fc2.weight1"
    assert canonical_name(one_by_one, first_expert=4) == canonical_name(grouped, first_expert=4)
    assert canonical_name(one_by_one, first_expert=4) == layer + "5.linear_fc2.weight"
    assert expert_of(layer + "5.linear_fc2.weight") == 5
    assert expert_of("decoder.layers.3.mlp.router.weight") is None
    assert hf_names_of(layer + "5.linear_fc2.weight") == ("model.layers.3.mlp.experts.5.down_proj.weight",)


def test_expert_parallel_ranks_together_hold_every_name(tmp_path):
    save_tiny_model(tmp_path, "qwen3_moe")
    arch = read_architecture(tmp_path)
    shares = [
        expected_megatron_names(arch, range(2), first_stage=True, last_stage=True, experts=experts)
        for experts in (range(3), range(3, 6))
    ]
    assert shares[0] | shares[1] == set(all_names(arch))
    assert {name for name in shares[0] & shares[1] if expert_of(name) is not None} == set()
    assert len(shares[0] - shares[1]) == 2 * 3 * 2  # layers, experts, parameters of each
    assert "decoder.layers.0.mlp.linear_fc1.weight" not in shares[0]
    assert "decoder.layers.1.mlp.router.weight" in shares[0] & shares[1]


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight",
        "decoder.layers.0.mlp.experts.0.linear_fc3.weight",
        "decoder.layers.x.mlp.linear_fc1.weight",
        "module.output_layer.weight",
        "input_layernorm.weight",
    ],
)
def test_unknown_megatron_name_is_refused(name):
    with pytest.raises(ValueError, match="no rule for the Megatron parameter"):
        partition_of(name)


def test_every_shard_has_the_shape_foretold(tmp_path):
    save_tiny_model(tmp_path, "qwen3", kv_heads=3)
    arch, weights = read_architecture(tmp_path), HFWeights(tmp_path)
    for name in all_names(arch):
        for shard in shards_of(name, arch, weights, 3):
            assert tuple(shard.shape) == shard_shape(name, arch, tp_size=3, padded_vocab=132)
    assert shard_shape("decoder.layers.0.self_attention.q_layernorm.weight", arch, tp_size=3, padded_vocab=132) == (10,)


def test_stream_check_sees_gaps_repeats_strangers_and_wrong_shapes(tmp_path):
    save_tiny_model(tmp_path, "llama")
    arch = read_architecture(tmp_path)
    tensors = [(name, torch.zeros(shape)) for name, shape in hf_shapes(arch).items()]
    assert [name for name, _ in checked_stream(arch, tensors)] == list(hf_shapes(arch))
    for spoiled, message in (
        (tensors[:-1], "1 of 21 tensors were not exported, the first is lm_head.weight"),
        ([*tensors, tensors[3]], "exported twice"),
        ([*tensors, ("model.layers.2.input_layernorm.weight", torch.zeros(48))], "no such tensor"),
        ([("model.norm.weight", torch.zeros(49))], r"\[49\] torch.float32, but must be \[48\]"),
        ([tensors[0], ("model.norm.weight", torch.zeros(48).half())], "torch.float16, but must be"),
    ):
        with pytest.raises(ValueError, match=message):
            list(checked_stream(arch, spoiled))
