"""Compile every form of the fused loss's kernels for an H100 or H200, on a machine that needs no GPU."""

from __future__ import annotations

import math
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_fipo.ops import fipo_terms_triton as kernels

BYTES = dict.fromkeys(("mask_ptr", "outside_ptr", "decisions_ptr"), "*u8")
INTEGERS = dict.fromkeys(("offsets_ptr", "first_programs_ptr", "partial_counts_ptr", "counts_ptr"), "*i64")
SUMS = dict.fromkeys(("partial_sums_ptr", "loss_sums_ptr"), "*fp64")
NUMBERS = dict.fromkeys(("num_tokens", "num_seqs", "num_programs"), "i32")


def compile_kernel(kernel: Any, token_dtype: str, constants: dict[str, Any]) -> bool:
    names = kernel.arg_names
    given = BYTES | INTEGERS | SUMS | NUMBERS | dict.fromkeys(constants, "constexpr")
    signature = {name: given.get(name, f"*{token_dtype}") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): constants[name] for name in constants})
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": kernels.NUM_WARPS})
    return len(compiled.asm["cubin"]) > 0


def main() -> None:
    num_compiled = int(compile_kernel(kernels._sum_programs, "fp32", {"SUM_LEN": kernels.SUM_LEN}))
    for dtype in ("fp32", "fp64"):
        tile = {"TILE_LEN": kernels.TILE_LEN}
        num_compiled += compile_kernel(kernels._shift_tile, dtype, {"BOUND": 20.0, **tile})
        for dual_clip, has_weights, has_token_weights in (
            (10.0, True, False),
            (math.inf, False, False),
            (10.0, True, True),
        ):
            bounds = {"RATIO_LOW": 0.8, "RATIO_HIGH": 1.28, "DUAL_CLIP": dual_clip, "HAS_WEIGHTS": has_weights}
            bounds["HAS_TOKEN_WEIGHTS"] = has_token_weights
            num_compiled += compile_kernel(kernels._clip_tile, dtype, {**bounds, **tile})
    print(f"{num_compiled} compiled")


if __name__ == "__main__":
    main()
