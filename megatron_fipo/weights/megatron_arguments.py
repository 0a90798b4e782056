"""An architecture as Megatron-LM's command line has it: what a checkpoint's `args` say, compared and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron_fipo.weights.architecture import Architecture, padded_vocab_size

DEFAULT_DIVISIBLE_BY = 128  # Megatron-LM's
LARGEST_TP = 64
"""What a vocabulary may have been padded for, before its `args` told of another tensor-parallel size. More rows beyond
config.json's are another vocabulary."""

NEUTRAL_ARGUMENTS: dict[str, tuple[object, ...]] = {
    "squared_relu": (False,),
    "openai_gelu": (False,),
    "onnx_safe": (False,),
    "quick_geglu": (False,),
    "multi_latent_attention": (False,),
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (1,),
    "qk_l2_norm": (False,),
    "no_rope_freq": (0, [], False),
    "window_size": ((-1, -1), [-1, -1]),
    "softmax_type": ("vanilla",),
    "attention_output_gate": (False,),
    "linear_attention_freq": (),
    "experimental_attention_variant": (),
    "mtp_num_layers": (0,),
    "glu_linear_offset": (0,),
    "activation_func_clamp_value": (),
    "moe_shared_expert_intermediate_size": (0,),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_topk_scaling_factor": (1,),
    "moe_router_num_groups": (),
    "moe_router_group_topk": (),
    "moe_apply_probs_on_input": (False,),
    "moe_layer_freq": (1,),
    "heterogeneous_layers_config_path": (),
    "hybrid_override_pattern": (),
    "hybrid_layer_pattern": (),
}
"""Arguments that would change the maths, with the values that do not; absence, or None, never does."""


def to_arguments(arch: Architecture) -> dict[str, Any]:
    """The arguments of Megatron-LM that the architecture decides, by their names in its `args`."""
    base = arch.rope_theta
    arguments: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "group_query_attention": arch.num_query_groups != arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.kv_channels,
        "position_embedding_type": "rope",
        "rotary_base": int(base) if base.is_integer() else base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": arch.rope_scaling_factor is not None,
        "normalization": "RMSNorm",
        "norm_epsilon": arch.norm_epsilon,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_layernorm,
        "untie_embeddings_and_output_weights": not arch.tied,
        "num_experts": arch.num_moe_experts,
    }
    if arch.rope_scaling_factor is not None:
        arguments["rope_scaling_factor"] = arch.rope_scaling_factor
    if arch.num_moe_experts:
        arguments |= {
            "moe_router_topk": arch.moe_router_topk,
            "moe_ffn_hidden_size": arch.moe_ffn_hidden_size,
            "moe_router_pre_softmax": arch.moe_router_pre_softmax,
            "moe_router_score_function": "softmax",
            "moe_layer_freq": 1,
        }
    return arguments


def argument_differences(arch: Architecture, arguments: Mapping[str, Any], where: str) -> list[str]:
    """What a checkpoint's `args` (`where` names their file) say against the architecture, one text for each.

    Arguments that the checkpoint's version of Megatron-LM did not have, or left None, say nothing.
    """
    wanted = to_arguments(arch)
    arguments = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    if arch.num_moe_experts:
        wanted.pop("ffn_hidden_size")  # of a dense layer, of which there is none: Megatron-LM has its own default
    if not arguments.get("group_query_attention"):
        wanted.pop("num_query_groups")  # then it is 1 and not looked at
    differences = [
        f"{where} says {name} {arguments[name]!r}, but config.json makes it {value!r}"
        for name, value in wanted.items()
        if not _agree(arguments.get(name), value)
    ]
    for name, neutral in NEUTRAL_ARGUMENTS.items():
        found = arguments.get(name)
        if name not in wanted and found is not None and found not in neutral:
            differences.append(f"{where} says {name} {found!r}, which a model of {arch.family} does not have")
    padded = arguments.get("padded_vocab_size")
    most_padding = _divisible_by(arguments) * max(_tp_size(arguments), LARGEST_TP)
    if isinstance(padded, int) and not 0 <= padded - arch.vocab_size < most_padding:
        differences.append(f"{where} says padded_vocab_size {padded}, but config.json has vocab_size {arch.vocab_size}")
    known = arguments.get("vocab_size")
    if isinstance(known, int) and known > arch.vocab_size:  # less is a tokenizer's, whose embedding has spare rows
        differences.append(f"{where} says vocab_size {known}, but config.json makes it {arch.vocab_size}")
    return differences


def vocabulary_note(arch: Architecture, arguments: Mapping[str, Any]) -> str | None:
    """What to say of a vocabulary with more padding than the `args` explain: a checkpoint of more tokens than
    config.json has, or one that was padded for another tensor-parallel size before."""
    padded, tp = arguments.get("padded_vocab_size"), _tp_size(arguments)
    expected = padded_vocab_size(arch.vocab_size, tp, _divisible_by(arguments))
    if not isinstance(padded, int) or padded <= expected:
        return None
    return (
        f"args says padded_vocab_size {padded}, but config.json's vocab_size {arch.vocab_size} is padded to {expected} "
        f"where tensor_model_parallel_size is {tp}: the rows from {arch.vocab_size} on were left out as padding; if "
        "tokens were added to the model, config.json must count them"
    )


def _divisible_by(arguments: Mapping[str, Any]) -> int:
    found = arguments.get("make_vocab_size_divisible_by")
    return found if type(found) is int and found >= 1 else DEFAULT_DIVISIBLE_BY


def _tp_size(arguments: Mapping[str, Any]) -> int:
    found = arguments.get("tensor_model_parallel_size")
    return found if type(found) is int and found >= 1 else 1


def _agree(found: object, wanted: object) -> bool:
    if found is None:
        return True
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=1e-9)
    if isinstance(found, list) and wanted == 1:  # moe_layer_freq: all layers, named one by one
        return set(found) == {1}
    return found == wanted
