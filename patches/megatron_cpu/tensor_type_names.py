"""Let megatron-core's optimizers accept CPU tensors where they compare type names.

Why: they sort parameters by `param.type()`, whose only known names are 'torch.cuda.FloatTensor' and its half siblings.
Upstream: DistributedOptimizer._build_model_and_main_param_groups, Float16OptimizerWithFloat16Params.__init__,
    clip_grads.clip_grad_by_total_norm_fp32 (also imported by name into optimizer.optimizer).
Drop-when: they compare dtypes.
Test: tests/distributed/test_patch_megatron.py::test_tensor_type_names_is_needed

While one of these functions runs, `Tensor.type()` without arguments names a CPU tensor as its CUDA sibling.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

REPLACES: Final = {
    "megatron.core.optimizer.distrib_optimizer:"
    "DistributedOptimizer._build_model_and_main_param_groups": "2845e6b20d9490e4",
    "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__": "8743ab2b43382ad4",
    "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32": "ca34f24bff3dbb7a",
    "megatron.core.optimizer.optimizer:clip_grad_by_total_norm_fp32": "bdae562b69bb3659",
}


def apply() -> None:
    """Wrap the three functions."""
    build = distrib_optimizer.DistributedOptimizer.__dict__["_build_model_and_main_param_groups"].__func__
    distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups = classmethod(_wrapped(build))
    half = optimizer.Float16OptimizerWithFloat16Params
    half.__init__ = _wrapped(half.__init__)
    clip = _wrapped(clip_grads.clip_grad_by_total_norm_fp32)
    clip_grads.clip_grad_by_total_norm_fp32 = clip
    optimizer.clip_grad_by_total_norm_fp32 = clip


def _wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    real = torch._C.TensorBase.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del torch.Tensor.type
