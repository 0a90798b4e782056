"""Mixture-of-experts layers: what they are built of without Transformer Engine, and how a policy's are trained.

Routing is dropless: every token reaches its experts, so no log-prob depends on what else is in the pack.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

ROUTER_FIELDS: dict[str, Any] = {
    "moe_router_load_balancing_type": "none",  # a policy is trained on its policy loss alone
    "moe_aux_loss_coeff": 0.0,
    "moe_router_dtype": "fp32",  # a choice between experts is a jump: rounding must not make it
}
"""TransformerConfig's fields for the router, unless a flag says otherwise."""


def local_moe_spec() -> ModuleSpec:
    """The layer's experts one after the other, each a gated MLP of Megatron's tensor-parallel linear layers."""
    expert = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(experts=ModuleSpec(module=SequentialMLP, submodules=expert)),
    )
