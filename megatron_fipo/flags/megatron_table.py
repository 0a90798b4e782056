"""Megatron's flags: megatron-core's dataclass fields, under the names that Megatron-LM's own parser gives them.

The fields are read from the installed megatron-core's source, so that a version's own fields are offered, without
importing it. A field becomes a flag when Megatron-LM has one for it, by rule or by the table of exceptions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_fipo.flags.dataclass_source import SourceField, literal, read_fields, value_type
from megatron_fipo.flags.megatron_ignored import IGNORED_FLAGS
from megatron_fipo.flags.megatron_lm_names import MEGATRON_LM_FLAGS
from megatron_fipo.flags.megatron_unsupported import unsupported_reason
from megatron_fipo.flags.option import VALUE, Option, ValueType
from megatron_fipo.megatron_config import MegatronSettings

CONFIG_SOURCES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "transformer": (
        ("model_parallel_config.py", "ModelParallelConfig"),
        ("transformer/transformer_config.py", "TransformerConfig"),
    ),
    "optimizer": (("optimizer/optimizer_config.py", "OptimizerConfig"),),
    "ddp": (("distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig"),),
}
"""Where megatron-core declares what goes into each mapping of MegatronSettings, below megatron/core; bases first."""

FIELD_FLAGS: Mapping[str, Mapping[str, Any]] = {
    "add_bias_linear": {"--disable-bias-linear": False},
    "align_param_gather": {"--no-align-param-gather": False},
    "apply_rope_fusion": {"--no-rope-fusion": False},
    "attention_softmax_in_fp32": {"--attention-softmax-in-fp32": True},
    "average_in_collective": {"--ddp-average-in-collective": True},
    "barrier_with_L1_time": {"--no-barrier-with-level-1-timing": False},
    "bias_activation_fusion": {"--no-bias-swiglu-fusion": False, "--no-bias-gelu-fusion": False},
    "bias_dropout_fusion": {"--no-bias-dropout-fusion": False},
    "bucket_size": {"--ddp-bucket-size": VALUE},
    "check_for_nan_in_grad": {"--no-check-for-nan-in-loss-and-grad": False},
    "fp4": {"--fp4-format": VALUE},
    "fp4_param": {"--fp4-param-gather": True},
    "fp8": {"--fp8-format": VALUE},
    "fp8_param": {"--fp8-param-gather": True},
    "gated_linear_unit": {"--swiglu": True},
    "grad_reduce_in_fp32": {"--accumulate-allreduce-grads-in-fp32": True, "--grad-reduce-in-bf16": False},
    "gradient_accumulation_fusion": {"--no-gradient-accumulation-fusion": False},
    "gradient_reduce_div_fusion": {"--no-gradient-reduce-div-fusion": False},
    "layernorm_epsilon": {"--norm-epsilon": VALUE},
    "layernorm_zero_centered_gamma": {"--apply-layernorm-1p": True},
    "masked_softmax_fusion": {"--no-masked-softmax-fusion": False},
    "microbatch_group_size_per_vp_stage": {"--microbatch-group-size-per-virtual-pipeline-stage": VALUE},
    "muon_split_qkv": {"--muon-no-split-qkv": False},
    "muon_use_nesterov": {"--muon-nesterov": True},
    "nccl_ub": {"--use-nccl-ub": True},
    "num_layers_in_first_pipeline_stage": {"--decoder-first-pipeline-num-layers": VALUE},
    "num_layers_in_last_pipeline_stage": {"--decoder-last-pipeline-num-layers": VALUE},
    "num_moe_experts": {"--num-experts": VALUE},
    "overlap_p2p_comm": {"--no-overlap-p2p-communication": False},
    "overlap_p2p_comm_warmup_flush": {"--overlap-p2p-communication-warmup-flush": True},
    "pad_buckets_for_high_nccl_busbw": {"--ddp-pad-buckets-for-high-nccl-busbw": True},
    "perform_initialization": {"--no-initialization": False},
    "persist_layer_norm": {"--no-persist-layer-norm": False},
    "pin_cpu_grads": {"--no-pin-cpu-grads": False},
    "pin_cpu_params": {"--no-pin-cpu-params": False},
    "recompute_granularity": {"--recompute-granularity": VALUE, "--recompute-activations": "selective"},
    "reduce_scatter_with_fp32_accumulation": {"--ddp-reduce-scatter-with-fp32-accumulation": True},
    "test_mode": {},  # Megatron-LM's --test-mode is another thing: it is about validation
    "use_mamba_mem_eff_path": {"--disable-mamba-mem-eff-path": False},
    "use_te_rng_tracker": {"--te-rng-tracker": True},
}
"""The table of exceptions: fields whose flag is not `--field-name`, and what each of their flags stores."""

_MOMENTS = ValueType("str", ("fp32", "fp16", "bf16", "fp8"))
_TYPES: Mapping[str, ValueType] = {
    "attention_backend": ValueType("str", ("flash", "fused", "unfused", "local", "auto")),  # enum AttnBackend
    "cp_comm_type": ValueType("str", ("p2p", "all_gather", "a2a")),  # a2a+p2p wants a hierarchy of groups
    "optimizer": ValueType("str", ("adam",)),
    "moe_token_dispatcher_type": ValueType("str", ("alltoall",)),
    "moe_router_load_balancing_type": ValueType("str", ("none",)),
    "main_grads_dtype": ValueType("str", ("fp32", "bf16")),
    "main_params_dtype": ValueType("str", ("fp32", "fp16")),
    "exp_avg_dtype": _MOMENTS,
    "exp_avg_sq_dtype": _MOMENTS,
}
"""Types that the annotation does not give."""

_MODEL_OPTIONS: tuple[tuple[str, Mapping[str, Any], ValueType], ...] = (
    ("group_query_attention", {"--group-query-attention": True}, ValueType("bool")),
    ("share_embeddings_and_output_weights", {"--untie-embeddings-and-output-weights": False}, ValueType("bool")),
    (
        "position_embedding_type",
        {"--position-embedding-type": VALUE, "--use-rotary-position-embeddings": "rope"},
        ValueType("str", ("learned_absolute", "rope", "yarn", "mrope", "relative", "none")),
    ),
    ("rotary_base", {"--rotary-base": VALUE}, ValueType("float")),
    ("rotary_percent", {"--rotary-percent": VALUE}, ValueType("float")),
    ("rope_scaling", {"--use-rope-scaling": True}, ValueType("bool")),
    ("rope_scaling_factor", {"--rope-scaling-factor": VALUE}, ValueType("float")),
    ("max_sequence_length", {"--max-position-embeddings": VALUE}, ValueType("int")),
    ("vocab_size", {"--vocab-size": VALUE}, ValueType("int")),
    ("make_vocab_size_divisible_by", {"--make-vocab-size-divisible-by": VALUE}, ValueType("int")),
)
"""What Megatron-LM has a flag for but no dataclass field, by GPTModel's argument where there is one."""

ARCHITECTURE_FIELDS: frozenset[str] = frozenset(
    {
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "layernorm_epsilon",
        "layernorm_zero_centered_gamma",
        "apply_residual_connection_post_layernorm",
        "normalization",
        "gated_linear_unit",
        "add_bias_linear",
        "add_qkv_bias",
        "qk_layernorm",
        "rotary_interleaved",
        "num_moe_experts",
        "moe_router_topk",
        "moe_ffn_hidden_size",
        "moe_router_pre_softmax",
        "moe_router_score_function",
    }
) | frozenset(name for name, _, _ in _MODEL_OPTIONS if name != "make_vocab_size_divisible_by")
"""What a flag may say and the checkpoint decides: `contradictions` compares it."""

_MODEL_GROUP = "model and parallelism"
_LISTED_HELP: Mapping[str, str] = {
    "attention_backend": "Transformer Engine's attention",
    "recompute_granularity": "recompute activations: all of a layer, or its parts named by --recompute-modules",
    "recompute_method": "with full: recompute evenly sized chunks, or the first layers of a stage",
    "recompute_num_layers": "with full: layers of a chunk, or layers to recompute",
    "recompute_modules": "with selective: the parts (default: core_attn)",
    "moe_grouped_gemm": "all experts of a rank in one kernel, through Transformer Engine",
    "fp8": "train in FP8 through Transformer Engine",
    "fp8_recipe": "scaling in FP8, by default delayed",
    "overlap_grad_reduce": "overlap the reduction of gradients with the backward pass",
}
"""What the plain help shows of them, in our words."""


def megatron_options() -> list[Option]:
    """An option for every Megatron flag that is accepted and not one of our own settings, by the installed version.

    Raises ValueError when megatron-core is not installed.
    """
    root = core_root()
    own = {name for name in MegatronSettings.__dataclass_fields__ if name not in CONFIG_SOURCES}
    places: dict[str, list[str]] = {}
    fields: dict[str, SourceField] = {}
    for mapping, sources in CONFIG_SOURCES.items():
        for file, class_name in sources:
            for field in read_fields(root / file, class_name):
                place = f"megatron.{mapping}.{field.name}"
                if place not in places.setdefault(field.name, []):
                    places[field.name].append(place)
                fields.setdefault(field.name, field)
    options = [
        Option((f"megatron.model.{name}",), flags, value, _MODEL_GROUP, "compared with the checkpoint", listed=False)
        for name, flags, value in _MODEL_OPTIONS
    ]
    for name, settings in places.items():
        value = _TYPES.get(name) or value_type(fields[name].annotation)
        flags = {
            flag: stored
            for flag, stored in field_flags(fields[name]).items()
            if flag in MEGATRON_LM_FLAGS and flag not in IGNORED_FLAGS and unsupported_reason(flag) is None
        }
        if name not in own and value is not None and flags:
            group = _MODEL_GROUP if "transformer" in settings[0] else "batch and optimizer"
            words = _LISTED_HELP.get(name, fields[name].doc)
            options.append(Option(tuple(settings), flags, value, group, words, listed=name in _LISTED_HELP))
    return options


def field_flags(field: SourceField) -> Mapping[str, Any]:
    """The flags a field would have, and what each stores: from the table, else by Megatron-LM's rule."""
    if field.name in FIELD_FLAGS:
        return FIELD_FLAGS[field.name]
    name = field.name.replace("_", "-")
    value = value_type(field.annotation)
    if value is None or value.kind != "bool":
        return {f"--{name}": VALUE}
    if literal(field.default) is True:
        return {f"--no-{name}": False, f"--disable-{name}": False}
    return {f"--{name}": True}


def contradictions(
    explicit: Mapping[str, Any], derived: Mapping[str, Any], flag_of: Callable[[str], str] | None = None
) -> list[str]:
    """One line for every field that a flag gave and the checkpoint gives otherwise; empty when they agree.

    `explicit` are MegatronSettings.transformer and .model, `derived` the same fields as read from the checkpoint;
    fields that only one side has are not compared. `flag_of` names a field's flag. A shorter context than the
    checkpoint's is no contradiction, and neither is a group for every head.
    """
    flag_of = flag_of or flag_of_field
    lines = []
    for name in sorted(explicit.keys() & derived.keys()):
        given, wanted = explicit[name], derived[name]
        if given == wanted or (name == "max_sequence_length" and given < wanted):
            continue
        if name == "group_query_attention" and "num_query_groups" in explicit:
            continue  # that says more, and is compared itself
        flag = flag_of(name)
        if isinstance(given, bool):
            lines.append(f"{flag} is given, but by the checkpoint's config.json {name} is {wanted}")
        else:
            says = "has none" if wanted is None else f"says {wanted}"
            lines.append(f"{flag} is {given}, but the checkpoint's config.json {says}")
    return lines


def flag_of_field(name: str) -> str:
    """The flag of a megatron-core field or of a GPTModel argument: the first of its flags."""
    own = next((flags for model_name, flags, _ in _MODEL_OPTIONS if model_name == name), None)
    return next(iter(own or FIELD_FLAGS.get(name) or [f"--{name.replace('_', '-')}"]))


def core_root() -> Path:
    """The directory of the installed megatron.core. Raises ValueError when there is none."""
    spec = importlib.util.find_spec("megatron")
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / "core" / "transformer" / "transformer_config.py").is_file():
            return Path(location) / "core"
    raise ValueError("megatron-core is not installed: pip install megatron-core")
