"""Compile every form of the Future-KL kernel for an H100 or H200, on a machine that needs no GPU."""

from __future__ import annotations

import itertools

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_fipo.ops import future_kl_triton as kernels

POINTERS = {"mask_ptr": "*u8", "advantages_ptr": "*fp32", "offsets_ptr": "*i64", "carries_ptr": "*fp64"}
POINTERS |= {"totals_ptr": "*fp64", "board_ptr": "*i64"}
NUMBERS = ("num_tokens", "num_segments", "num_tiles", "row_len")
BOUNDS = {"LOG_DUAL_CLIP": 2.3, "LOW": 0.8, "HIGH": 1.2, "LOG_LOW": -0.2, "LOG_HIGH": 0.2, "SAFETY_THRESHOLD": 3.0}
# with influence, semantics released, carries, rows, long rows, half-life
FORMS = [(False, False, False, True, True, 32.0), (True, True, True, False, False, 0.05)]
FORMS += [(True, False, False, True, False, 32.0), (False, False, False, False, False, 32.0)]


def main() -> None:
    num_compiled = 0
    for dtype, form in itertools.product(("fp32", "fp64"), FORMS):
        influence, released, carries, rows, long_rows, half_life = form
        given = dict.fromkeys(("values_ptr", "future_ptr", "weights_ptr"), f"*{dtype}") | POINTERS
        constants: dict[str, object] = {
            **BOUNDS,
            "GAMMA": 2 ** (-1 / half_life),
            "IS_RELEASED": released,
            "WITH_INFLUENCE": influence,
            "HAS_CARRIES": carries,
            "IS_ROWS": rows,
            "HAS_LONG_ROWS": long_rows,
            "TILE_LEN": kernels.TILE_LEN,
        }
        # Triton takes a number that is 1 for a constant
        given |= dict.fromkeys(NUMBERS, "i32") if dtype == "fp32" else {}
        constants |= dict.fromkeys(NUMBERS, 1) if dtype == "fp64" else {}
        names = kernels._scan_tile.arg_names
        signature = {name: given.get(name, "constexpr") for name in names}
        source = ASTSource(kernels._scan_tile, signature, {(names.index(name),): constants[name] for name in constants})
        compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": kernels.NUM_WARPS})
        num_compiled += len(compiled.asm["cubin"]) > 0
    print(f"{num_compiled} compiled")


if __name__ == "__main__":
    main()
