"""The fused loss's Triton kernels against tensor operations and autograd."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo.config import FIPOSettings, PPOSettings
from megatron_fipo.losses.eager import eager_terms
from megatron_fipo.losses.terms import policy_batch
from megatron_fipo.ops.fipo_terms import FusedTerms, triton_terms

pytest.importorskip("triton", reason="triton is not on the path: bash tests/run.sh kernels")
kernels: Any = pytest.importorskip("megatron_fipo.ops.fipo_terms_triton")

# NumPy speaks up where the interpreter multiplies 0 by an infinity
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
BASE = FIPOSettings(influence_low=0.8, influence_high=1.2, safety_threshold=3.0, half_life=8.0)
SETTINGS: dict[str, PPOSettings] = {
    "paper": BASE,
    "released": dataclasses.replace(BASE, semantics="released"),
    "dapo": PPOSettings(),
    "no dual clip": PPOSettings(dual_clip=None),
}
# on both sides of a tile of 1024 tokens, several tiles, empty sequences first, last and between
PACKS = ([1], [63], [64], [1000], [0, 1024, 0, 1025, 3, 2500, 0], [0, 0], [])
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(lengths: list[int], dtype: torch.dtype, spread: float = 1.0) -> tuple[Inputs, Tensor]:
    """Log-probs, old log-probs, advantages and mask with holes, all [T] and NaN off the mask; and cu_seqlens."""
    generator = torch.Generator().manual_seed(len(lengths))
    num_tokens = sum(lengths)
    old = -torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    new = old + spread * torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    advantages = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    mask = torch.rand(num_tokens, generator=generator) < 0.8
    tensors = (torch.where(mask, tensor, torch.nan).to(dtype) for tensor in (new, old, advantages))
    return (*tensors, mask), torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)  # type: ignore[return-value]


def make_weights(inputs: Inputs) -> Tensor:
    """Token weights [T], some of them 0, NaN off the mask."""
    weights = 2 * torch.rand(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=inputs[0].dtype)
    weights[weights < 0.5] = 0.0
    return torch.where(inputs[3], weights, torch.nan)


def assert_terms_agree(
    inputs: Inputs,
    cu_seqlens: Tensor,
    settings: PPOSettings,
    device: torch.device,
    token_weights: Tensor | None = None,
) -> FusedTerms:
    with_influence = isinstance(settings, FIPOSettings)
    batch = policy_batch(
        inputs[0].clone().requires_grad_(),
        *inputs[1:],
        cu_seqlens=cu_seqlens,
        group=None,
        token_weights=token_weights,
    )
    wanted = eager_terms(batch, settings, with_influence=with_influence)
    arguments = [tensor.to(device) for tensor in (*inputs, batch.offsets)]
    on_device = None if token_weights is None else token_weights.to(device)
    found = triton_terms(*arguments, settings, with_influence=with_influence, token_weights=on_device)
    tolerance = TOLERANCE[inputs[0].dtype]

    def assert_near(found: Tensor | None, wanted: Tensor | None) -> None:
        if found is None or wanted is None:
            assert found is wanted
            return
        torch.testing.assert_close(
            found.cpu(), wanted, rtol=tolerance, atol=tolerance, equal_nan=True, check_dtype=False
        )

    for name in ("num_tokens", "num_dual_clipped", "influence_weights", "future_kl"):
        assert_near(getattr(found, name), getattr(wanted, name))
    assert found.token_stats.keys() == wanted.token_stats.keys()
    for name, values in wanted.token_stats.items():
        assert_near(found.token_stats[name], values)
    num_seqs = wanted.num_tokens.numel()
    factors = torch.arange(1, num_seqs + 1, dtype=torch.float64)  # tell the sequences apart
    wanted_sum = wanted.weighted_sum(factors)
    assert_near((found.loss_sums.cpu() * factors).sum(), wanted_sum.detach())
    if num_seqs:
        (gradient,) = torch.autograd.grad(wanted_sum, batch.logprobs)
        assert_near(found.gradient.cpu() * factors.repeat_interleave(batch.offsets.diff()), gradient)
    return found


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("lengths", PACKS)
def test_kernels_agree_with_autograd(dtype: torch.dtype, name: str, lengths: list[int], device: torch.device) -> None:
    inputs, cu_seqlens = make_inputs(lengths, dtype)
    found = assert_terms_agree(inputs, cu_seqlens, SETTINGS[name], device)
    if len(lengths) > 2:
        assert int(found.num_dual_clipped.sum()) == 0 if name == "no dual clip" else int(found.num_dual_clipped[5]) > 1
    weighted = assert_terms_agree(inputs, cu_seqlens, SETTINGS[name], device, make_weights(inputs))
    assert torch.equal(found.num_dual_clipped, weighted.num_dual_clipped)
    if len(lengths) > 2:
        assert not torch.equal(found.loss_sums, weighted.loss_sums)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 20.5, -20.5])
def test_what_is_not_finite_shows_and_the_clamp_has_no_gradient(value: float, device: torch.device) -> None:
    (new, old, advantages, mask), cu_seqlens = make_inputs([70, 90, 5], torch.float64, spread=0.1)
    mask[100], old[100], new[100], advantages[100] = True, 0.0, value, -1.0
    for settings in SETTINGS.values():
        found = assert_terms_agree((new, old, advantages, mask), cu_seqlens, settings, device)
        assert found.loss_sums.isnan().tolist() == [False, abs(value) != 20.5, False]
        weights = torch.zeros_like(new)
        found = assert_terms_agree((new, old, advantages, mask), cu_seqlens, settings, device, weights)
        assert found.loss_sums.isnan().tolist() == [False, abs(value) != 20.5, False]


def test_kernels_compile_for_a_gpu_without_one(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).with_name("compile_fused_loss.py")
    found = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.splitlines()[-1] == "9 compiled"
