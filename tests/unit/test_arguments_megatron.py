"""Megatron's flags: the table against the installed megatron-core and against Megatron-LM's own names."""

import ast
import dataclasses
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from megatron_fipo.arguments import parse_arguments
from megatron_fipo.flags.command_line import read_arguments
from megatron_fipo.flags.dataclass_source import read_fields, value_type
from megatron_fipo.flags.megatron_ignored import IGNORED_FLAGS, IGNORED_VALUES, ONLY_VALUES, SILENT
from megatron_fipo.flags.megatron_lm_names import FORMER_FLAGS, MEGATRON_LM_FLAGS
from megatron_fipo.flags.megatron_table import (
    ARCHITECTURE_FIELDS,
    CONFIG_SOURCES,
    FIELD_FLAGS,
    contradictions,
    core_root,
    flag_of_field,
    megatron_options,
)
from megatron_fipo.flags.megatron_unsupported import NEWER_CORE, UNSUPPORTED_FLAGS, unsupported_reason
from megatron_fipo.flags.option import ValueType, options_of
from megatron_fipo.flags.table import all_options
from megatron_fipo.megatron_config import MegatronSettings
from megatron_fipo.run_config import RunSettings

ROOT = Path(__file__).resolve().parents[2]
BASE = ["--hf-checkpoint", "model", "--task", "chain_sum"]


def megatron(*flags):
    return parse_arguments([*BASE, *flags]).megatron


def test_mappings_hold_only_what_was_given():
    settings = megatron()
    assert (settings.model, settings.transformer, settings.optimizer, settings.ddp) == ({}, {}, {}, {})
    settings = megatron("--num-layers", "12", "--disable-bias-linear", "--swiglu", "--vocab-size", "100")
    assert settings.transformer == {"num_layers": 12, "add_bias_linear": False, "gated_linear_unit": True}
    assert settings.model == {"vocab_size": 100}


def test_one_flag_fills_every_dataclass_that_has_the_field():
    settings = megatron("--use-distributed-optimizer", "--fp8-recipe", "delayed")
    assert settings.optimizer == {"use_distributed_optimizer": True, "fp8_recipe": "delayed"}
    assert settings.ddp == {"use_distributed_optimizer": True}
    assert settings.transformer == {"fp8_recipe": "delayed"}


@pytest.mark.parametrize(
    "flags",
    [
        ["--decoder-first-pipeline-num-layers", "3"],
        ["--account-for-loss-in-pipeline-split"],
        ["--pipeline-model-parallel-layout", "Et*3|L"],
    ],
)
def test_what_would_leave_engines_or_stages_wrong_is_refused(flags):
    with pytest.raises(ValueError, match="not supported here"):
        megatron(*flags)


@pytest.mark.parametrize(
    ("flags", "mapping", "expected"),
    [
        (["--fp8-format", "hybrid"], "transformer", {"fp8": "hybrid"}),
        (["--norm-epsilon", "1e-6"], "transformer", {"layernorm_epsilon": 1e-6}),
        (["--num-query-groups", "3", "--qk-layernorm"], "transformer", {"num_query_groups": 3, "qk_layernorm": True}),
        (["--recompute-activations"], "transformer", {"recompute_granularity": "selective"}),
        (["--recompute-modules", "mlp", "core_attn"], "transformer", {"recompute_modules": ["mlp", "core_attn"]}),
        (["--attention-backend", "flash"], "transformer", {"attention_backend": "flash"}),
        (["--no-masked-softmax-fusion"], "transformer", {"masked_softmax_fusion": False}),
        (["--use-cpu-initialization"], "transformer", {"use_cpu_initialization": True}),
        (["--attention-dropout", "0.0"], "transformer", {"attention_dropout": 0.0}),
        (["--num-experts", "8", "--moe-router-topk", "2"], "transformer", {"num_moe_experts": 8, "moe_router_topk": 2}),
        (
            ["--moe-grouped-gemm", "--moe-permute-fusion", "--moe-router-dtype", "fp32"],
            "transformer",
            {"moe_grouped_gemm": True, "moe_permute_fusion": True, "moe_router_dtype": "fp32"},
        ),
        (["--expert-model-parallel-size", "2"], "transformer", {}),
        (["--accumulate-allreduce-grads-in-fp32"], "ddp", {"grad_reduce_in_fp32": True}),
        (["--grad-reduce-in-bf16"], "ddp", {"grad_reduce_in_fp32": False}),
        (["--ddp-bucket-size", "40000000"], "ddp", {"bucket_size": 40000000}),
        (
            ["--main-grads-dtype", "bf16", "--use-precision-aware-optimizer"],
            "optimizer",
            {"main_grads_dtype": "bf16", "use_precision_aware_optimizer": True},
        ),
        (["--moe-layer-recompute"], "transformer", {"moe_layer_recompute": True}),
        (["--group-query-attention"], "model", {"group_query_attention": True}),
        (["--untie-embeddings-and-output-weights"], "model", {"share_embeddings_and_output_weights": False}),
        (["--use-rotary-position-embeddings"], "model", {"position_embedding_type": "rope"}),
    ],
)
def test_megatron_lm_names_reach_megatron_core_fields(flags, mapping, expected):
    assert getattr(megatron(*flags), mapping) == expected


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--moe-expert-capacity-factor", "1"], ["--moe-expert-capacity-factor is a Megatron-LM flag", "dropped"]),
        (["--moe-router-load-balancing-type", "sinkhorn"], ["--moe-router-load-balancing-type is 'sinkhorn'", "none"]),
        (["--moe-token-dispatcher-type", "ring"], ["--moe-token-dispatcher-type is 'ring'", "alltoall"]),
        (["--moe-layer-freq", "2"], ["--moe-layer-freq is '2'", "all layers of a Qwen3-MoE model have experts"]),
        (["--moe-layer-freq", "([0]+[1]*3)"], ["--moe-layer-freq is '([0]+[1]*3)'"]),
        (["--ckpt-format", "zarr"], ["--ckpt-format is 'zarr'", "torch_dist"]),
        (["--rotary-seq-len-interpolation-factor", "2"], ["--rotary-seq-len-interpolation-factor is '2'", "1"]),
        (["--expert-tensor-parallel-size", "0"], ["--expert-tensor-parallel-size is 0", ">= 1"]),
        (["--fp16"], ["--fp16", "use --bf16"]),
        (["--dino-head-hidden-size", "3"], ["--dino-head-hidden-size is a Megatron-LM flag that is not supported"]),
        (["--recompute-granularity", "full"], ["--recompute-method is None", "--recompute-granularity full"]),
        (["--recompute-method", "uniform"], ["--recompute-method is 'uniform'", "--recompute-granularity (None)"]),
        (
            ["--recompute-activations", "--recompute-granularity", "full"],
            ["--recompute-activations and --recompute-granularity contradict each other"],
        ),
        (
            ["--accumulate-allreduce-grads-in-fp32", "--grad-reduce-in-bf16"],
            ["--accumulate-allreduce-grads-in-fp32 and --grad-reduce-in-bf16 contradict each other"],
        ),
        (["--attention-dropout", "0.1"], ["--attention-dropout is 0.1", "0"]),
        (["--optimizer", "sgd"], ["--optimizer is 'sgd'", "adam"]),
        (["--lr-decay-style", "cosin"], ["--lr-decay-style is 'cosin'", "constant"]),
        (["--transformer-impl", "te"], ["--transformer-impl is 'te'", "local, transformer_engine"]),
        (
            ["--transformer-impl", "transformer_engine", "--device", "cpu"],
            ["--transformer-impl is 'transformer_engine'", "--device is cpu"],
        ),
        (["--cp-comm-type", "a2a+p2p"], ["--cp-comm-type is 'a2a+p2p'", "p2p, all_gather, a2a"]),
        (["--fp32-residual-connection"], ["--fp32-residual-connection is a Megatron-LM flag that is not supported"]),
        (["--tensor-model-parallel-size", "0"], ["--tensor-model-parallel-size is 0", ">= 1"]),
    ],
)
def test_wrong_megatron_flags_are_refused(flags, fragments):
    with pytest.raises(ValueError) as raised:
        megatron(*flags)
    for fragment in fragments:
        assert fragment in str(raised.value)


def test_every_flag_of_a_megatron_concept_has_megatron_lms_name():
    for option in [*megatron_options(), *options_of("megatron", MegatronSettings, "")]:
        for flag in option.flags:
            assert flag in MEGATRON_LM_FLAGS or flag == "--device", flag
    ours = {
        "hf_checkpoint",
        "output_dir",
        "export_hf",
        "auto_resume",
        "keep_last",
        "keep_best",
        "exit_grace_s",
        "node_timeout_s",
    }
    for option in options_of("run", RunSettings, ""):
        for flag in option.flags:
            assert flag in MEGATRON_LM_FLAGS or option.setting.removeprefix("run.") in ours, flag
    for flag in ("--global-batch-size", "--seq-length", "--micro-batch-size"):
        assert flag in MEGATRON_LM_FLAGS


def test_the_list_of_names_is_megatron_lms():
    assert len(MEGATRON_LM_FLAGS) == 845
    assert {"--tensor-model-parallel-size", "--disable-bias-linear", "--no-rope-fusion"} <= MEGATRON_LM_FLAGS
    assert not any(flag.startswith(("--fipo", "--sglang")) for flag in MEGATRON_LM_FLAGS)


def test_every_megatron_lm_flag_is_accepted_ignored_or_refused_and_only_one_of_them():
    options = all_options()
    accepted = {flag for option in options for flag in option.flags}
    assert not MEGATRON_LM_FLAGS & FORMER_FLAGS
    for flag in MEGATRON_LM_FLAGS | FORMER_FLAGS:
        is_refused = unsupported_reason(flag) is not None
        assert (flag in accepted) + (flag in IGNORED_FLAGS) + is_refused + (flag in NEWER_CORE - accepted) == 1, flag
    assert IGNORED_FLAGS.keys() <= MEGATRON_LM_FLAGS | FORMER_FLAGS
    assert ONLY_VALUES.keys() <= IGNORED_FLAGS.keys()
    assert SILENT.keys() <= IGNORED_FLAGS.keys()
    assert IGNORED_VALUES.keys() <= accepted
    for pattern in UNSUPPORTED_FLAGS:
        assert any(fnmatchcase(flag, pattern) for flag in MEGATRON_LM_FLAGS | FORMER_FLAGS), pattern


def test_every_refused_flag_is_named_with_its_reason():
    options = all_options()
    accepted = {flag for option in options for flag in option.flags}
    refused = sorted((MEGATRON_LM_FLAGS | FORMER_FLAGS) - accepted - set(IGNORED_FLAGS) - NEWER_CORE)
    with pytest.raises(ValueError) as raised:
        read_arguments(refused, options)
    parts = str(raised.value).split("; ")
    for flag in refused:
        assert f"{flag} is a Megatron-LM flag that is not supported here: {unsupported_reason(flag)}" in parts
    assert len(parts) == len(refused)


def test_fields_read_from_source_are_the_dataclasses_own():
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    classes = {"transformer": TransformerConfig, "optimizer": OptimizerConfig, "ddp": DistributedDataParallelConfig}
    for mapping, sources in CONFIG_SOURCES.items():
        read = {
            field.name: field for file, class_name in sources for field in read_fields(core_root() / file, class_name)
        }
        fields = {field.name: field for field in dataclasses.fields(classes[mapping])}
        assert set(read) == set(fields)
        for name, field in fields.items():
            default = read[name].default
            if isinstance(default, ast.Constant):
                assert default.value == field.default, name
            if value_type(read[name].annotation) == ValueType("bool"):
                assert field.default in (True, False)
    known = {field.name for cls in classes.values() for field in dataclasses.fields(cls)}
    assert set(FIELD_FLAGS) <= known
    for option in megatron_options():
        for setting in option.settings:
            _, mapping, name = setting.split(".")
            assert mapping == "model" or name in {field.name for field in dataclasses.fields(classes[mapping])}


def test_plain_values_become_megatrons_own():
    import torch
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.enums import AttnBackend

    from megatron_fipo.actor.megatron_flags import config_fields

    fields = config_fields({"attention_backend": "flash", "exp_avg_dtype": "bf16", "num_layers": 3})
    assert fields == {"attention_backend": AttnBackend.flash, "exp_avg_dtype": torch.bfloat16, "num_layers": 3}
    assert OptimizerConfig(**config_fields(megatron("--lr", "2e-6").optimizer_fields)).lr == 2e-6


def test_what_megatron_core_asserts_of_its_fields_is_an_error_of_the_user():
    import torch
    from megatron.core.optimizer import OptimizerConfig

    from megatron_fipo.actor.megatron_flags import checked_config

    assert checked_config(OptimizerConfig, {"lr": 2e-6}).lr == 2e-6
    with pytest.raises(ValueError, match=r"^megatron-core does not take these flags: exp_avg_dtype can only be fp32"):
        checked_config(OptimizerConfig, {"exp_avg_dtype": torch.bfloat16})


def test_contradictions_name_flag_and_both_values():
    explicit = {
        "num_layers": 12,
        "add_bias_linear": False,
        "qk_layernorm": True,
        "layernorm_epsilon": 1e-5,
        "fp8": "e4m3",
    }
    derived = {"num_layers": 30, "add_bias_linear": False, "qk_layernorm": False, "layernorm_epsilon": 1e-05}
    assert contradictions(explicit, derived) == [
        "--num-layers is 12, but the checkpoint's config.json says 30",
        "--qk-layernorm is given, but by the checkpoint's config.json qk_layernorm is False",
    ]
    assert contradictions({"vocab_size": 3}, {"vocab_size": 4}, lambda name: f"<{name}>") == [
        "<vocab_size> is 3, but the checkpoint's config.json says 4"
    ]
    assert contradictions({"rotary_base": 10000.0}, {"rotary_base": 10000}) == []


def test_flags_of_fields_are_the_ones_a_user_types():
    assert flag_of_field("layernorm_epsilon") == "--norm-epsilon"
    assert flag_of_field("add_bias_linear") == "--disable-bias-linear"
    assert flag_of_field("max_sequence_length") == "--max-position-embeddings"
    assert flag_of_field("hidden_size") == "--hidden-size"
    accepted = {flag for option in megatron_options() for flag in option.flags}
    assert {flag_of_field(name) for name in ARCHITECTURE_FIELDS} <= accepted


def test_every_accepted_flag_that_changes_the_architecture_is_compared():
    from megatron_fipo.weights import architecture

    arch = architecture.Architecture(
        family="qwen3_moe",
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=16,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=4,
        vocab_size=10,
        norm_epsilon=1e-5,
        rope_theta=1e4,
        rope_scaling_factor=8.0,
        max_position_embeddings=16,
        tied=True,
        qkv_bias=False,
        qk_layernorm=False,
        dtype=None,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=8,
        moe_router_pre_softmax=False,
    )
    derived = {**architecture.to_transformer_fields(arch), **architecture.to_gpt_model_fields(arch)}
    assert derived.keys() >= ARCHITECTURE_FIELDS - {"vocab_size", "group_query_attention"}


def test_source_annotations_become_value_types():
    def of(text):
        return value_type(ast.parse(text, mode="eval").body)

    assert of("Optional[int]") == ValueType("int")
    assert of("typing.Optional[float]") == ValueType("float")
    assert of("int | None") == ValueType("int")
    assert of("Literal['a', 'b']") == ValueType("str", ("a", "b"))
    assert of("Optional[List[str]]") == ValueType("str", many=True)
    assert of("Union[int, List[int], None]") == ValueType("int", many=True)
    assert of("Union[str, list, Layout]") == ValueType("str")
    assert of("Optional[Callable]") is None
    assert of("torch.dtype") is None


def test_the_reference_of_flags_is_up_to_date():
    subprocess.run([sys.executable, "tools/write_flags_doc.py", "--check"], cwd=ROOT, check=True)
