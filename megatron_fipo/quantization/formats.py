"""The quantised formats, and which models have a place in them."""

from __future__ import annotations

from typing import Literal, get_args

from megatron_fipo.config import require
from megatron_fipo.weights.architecture import Architecture

Format = Literal["fp8", "int4-awq", "nvfp4"]
FORMATS: tuple[Format, ...] = get_args(Format)
AWQ_GROUP_SIZES = (128, 64, 32)
"""What SGLang's AWQ kernels take, the coarsest first."""
ALIGNMENT = 16
"""Rows and columns of an FP8 or FP4 matrix product come in multiples of this; as many elements share an FP4 scale."""
FP8_MAX = 448.0  # of float8_e4m3fn
AWQ_PACKED = 8  # 4-bit rows of the transposed weight in one int32


def choose_group_size(arch: Architecture, quant_format: Format, wanted: int | None) -> int | None:
    """The group size of int4-awq: `wanted` (--group-size), or the coarsest that fits; None for the other formats.

    Raises ValueError for a model that has no place in the format, and for a group size that divides not all of the
    sizes that it cuts.
    """
    sizes = _input_sizes(arch)
    if quant_format != "int4-awq":
        require(wanted is None, "--group-size", wanted, "left out: it is for --format int4-awq")
        rows = {"query rows": arch.num_attention_heads * arch.kv_channels, "key rows": _key_rows(arch)}
        for what, size in (sizes | rows).items():
            require(
                size % ALIGNMENT == 0,
                "--format",
                quant_format,
                f"another one: {size} {what}, no multiple of {ALIGNMENT}",
            )
        return None
    require(
        not arch.num_moe_experts,
        "--format",
        quant_format,
        "fp8 for a mixture of experts: the experts' smoothing cannot be folded into what comes before them",
    )
    require(_key_rows(arch) % AWQ_PACKED == 0, "--format", quant_format, f"another one: {_key_rows(arch)} key rows")
    fitting = [size for size in AWQ_GROUP_SIZES if all(width % size == 0 for width in sizes.values())]
    told = ", ".join(f"{width} {what}" for what, width in sizes.items())
    require(bool(fitting), "--format", quant_format, f"another one: no group size of {AWQ_GROUP_SIZES} divides {told}")
    require(
        wanted is None or wanted in fitting,
        "--group-size",
        wanted,
        f"one of {fitting}, which divide this model's {told}",
    )
    return wanted or fitting[0]


def _input_sizes(arch: Architecture) -> dict[str, int]:
    """Columns of the linear layers' weights, which scales are shared along."""
    return {
        "hidden channels": arch.hidden_size,
        "attention channels": arch.num_attention_heads * arch.kv_channels,
        "FFN channels": arch.moe_ffn_hidden_size or arch.ffn_hidden_size,
    }


def _key_rows(arch: Architecture) -> int:
    return arch.num_query_groups * arch.kv_channels
