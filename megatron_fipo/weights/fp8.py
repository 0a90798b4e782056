"""Rollout weights in FP8: blocks of 128 x 128 with a scale each, in the format of DeepSeek's published checkpoints.

A quantised weight [N, K] is two tensors: the weight, float8_e4m3fn, and NAME_scale_inv, fp32 [ceil(N / 128),
ceil(K / 128)], such that weight x scale_inv of its block is the original (arXiv 2412.19437, section 3.3).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.config import require
from megatron_fipo.weights.architecture import Architecture

BLOCK = 128
FP8_MAX = 448.0  # of float8_e4m3fn
QUANTIZATION_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
"""What config.json says of a model in this format; an engine that is to be sent FP8 weights must be started with it."""

_QUANTISED = tuple(
    f".{projection}_proj.weight" for projection in ("q", "k", "v", "o", "gate", "up", "down")
)  # of attention, FFN and experts; embedding, norms, biases, router and output layer stay as they are


def engine_arguments() -> dict[str, Any]:
    """SGLang's server arguments of an engine that is to be sent FP8 weights: the checkpoint's own are of no use to it,
    and it serves nothing until it was sent some."""
    overrides = json.dumps({"quantization_config": QUANTIZATION_CONFIG})
    return {"load_format": "dummy", "json_model_override_args": overrides}


def check_fp8(arch: Architecture, tp_size: int) -> None:
    """Raise ValueError for a model whose weights, cut over `tp_size` ranks of an engine, are not whole blocks, or that
    SGLang has no block-quantised layers for."""
    flag = "--rollout-fp8"
    require(arch.family != "llama", flag, True, "left out: SGLang's Llama has no place for block scales")
    ffn = arch.moe_ffn_hidden_size or arch.ffn_hidden_size
    for size, what in (
        (arch.hidden_size, "hidden size"),
        (arch.num_attention_heads * arch.kv_channels // tp_size, "query rows on each rank of an engine"),
        (arch.num_query_groups * arch.kv_channels // tp_size, "key rows on each rank of an engine"),
        (ffn // tp_size, "FFN channels on each rank of an engine"),
    ):
        require(size % BLOCK == 0, flag, True, f"left out: {size} {what} are no multiple of {BLOCK}")


def is_quantised(name: str) -> bool:
    """Whether the Hugging Face tensor `name` becomes FP8: the weights of linear layers."""
    return name.endswith(_QUANTISED)


def quantised_tensors(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of the two tensors that a quantised weight becomes, in the order of `quantise`."""
    num_blocks = tuple(-(-size // BLOCK) for size in shape)
    return [(name, shape, torch.float8_e4m3fn), (f"{name}_scale_inv", num_blocks, torch.float32)]


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [N, K] as (float8_e4m3fn [N, K], scale_inv fp32 [ceil(N / 128), ceil(K / 128)]).

    scale_inv is the block's largest magnitude / 448, so an element is off by at most 1/16 of itself, or by
    scale_inv / 1024 where that is more. A block of zeros has scale_inv 1. NaN and infinity raise ValueError: FP8 would
    hide them.
    """
    num_rows, num_columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -num_columns % BLOCK, 0, -num_rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [N / 128, 128, K / 128, 128]
    largest = blocks.abs().amax(dim=(1, 3))
    if not bool(largest.isfinite().all()):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has NaN or infinite elements: it has no FP8 form")
    scale_inv = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    scaled = (blocks / scale_inv[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    quantised = scaled.flatten(2, 3).flatten(0, 1)[:num_rows, :num_columns]
    return quantised.contiguous(), scale_inv


def dequantise(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """fp32 [N, K]: what an engine computes with."""
    num_rows, num_columns = weight.shape
    scales = scale_inv.repeat_interleave(BLOCK, 0)[:num_rows].repeat_interleave(BLOCK, 1)[:, :num_columns]
    return weight.float() * scales


def dequantised(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The stream of (name, tensor) with every FP8 weight and the scale that follows it made one bf16 tensor."""
    waiting: tuple[str, Tensor] | None = None
    for name, tensor in tensors:
        if waiting is not None:
            if name != f"{waiting[0]}_scale_inv":
                raise ValueError(f"{waiting[0]} is FP8, but {name} follows it, not its scale")
            yield waiting[0], dequantise(waiting[1], tensor).bfloat16()
            waiting = None
        elif tensor.dtype == torch.float8_e4m3fn:
            waiting = (name, tensor)
        else:
            yield name, tensor
    if waiting is not None:
        raise ValueError(f"{waiting[0]} is FP8, but its scale is missing")
