"""Explicit Megatron flags as megatron-core's dataclasses want them, and what those say against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from megatron.core.transformer.enums import AttnBackend

C = TypeVar("C")

_DTYPE_FIELDS = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}


def config_fields(explicit: Mapping[str, Any]) -> dict[str, Any]:
    """One of MegatronSettings' mappings (`transformer`, `optimizer`, `ddp`) with enums and dtypes in place of names."""
    fields = dict(explicit)
    if "attention_backend" in fields:
        fields["attention_backend"] = AttnBackend[fields["attention_backend"]]
    for name in _DTYPE_FIELDS:
        if name in fields:
            fields[name] = _DTYPES[fields[name]]
    return fields


def checked_config(config_class: Callable[..., C], fields: Mapping[str, Any]) -> C:
    """One of megatron-core's configurations. Raises ValueError with its own words for fields it does not take together:
    it asserts as often as it raises."""
    try:
        return config_class(**fields)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"megatron-core does not take these flags: {' '.join(str(error).split())}") from error
