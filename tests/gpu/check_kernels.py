"""The Triton kernels against the references, compiled: Future-KL with its influence weights, and the fused loss.

    python tests/gpu/check_kernels.py --case future_kl|fused_loss

What the CPU cannot show: that they compile for this GPU, that tiles running at the same time meet each other's carries,
and that 131072 tokens work. With --device cpu they run under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys

import torch
from checking import add_paths, arguments, require_close, require_modules, run_check
from torch import Tensor

add_paths()
LENGTHS = {"cuda": (1, 63, 64, 1000, 131072), "cpu": (1, 63, 130)}
TOLERANCE = 2e-6  # of the largest value, in fp32


def sequences(length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Packed sequences of `length`, 0, 1 and `length` // 2 + 1 tokens, in fp32 numbers; a mask with holes and a masked
    prefix, NaN outside of it."""
    generator = torch.Generator().manual_seed(length)
    lengths = [length, 0, 1, length // 2 + 1]
    total = sum(lengths)
    mask = torch.rand(total, generator=generator) > 0.1
    mask[: length // 4] = False
    old = -3 * torch.rand(total, generator=generator)
    made = {"logprobs": old + torch.randn(total, generator=generator), "old": old}
    made["advantages"] = torch.randn(total, generator=generator)
    made = {name: torch.where(mask, tensor, torch.nan).to(dtype) for name, tensor in made.items()}
    return {**made, "mask": mask, "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)}


def check_future_kl(options: argparse.Namespace, device: torch.device) -> str:
    """Both kernels against the plain loop in float64, and the influence weights' definition."""
    from megatron_fipo.ops import future_kl_triton as kernels
    from megatron_fipo.ops.future_kl import decay_factor, future_kl_reference, sequence_offsets

    worst, (low, high), dual_clip, safety = 0.0, (0.8, 1.2), 10.0, 3.0
    bounds = kernels.InfluenceBounds(math.log(dual_clip), low, high, safety, is_released=False)
    for length in LENGTHS[device.type]:
        data = sequences(length, torch.float32)
        shift = (data["logprobs"] - data["old"]).clamp(-20, 20)
        offsets, gamma = sequence_offsets(shift, data["cu_seqlens"]), decay_factor(32.0)
        on_device = [shift.to(device), data["mask"].to(device)]
        future, _ = kernels.scan_future_kl(*on_device, offsets.to(device), gamma)
        exact = future_kl_reference(shift.double(), data["mask"], 32.0, cu_seqlens=data["cu_seqlens"])
        worst = max(worst, require_close(future, exact, TOLERANCE, f"Future-KL of {length} tokens"))
        advantages = data["advantages"].to(device)
        (weights, _), _ = kernels.scan_influence(*on_device, advantages, bounds, offsets.to(device), gamma)
        takes_part = data["mask"] & ~(shift > math.log(dual_clip))
        exact = future_kl_reference(shift.double(), takes_part, 32.0, cu_seqlens=data["cu_seqlens"])
        unsafe = data["mask"] & (data["advantages"] < 0) & (shift.exp() > safety)
        wanted = torch.where(unsafe, 1.0, exact.exp().clamp(low, high))
        worst = max(worst, require_close(weights, wanted, 1e-5, f"influence weights of {length} tokens"))
    return f"up to {LENGTHS[device.type][-1]} tokens off by at most {worst:.1e}"


def check_fused_loss(options: argparse.Namespace, device: torch.device) -> str:
    """Loss and gradient in fp32 against tensor operations and autograd in float64."""
    from megatron_fipo.config import FIPOSettings, PPOSettings
    from megatron_fipo.losses.eager import eager_terms
    from megatron_fipo.losses.terms import policy_batch
    from megatron_fipo.ops.fipo_terms import triton_terms

    worst = 0.0
    settings = FIPOSettings(influence_low=0.8, influence_high=1.2, safety_threshold=3.0, half_life=8.0)
    for length in LENGTHS[device.type]:
        for given in (settings, PPOSettings()):
            with_influence = isinstance(given, FIPOSettings)
            data = {name: tensor.to(device) for name, tensor in sequences(length, torch.float32).items()}
            tokens = [data[name] for name in ("logprobs", "old", "advantages")]
            exact = [tensor.double() for tensor in tokens]
            batch = policy_batch(
                exact[0].requires_grad_(), *exact[1:], data["mask"], cu_seqlens=data["cu_seqlens"], group=None
            )
            wanted = eager_terms(batch, given, with_influence=with_influence)
            loss = wanted.weighted_sum(torch.ones(len(batch.offsets) - 1, dtype=torch.float64, device=device))
            (gradient,) = torch.autograd.grad(loss, batch.logprobs)
            found = triton_terms(*tokens, data["mask"], batch.offsets, given, with_influence=with_influence)
            what = f"{type(given).__name__}, {length} tokens"
            require_close(found.loss_sums.sum(), loss, 1e-4, f"loss of {what}")  # a sum of both signs
            worst = max(worst, require_close(found.gradient, gradient, 1e-5, f"gradient of {what}"))
    return f"gradients off by at most {worst:.1e} of the largest"


CASES = {"future_kl": check_future_kl, "fused_loss": check_fused_loss}


def check(options: argparse.Namespace, device: torch.device) -> str:
    require_modules("triton", "numpy")
    return CASES[options.case](options, device)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--case", choices=tuple(CASES), required=True)
    parsed = parser.parse_args()
    if parsed.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
    sys.exit(run_check(check, parsed))
