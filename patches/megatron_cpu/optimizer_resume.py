"""Let the distributed optimizer resume when its Adam is torch's.

Why: (a) loading looks for a per-parameter tensor 'step' that the checkpoint keeps in the parameter groups: KeyError;
    (b) afterwards every parameter holds the SAME step tensor, which torch's AdamW advances once per parameter, so that
    a resumed run silently diverges.
Upstream: DistributedOptimizer._set_main_param_and_optimizer_states and .load_state_dict; Apex's and Transformer
    Engine's Adam keep no per-parameter step and are not affected.
Drop-when: megatron-core gives each parameter its own step, and skips it when it copies tensors.
Test: tests/distributed/test_patch_megatron.py::test_optimizer_resume_is_needed
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

REPLACES: Final = {
    "megatron.core.optimizer.distrib_optimizer:"
    "DistributedOptimizer._set_main_param_and_optimizer_states": "633ed69b862ba3fb",
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict": "cb1b0f07d84262d9",
}


def apply() -> None:
    """Wrap the two methods."""
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load = DistributedOptimizer.load_state_dict

    @functools.wraps(set_states)
    def set_with_step(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        own_step = {"step": state["step"]} if "step" in state else {}
        set_states(self, model_param, {**own_step, **tensors})

    @functools.wraps(load)
    def load_with_own_steps(self: Any, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    DistributedOptimizer._set_main_param_and_optimizer_states = set_with_step
    DistributedOptimizer.load_state_dict = load_with_own_steps
