"""Explicit Megatron flags as megatron-core's dataclasses want them: plain values become enums and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend

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
