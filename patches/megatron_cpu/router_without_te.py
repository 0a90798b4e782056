"""Let a mixture of experts' router compute its logits without Transformer Engine.

Why: the router asks whether Transformer Engine's GEMM is None, but without Transformer Engine the name does not exist:
    NameError.
Upstream: megatron.core.transformer.moe.moe_utils.RouterGatingLinearFunction; the import at the module's top fails at
    its first line and so leaves `te_general_gemm` undefined.
Drop-when: the failed import defines the name.
Test: tests/distributed/test_patch_experts.py::test_router_without_te_is_needed
"""

from __future__ import annotations

from typing import Any, Final

from megatron.core.transformer.moe import moe_utils

REPLACES: Final = {
    "megatron.core.transformer.moe.moe_utils:te_general_gemm": "4cacf9a32aedd56d",
}


def apply() -> None:
    """Define the name, unless Transformer Engine has."""
    module: Any = moe_utils
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None
