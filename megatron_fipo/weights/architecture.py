"""The decoder that a Hugging Face directory describes, as a value: read, checked, and told in Megatron's terms.

Whatever in config.json could change the maths is either carried by `Architecture` or refused: nothing is ignored.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from megatron_fipo.config import require
from megatron_fipo.parallel import ParallelLayout

Family = Literal["qwen2", "qwen3", "llama", "qwen3_moe"]
CAUSAL_LM_CLASS: dict[str, str] = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""The supported families by `model_type`, with the class whose maths they stand for."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),  # biases the attention's output too; Qwen2's own bias is not governed by it
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1,),
    "quantization_config": (),
    "auto_map": (),  # code that lies beside the weights
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "logits_scaling": (1,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "shared_expert_intermediate_size": (0,),
}
"""Fields of config.json that would change the maths, with the values that do not; null, or absence, never does."""

_QWEN_DEFAULTS: dict[str, Any] = {"vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
_LARGE_DEFAULTS: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
FAMILY_DEFAULTS: dict[Family, dict[str, Any]] = {
    "qwen2": _QWEN_DEFAULTS | _LARGE_DEFAULTS | {"intermediate_size": 22016, "num_key_value_heads": 32},
    "qwen3": _QWEN_DEFAULTS
    | _LARGE_DEFAULTS
    | {"intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128},
    "llama": {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    | _LARGE_DEFAULTS
    | {"intermediate_size": 11008},
    "qwen3_moe": _QWEN_DEFAULTS
    | {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 4}
    | {"intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts_per_tok": 8},
}
"""What transformers takes for a field that is absent from config.json."""

LLAMA3_ROPE: dict[str, float] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What Megatron's `rope_scaling` has built in; only the factor is free."""


@dataclass(frozen=True)
class Architecture:
    """A pre-norm decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU. Names follow Megatron's flags."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int  # size of one head
    vocab_size: int  # rows of the embedding in the Hugging Face file, unpadded
    norm_epsilon: float
    rope_theta: float
    rope_scaling_factor: float | None  # Llama 3's scaling, None: off
    max_position_embeddings: int
    tied: bool  # the output layer is the embedding
    qkv_bias: bool
    qk_layernorm: bool
    dtype: torch.dtype  # what config.json names; the tensors' own dtype is the files' affair
    # a mixture of experts in every layer, in place of the FFN of `ffn_hidden_size`; all None: there is none
    num_moe_experts: int | None = None
    moe_router_topk: int | None = None  # experts per token
    moe_ffn_hidden_size: int | None = None  # of one expert
    moe_router_pre_softmax: bool | None = None  # the chosen experts' weights are not normalised to sum 1


def read_architecture(hf_dir: str | Path) -> Architecture:
    """The architecture in `hf_dir`/config.json, as transformers 4 or 5 writes it.

    Raises ValueError naming the file, the field, the value found and the value wanted when the file is missing or
    malformed, when a field is missing, or when one asks for maths that is not built.
    """
    path = Path(hf_dir) / "config.json"
    config = read_config(hf_dir)
    family = config.get("model_type")
    require(
        isinstance(family, str) and family in CAUSAL_LM_CLASS,
        f"{path}: model_type",
        family,
        f"one of {sorted(CAUSAL_LM_CLASS)}",
    )
    family = cast(Family, family)
    config = FAMILY_DEFAULTS[family] | config
    if family == "qwen3_moe" and not {"num_experts", "num_local_experts"} & config.keys():
        config["num_experts"] = 128
    _check_neutral(path, config, family)

    num_heads = _positive_int(path, config, "num_attention_heads")
    hidden_size = _positive_int(path, config, "hidden_size")
    if config.get("num_key_value_heads") is None and family != "qwen3_moe":
        num_groups = num_heads  # null means so to transformers; Llama 1 and 2 leave the field out
    else:
        num_groups = _positive_int(path, config, "num_key_value_heads")
    require(
        num_heads % num_groups == 0,
        f"{path}: num_key_value_heads",
        num_groups,
        f"a divisor of num_attention_heads ({num_heads})",
    )
    has_qk_norm = family in ("qwen3", "qwen3_moe")
    if config.get("head_dim") is None and family != "qwen3":
        require(hidden_size % num_heads == 0, f"{path}: hidden_size", hidden_size, f"a multiple of {num_heads} heads")
        head_dim = hidden_size // num_heads
    else:
        head_dim = _positive_int(path, config, "head_dim")
    require(head_dim % 2 == 0, f"{path}: head_dim", head_dim, "even (RoPE turns pairs)")

    is_tied = _read_bool(path, config, "tie_word_embeddings", absent=False)
    require(
        not is_tied or family != "qwen3_moe",
        f"{path}: tie_word_embeddings",
        is_tied,
        "false: SGLang gives this family an output layer of its own and would generate with an empty one",
    )
    rope_theta, rope_scaling_factor = _read_rope(path, config)
    dtype_name = config.get("dtype") or config.get("torch_dtype") or "float32"
    require(
        isinstance(dtype_name, str) and dtype_name in DTYPES, f"{path}: dtype", dtype_name, f"one of {sorted(DTYPES)}"
    )
    return Architecture(
        family=family,
        num_layers=_positive_int(path, config, "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=_positive_int(path, config, "intermediate_size"),
        num_attention_heads=num_heads,
        num_query_groups=num_groups,
        kv_channels=head_dim,
        vocab_size=_positive_int(path, config, "vocab_size"),
        norm_epsilon=_positive_float(path, config.get("rms_norm_eps"), "rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling_factor=rope_scaling_factor,
        max_position_embeddings=_positive_int(path, config, "max_position_embeddings"),
        tied=is_tied,
        qkv_bias=family == "qwen2",
        qk_layernorm=has_qk_norm,
        dtype=DTYPES[dtype_name],
        **(_read_experts(path, config) if family == "qwen3_moe" else {}),
    )


def check_layout(arch: Architecture, layout: ParallelLayout) -> None:
    """Raise ValueError naming the flag, the size found and what it must divide, when the model cannot be cut so."""
    tp, tp_flag = layout.tp, "--tensor-model-parallel-size"
    for count, what in (
        (arch.num_attention_heads, "attention heads"),
        (arch.num_query_groups, "query groups (key-value heads)"),
        (0 if arch.num_moe_experts else arch.ffn_hidden_size, "FFN channels"),
    ):
        require(count % tp == 0, tp_flag, tp, f"a divisor of the model's {count} {what}")
    _check_expert_layout(arch, layout)
    num_stages = layout.pp * layout.vpp
    flag = "--pipeline-model-parallel-size" + (" x virtual stages per pipeline rank" if layout.vpp > 1 else "")
    require(arch.num_layers % num_stages == 0, flag, num_stages, f"a divisor of the model's {arch.num_layers} layers")


def to_transformer_fields(arch: Architecture) -> dict[str, Any]:
    """megatron-core's TransformerConfig fields that the architecture decides, all but `activation_func` (SiLU)."""
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.kv_channels,
        "layernorm_epsilon": arch.norm_epsilon,
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": False,
        "apply_residual_connection_post_layernorm": False,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_layernorm,
        "rotary_interleaved": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "num_moe_experts": arch.num_moe_experts,
        **(_expert_fields(arch) if arch.num_moe_experts else {}),
    }


def _expert_fields(arch: Architecture) -> dict[str, Any]:
    """What the router and the experts add. The softmax over all experts, cut to the chosen ones and normalised, is the
    softmax over the chosen ones; not normalised, it has to come before the choice."""
    return {
        "moe_router_topk": arch.moe_router_topk,
        "moe_ffn_hidden_size": arch.moe_ffn_hidden_size,
        "moe_router_pre_softmax": arch.moe_router_pre_softmax,
        "moe_router_score_function": "softmax",
        "moe_layer_freq": 1,
    }


def to_gpt_model_fields(arch: Architecture) -> dict[str, Any]:
    """megatron-core's GPTModel arguments that the architecture decides; the padded vocabulary is the layout's."""
    fields: dict[str, Any] = {
        "max_sequence_length": arch.max_position_embeddings,
        "share_embeddings_and_output_weights": arch.tied,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_base": arch.rope_theta,
        "rope_scaling": arch.rope_scaling_factor is not None,
    }
    if arch.rope_scaling_factor is not None:
        fields["rope_scaling_factor"] = arch.rope_scaling_factor
    return fields


def padded_vocab_size(vocab_size: int, tp: int, divisible_by: int = 1) -> int:
    """The smallest multiple of `divisible_by` x `tp` that holds `vocab_size` rows.

    `divisible_by` is Megatron's `--make-vocab-size-divisible-by`, whose default of 128 is a choice of speed; the
    default here pads no more than the cut needs. Checkpoints still move between layouts: torch_dist marks the
    vocabulary's tensors `allow_shape_mismatch`, so that they load under any padding.
    """
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face checkpoint with its shape, in the order of export. Tied: no lm_head.weight."""
    hidden, dim = arch.hidden_size, arch.kv_channels
    rows = {"q": arch.num_attention_heads * dim, "k": arch.num_query_groups * dim, "v": arch.num_query_groups * dim}
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for which, num_rows in rows.items():
        layer[f"self_attn.{which}_proj.weight"] = (num_rows, hidden)
        if arch.qkv_bias:
            layer[f"self_attn.{which}_proj.bias"] = (num_rows,)
    if arch.qk_layernorm:
        layer |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    layer |= {
        "self_attn.o_proj.weight": (hidden, rows["q"]),
        "post_attention_layernorm.weight": (hidden,),
    }
    if arch.num_moe_experts:
        assert arch.moe_ffn_hidden_size is not None, arch
        layer["mlp.gate.weight"] = (arch.num_moe_experts, hidden)
        for expert in range(arch.num_moe_experts):
            layer |= _ffn_shapes(f"mlp.experts.{expert}", arch.moe_ffn_hidden_size, hidden)
    else:
        layer |= _ffn_shapes("mlp", arch.ffn_hidden_size, hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (arch.vocab_size, hidden)}
    for index in range(arch.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not arch.tied:
        shapes["lm_head.weight"] = (arch.vocab_size, hidden)
    return shapes


def _ffn_shapes(prefix: str, ffn: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (ffn, hidden),
        f"{prefix}.up_proj.weight": (ffn, hidden),
        f"{prefix}.down_proj.weight": (hidden, ffn),
    }


def _check_expert_layout(arch: Architecture, layout: ParallelLayout) -> None:
    ep, ep_flag = layout.ep, "--expert-model-parallel-size"
    etp, etp_flag = layout.etp, "--expert-tensor-parallel-size"
    if not arch.num_moe_experts:
        require(ep == 1, ep_flag, ep, f"1: a {arch.family} model has no experts")
        require(etp in (1, layout.tp), etp_flag, etp, f"unset: a {arch.family} model has no experts")
        return
    assert arch.moe_ffn_hidden_size is not None, arch
    require(arch.num_moe_experts % ep == 0, ep_flag, ep, f"a divisor of the model's {arch.num_moe_experts} experts")
    ffn = arch.moe_ffn_hidden_size
    require(ffn % etp == 0, etp_flag, etp, f"a divisor of an expert's {ffn} FFN channels")
    require(  # else Megatron would reduce the experts' gradients with the other parameters', over other ranks
        ep > 1 or etp == layout.tp,
        etp_flag,
        etp,
        f"--tensor-model-parallel-size ({layout.tp}) when --expert-model-parallel-size is 1",
    )
    require(
        layout.tp == 1 or layout.sequence_parallel,
        "--sequence-parallel",
        layout.sequence_parallel,
        f"given with --tensor-model-parallel-size {layout.tp}: the ranks share out the tokens for the experts",
    )


def _read_experts(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a mixture of experts. `num_experts`, as published, is `num_local_experts` to transformers 5.

    `router_aux_loss_coef` is of no account: transformers adds that loss only where `output_router_logits` is set, and a
    policy is trained on its policy loss alone.
    """
    names = [name for name in ("num_experts", "num_local_experts") if config.get(name) is not None]
    counts = {_positive_int(path, config, name) for name in names or ["num_experts"]}
    require(len(counts) == 1, f"{path}: num_local_experts", config.get("num_local_experts"), "equal to num_experts")
    num_experts = counts.pop()
    topk = _positive_int(path, config, "num_experts_per_tok")
    require(topk <= num_experts, f"{path}: num_experts_per_tok", topk, f"at most the {num_experts} experts")
    is_normalised = _read_bool(path, config, "norm_topk_prob", absent=False)
    require(
        topk > 1 or not is_normalised,
        f"{path}: norm_topk_prob",
        is_normalised,
        "false with num_experts_per_tok 1: one normalised weight is always 1",
    )
    return {
        "num_moe_experts": num_experts,
        "moe_router_topk": topk,
        "moe_ffn_hidden_size": _positive_int(path, config, "moe_intermediate_size"),
        "moe_router_pre_softmax": not is_normalised,
    }


def _check_neutral(path: Path, config: Mapping[str, Any], family: Family) -> None:
    """Refuse every field that asks for maths beyond `Architecture`."""
    for name, neutral in NEUTRAL_VALUES.items():
        if name == "attention_bias" and family == "qwen2":
            continue  # transformers' Qwen2 has no such field: its bias is fixed
        if name in ("num_experts", "num_local_experts") and family == "qwen3_moe":
            continue
        found = config.get(name)
        wanted = f"{neutral[0]!r}: nothing else is supported" if neutral else "absent: it is not supported"
        require(found is None or found in neutral, f"{path}: {name}", found, wanted)
    if family == "llama":
        found = config.get("sliding_window")
        require(found is None, f"{path}: sliding_window", found, "absent: sliding windows are not supported")
    layer_types = config.get("layer_types") or ["full_attention"]
    require(
        isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types),
        f"{path}: layer_types",
        sorted({str(kind) for kind in layer_types}) if isinstance(layer_types, list) else layer_types,
        "full_attention in every layer: sliding windows are not supported",
    )
    architectures = config.get("architectures") or [CAUSAL_LM_CLASS[family]]
    require(
        architectures == [CAUSAL_LM_CLASS[family]],
        f"{path}: architectures",
        architectures,
        f"[{CAUSAL_LM_CLASS[family]!r}] for model_type {family!r}",
    )


def _read_rope(path: Path, config: Mapping[str, Any]) -> tuple[float, float | None]:
    """(theta, Llama 3 scaling factor or None) from transformers 5's rope_parameters or 4's rope_theta, rope_scaling."""
    given = [name for name in ("rope_parameters", "rope_scaling") if config.get(name) is not None]
    for name in given:
        require(isinstance(config[name], dict), f"{path}: {name}", config[name], "an object")
    if len(given) == 2:  # transformers takes the second, other programs the first
        one, other = (_without_theta(config[name]) for name in given)
        require(one == other, f"{path}: rope_scaling", config["rope_scaling"], f"rope_parameters' values, {one}")
    field = given[0] if given else "rope_scaling"
    rope = config.get(field) or {}
    where = f"{path}: {field}"

    found = [place.get("rope_theta") for place in (*(config[name] for name in given), config)]
    thetas = [theta for theta in found if theta is not None]
    require(all(theta == thetas[0] for theta in thetas), f"{path}: rope_theta", thetas, "the same in every place")
    theta = _positive_float(path, thetas[0] if thetas else 10000.0, "rope_theta")  # the three families' default

    rope_type = rope.get("rope_type", rope.get("type", "default"))
    require(rope_type in ("default", "llama3"), f"{where}.rope_type", rope_type, "'default' or 'llama3'")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    known |= {"factor", *LLAMA3_ROPE} if rope_type == "llama3" else set()
    unknown = sorted(set(rope) - known)
    require(not unknown, where, unknown, f"without these: {rope_type!r} RoPE has {sorted(known)}")
    partial = rope.get("partial_rotary_factor")
    require(partial in (None, 1), f"{where}.partial_rotary_factor", partial, "1: nothing else is supported")
    if rope_type == "default":
        return theta, None
    rope = rope | {name: config[name] for name in LLAMA3_ROPE if config.get(name) is not None}  # transformers' order
    for name, wanted in LLAMA3_ROPE.items():
        require(rope.get(name) == wanted, f"{where}.{name}", rope.get(name), f"{wanted}: Megatron has it built in")
    return theta, _positive_float(path, rope.get("factor"), f"{field}.factor")


def _without_theta(rope: Mapping[str, Any]) -> dict[str, Any]:
    """What an object says of RoPE besides theta, whichever name the type has."""
    told = {"rope_type": rope.get("type", "default"), **rope}
    return {name: value for name, value in told.items() if name not in ("type", "rope_theta")}


def read_config(hf_dir: str | Path) -> dict[str, Any]:
    """The JSON object in `hf_dir`/config.json. Raises ValueError naming the file and, if malformed, the line."""
    path = Path(hf_dir) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): a Hugging Face model's directory has one"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    require(isinstance(found, dict), str(path), type(found).__name__, "a JSON object")
    return cast("dict[str, Any]", found)


def _positive_int(path: Path, config: Mapping[str, Any], name: str) -> int:
    found = config.get(name)
    require(type(found) is int and found >= 1, f"{path}: {name}", found, "an integer >= 1")
    return cast(int, found)


def _positive_float(path: Path, found: object, name: str) -> float:
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    is_usable = is_number and 0 < cast(float, found) <= sys.float_info.max
    require(is_usable, f"{path}: {name}", found, "a finite number > 0")
    return float(cast(float, found))


def _read_bool(path: Path, config: Mapping[str, Any], name: str, *, absent: bool) -> bool:
    found = config.get(name, absent)
    require(isinstance(found, bool), f"{path}: {name}", found, "true or false")
    return cast(bool, found)
