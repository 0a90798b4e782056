"""config.json is read in both of its styles, and whatever would change the maths is refused by name."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.weights.architecture import (
    Architecture,
    check_layout,
    hf_shapes,
    padded_vocab_size,
    read_architecture,
    to_gpt_model_fields,
    to_transformer_fields,
)
from megatron_fipo.weights.hf_files import HFWeights, check_hf_shapes

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 88,
    "max_position_embeddings": 512,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 131,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
QWEN3 = {**QWEN, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
QWEN3_MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
}


def read(tmp_path: Path, config: dict, **changes: object) -> Architecture:
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    return read_architecture(tmp_path)


def test_reads_a_transformers_4_config(tmp_path):
    assert read(tmp_path, LLAMA) == Architecture(
        family="llama",
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=88,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=8,
        vocab_size=131,
        norm_epsilon=1e-5,
        rope_theta=500000.0,
        rope_scaling_factor=None,
        max_position_embeddings=512,
        tied=False,
        qkv_bias=False,
        qk_layernorm=False,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize(
    ("family", "tied"),
    [*((family, tied) for family in ("qwen2", "qwen3", "llama") for tied in (False, True)), ("qwen3_moe", False)],
)
def test_reads_what_the_installed_transformers_writes(tmp_path, family, tied):
    config_class = {
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "llama": transformers.LlamaConfig,
        "qwen3_moe": transformers.Qwen3MoeConfig,
    }[family]
    is_qwen3 = family.startswith("qwen3")
    more = {"head_dim": 16} if is_qwen3 else {}
    if family == "qwen3_moe":
        more |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    config_class(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="float16",
        **more,
    ).save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    assert (arch.family, arch.tied, arch.rope_theta, arch.dtype) == (family, tied, 500000.0, torch.float16)
    assert (arch.qkv_bias, arch.qk_layernorm) == (family == "qwen2", is_qwen3)
    assert arch.kv_channels == (16 if is_qwen3 else 8)
    experts = (arch.num_moe_experts, arch.moe_router_topk, arch.moe_ffn_hidden_size, arch.moe_router_pre_softmax)
    assert experts == ((6, 2, 24, False) if family == "qwen3_moe" else (None, None, None, None))


def test_reads_experts_as_published(tmp_path):
    arch = read(tmp_path, QWEN3_MOE)
    assert (arch.num_moe_experts, arch.moe_router_topk, arch.moe_ffn_hidden_size) == (6, 2, 24)
    assert read(tmp_path, QWEN3_MOE, num_experts=None, num_local_experts=6) == arch
    fields = to_transformer_fields(arch)
    assert (fields["num_moe_experts"], fields["moe_router_topk"], fields["moe_ffn_hidden_size"]) == (6, 2, 24)
    assert to_transformer_fields(read(tmp_path, QWEN3))["num_moe_experts"] is None


def test_weights_that_are_not_normalised_come_from_a_softmax_over_all_experts(tmp_path):
    for normalised in (True, False):
        fields = to_transformer_fields(read(tmp_path, QWEN3_MOE, norm_topk_prob=normalised))
        assert fields["moe_router_pre_softmax"] is not normalised


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LLAMA3_SCALING},
        {"rope_theta": None, "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 500000.0}},
    ],
)
def test_llama3_rope_scaling_becomes_megatrons(tmp_path, changes):
    arch = read(tmp_path, LLAMA, **changes)
    fields = to_gpt_model_fields(arch)
    assert (fields["rotary_base"], fields["rope_scaling"], fields["rope_scaling_factor"]) == (500000.0, True, 8.0)
    assert to_gpt_model_fields(read(tmp_path, LLAMA))["rope_scaling"] is False


def test_rope_said_twice_and_alike_is_read(tmp_path):
    old = {**{name: LLAMA3_SCALING[name] for name in LLAMA3_SCALING if name != "rope_type"}, "type": "llama3"}
    found = read(tmp_path, LLAMA, rope_parameters={**LLAMA3_SCALING, "rope_theta": 500000.0}, rope_scaling=old)
    assert (found.rope_theta, found.rope_scaling_factor) == (500000.0, 8.0)


def test_absent_fields_take_the_familys_defaults(tmp_path):
    config = {name: value for name, value in LLAMA.items() if name not in ("rope_theta", "num_key_value_heads")}
    arch = read(tmp_path, config)
    assert (arch.rope_theta, arch.num_query_groups, arch.tied) == (10000.0, 6, False)
    for config in (LLAMA, QWEN, QWEN3):
        assert read(tmp_path, config, num_key_value_heads=None).num_query_groups == 6


@pytest.mark.parametrize(
    ("config", "changes", "field"),
    [
        (LLAMA, {"model_type": "mixtral"}, "model_type"),
        (LLAMA, {"model_type": None}, "model_type"),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA, {"attention_bias": True}, "attention_bias"),
        (QWEN3, {"attention_bias": True}, "attention_bias"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias"),
        (LLAMA, {"attention_dropout": 0.1}, "attention_dropout"),
        (LLAMA, {"sliding_window": 4096}, "sliding_window"),
        (QWEN, {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
        (QWEN, {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_parameters": {"rope_theta": 500000.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA, {"rope_parameters": {"rope_theta": 10000.0}}, "rope_theta"),
        (LLAMA, {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3_SCALING}, "rope_scaling"),
        (LLAMA, {"rope_parameters": LLAMA3_SCALING, "rope_scaling": {**LLAMA3_SCALING, "factor": 9}}, "rope_scaling"),
        (LLAMA, {"rope_parameters": LLAMA3_SCALING, "rope_scaling": {**LLAMA3_SCALING, "rope_theta": 1}}, "rope_theta"),
        (LLAMA, {"rope_scaling": LLAMA3_SCALING, "original_max_position_embeddings": 128}, "original_max_position"),
        (LLAMA, {"rope_theta": 10**400}, "rope_theta"),
        (LLAMA, {"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        (QWEN, {"layer_types": 5}, "layer_types"),
        (QWEN, {"layer_types": [{}]}, "layer_types"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        (LLAMA, {"rope_scaling": {**LLAMA3_SCALING, "low_freq_factor": 2.0}}, "low_freq_factor"),
        (LLAMA, {"rope_scaling": {**LLAMA3_SCALING, "factor": None}}, "factor"),
        (LLAMA, {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
        (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (LLAMA, {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "auto_map"),
        (LLAMA, {"num_key_value_heads": 4}, "num_key_value_heads"),
        (QWEN3_MOE, {"num_key_value_heads": None}, "num_key_value_heads"),
        (QWEN3, {"head_dim": None}, "head_dim"),
        (LLAMA, {"hidden_size": 50}, "hidden_size"),
        (LLAMA, {"num_hidden_layers": "3"}, "num_hidden_layers"),
        (LLAMA, {"rms_norm_eps": None}, "rms_norm_eps"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        (LLAMA, {"torch_dtype": "float8_e4m3fn"}, "dtype"),
        (QWEN3, {"num_experts": 8}, "num_experts"),
        (QWEN3_MOE, {"num_experts": None}, "num_experts"),
        (QWEN3_MOE, {"num_local_experts": 4}, "num_local_experts"),
        (QWEN3_MOE, {"num_experts_per_tok": 7}, "num_experts_per_tok"),
        (QWEN3_MOE, {"num_experts_per_tok": 1}, "norm_topk_prob"),
        (QWEN3_MOE, {"moe_intermediate_size": None}, "moe_intermediate_size"),
        (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        (QWEN3_MOE, {"mlp_only_layers": [0]}, "mlp_only_layers"),
        (QWEN3_MOE, {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (QWEN3_MOE, {"shared_expert_intermediate_size": 24}, "shared_expert_intermediate_size"),
    ],
)
def test_refuses_what_would_change_the_maths(tmp_path, config, changes, field):
    with pytest.raises(ValueError) as error:
        read(tmp_path, config, **changes)
    assert str(tmp_path / "config.json") in str(error.value)
    assert field in str(error.value)


def test_unknown_model_type_lists_the_supported(tmp_path):
    with pytest.raises(ValueError, match=r"'mixtral', but must be one of \['llama', 'qwen2', 'qwen3', 'qwen3_moe'\]"):
        read(tmp_path, LLAMA, model_type="mixtral")


@pytest.mark.parametrize("text", [None, "", '{"model_type": "llama",', "[1]", b"\xff\xfe", "[" * 9999, "1" * 5000])
def test_missing_or_malformed_config_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"config\.json"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("tp", "pp", "message"),
    [
        (4, 1, "--tensor-model-parallel-size is 4, but must be a divisor of the model's 6 attention heads"),
        (3, 1, "--tensor-model-parallel-size is 3, but must be a divisor of the model's 2 query groups"),
        (2, 2, "--pipeline-model-parallel-size is 2, but must be a divisor of the model's 3 layers"),
        (1, 6, "--pipeline-model-parallel-size is 6"),
    ],
)
def test_layout_that_does_not_divide_names_the_flag(tmp_path, tp, pp, message):
    with pytest.raises(ValueError) as error:
        check_layout(read(tmp_path, LLAMA), ParallelLayout(tp=tp, pp=pp))
    assert message in str(error.value)


def test_layout_checks_the_ffn_and_accepts_what_divides(tmp_path):
    check_layout(read(tmp_path, LLAMA), ParallelLayout(tp=2, pp=3))
    with pytest.raises(ValueError, match="87 FFN channels"):
        check_layout(read(tmp_path, LLAMA, intermediate_size=87), ParallelLayout(tp=2, pp=3))


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        (QWEN3, {"ep": 2}, "--expert-model-parallel-size is 2, but must be 1: a qwen3 model has no experts"),
        (QWEN3, {"etp": 2}, "--expert-tensor-parallel-size is 2, but must be unset: a qwen3 model has no experts"),
        (QWEN3_MOE, {"ep": 4}, "--expert-model-parallel-size is 4, but must be a divisor of the model's 6 experts"),
        (QWEN3_MOE, {"ep": 2, "etp": 5}, "--expert-tensor-parallel-size is 5, but must be a divisor of an expert's 24"),
        (QWEN3_MOE, {"etp": 2}, "--expert-tensor-parallel-size is 2, but must be --tensor-model-parallel-size (1)"),
        (QWEN3_MOE, {"tp": 2, "etp": 2}, "--sequence-parallel is False, but must be given"),
    ],
)
def test_experts_that_cannot_be_laid_out_so_name_the_flag(tmp_path, config, layout, message):
    with pytest.raises(ValueError) as error:
        check_layout(read(tmp_path, config), ParallelLayout(**layout))
    assert message in str(error.value)
    check_layout(read(tmp_path, QWEN3_MOE), ParallelLayout(tp=2, sequence_parallel=True, ep=3, etp=1))


def test_transformer_fields(tmp_path):
    fields = to_transformer_fields(read(tmp_path, QWEN3))
    assert (fields["num_query_groups"], fields["kv_channels"], fields["qk_layernorm"]) == (2, 16, True)
    assert (fields["normalization"], fields["gated_linear_unit"], fields["add_bias_linear"]) == ("RMSNorm", True, False)
    assert to_transformer_fields(read(tmp_path, QWEN))["add_qkv_bias"] is True
    assert "activation_func" not in fields


def test_padded_vocab_is_the_smallest_multiple():
    assert [padded_vocab_size(131, tp) for tp in (1, 2, 3, 4)] == [131, 132, 132, 132]
    assert padded_vocab_size(131, 2, divisible_by=128) == 256
    assert padded_vocab_size(256, 2, divisible_by=128) == 256


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [LLAMA, QWEN, QWEN3], ids=lambda config: config["model_type"])
def test_hf_shapes_are_those_of_the_transformers_model(tmp_path, config, tied):
    arch = read(tmp_path, config, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert hf_shapes(arch) == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_hf_shapes_of_experts_are_those_that_transformers_saves(tmp_path):
    arch = read(tmp_path, QWEN3_MOE)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path / "saved")
    weights = HFWeights(tmp_path / "saved")
    assert hf_shapes(arch) == {name: weights.shape(name) for name in weights.names}
    check_hf_shapes(read_architecture(tmp_path / "saved"), weights)
