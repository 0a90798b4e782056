"""The fused loss against tensor operations and autograd: value, gradient, every tensor and number of info."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

from megatron_fipo.config import LOSS_AGGREGATIONS, FIPOSettings, PPOSettings
from megatron_fipo.losses import LOSSES, dapo_loss, fipo_loss

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
BASE = FIPOSettings(influence_low=0.8, influence_high=1.2, safety_threshold=3.0, half_life=8.0, semantics="released")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(*shape: int, spread: float = 0.5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    """Shifts that reach every bound, advantages of both signs, a mask with holes."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(*shape, generator=generator, dtype=torch.float64)
    new = old + spread * torch.randn(*shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return new.to(dtype), old.to(dtype), advantages.to(dtype), torch.rand(*shape, generator=generator) < 0.8


def score(name: str, inputs: Inputs, settings: PPOSettings, **options: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    logprobs = inputs[0].clone().requires_grad_()
    loss, info = LOSSES[name](logprobs, *inputs[1:], settings, **options)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient, info


def assert_forms_agree(name: str, inputs: Inputs, settings: PPOSettings, **options: Any) -> dict[str, Any]:
    tolerance = TOLERANCE[inputs[0].dtype]
    loss, gradient, info = score(name, inputs, settings, fused=True, **options)
    wanted_loss, wanted_gradient, wanted = score(name, inputs, settings, fused=False, **options)
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(loss, wanted_loss, **close)
    torch.testing.assert_close(gradient, wanted_gradient, **close)
    assert info.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(info[key], value, **close)
        elif key == "token_stats":
            assert info[key].keys() == value.keys()
            for stat in value:
                torch.testing.assert_close(info[key][stat], value[stat], **close)
        else:
            assert info[key] == pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True), key
    return wanted


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 63, 64, 1000, 1025])
@pytest.mark.parametrize("semantics", ["paper", "released"])
def test_forms_agree_at_any_length(dtype: torch.dtype, length: int, semantics: Any) -> None:
    inputs = make_inputs(4, length, spread=0.05, dtype=dtype)
    inputs[3][1] = False  # an empty response
    inputs[3][2, : length // 2] = False  # a prompt
    inputs[3][3] = True
    settings = dataclasses.replace(BASE, semantics=semantics)
    assert_forms_agree("fipo", inputs, settings)
    flat = tuple(tensor.flatten() for tensor in inputs)
    offsets = torch.arange(5, dtype=torch.int32) * length
    assert_forms_agree("fipo", flat, settings, cu_seqlens=offsets)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("loss_agg", LOSS_AGGREGATIONS)
def test_forms_agree_with_drops_and_every_aggregation(dtype: torch.dtype, loss_agg: Any) -> None:
    lengths = [300, 0, 1, 64, 1200, 35]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    options = {"cu_seqlens": offsets, "max_response_len": 1500}
    for spread, semantics in itertools.product((0.2, 1.5), ("paper", "released")):
        inputs = make_inputs(sum(lengths), spread=spread, dtype=dtype)
        settings = dataclasses.replace(BASE, semantics=semantics, loss_agg=loss_agg)
        wanted = assert_forms_agree("fipo", inputs, settings, **options)
        dropped = int(inputs[3].sum() - wanted["loss_mask"].sum())
        assert (dropped > 0) == (spread == 1.5 and semantics == "released")
        assert_forms_agree("fipo", inputs, settings, denominator=1, num_sequences=5, **options)
        for dual_clip in (None, 10.0):
            plain = PPOSettings(dual_clip=dual_clip, loss_agg=loss_agg)
            assert_forms_agree("dapo", inputs, plain, **options)


@pytest.mark.parametrize("bounds", [(1e-30, 1.2), (0.8, 1e30), (1.0, 1.2), (0.8, 1.0)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_forms_agree_at_extreme_influence_bounds(bounds: tuple[float, float], dtype: torch.dtype) -> None:
    for spread, half_life in ((0.02, 32.0), (3.0, 32.0), (0.5, 0.3)):
        inputs = make_inputs(3, 500, spread=spread, dtype=dtype)
        settings = dataclasses.replace(
            BASE, influence_low=bounds[0], influence_high=bounds[1], half_life=half_life, semantics="paper"
        )
        one_sided = (inputs[0], inputs[1], inputs[2] / inputs[2].abs().amax() / bounds[1], inputs[3])
        assert_forms_agree("fipo", one_sided, settings)


@pytest.mark.parametrize("semantics", ["paper", "released"])
def test_forms_agree_on_what_is_not_finite_and_on_the_clamp(semantics: Any) -> None:
    settings = dataclasses.replace(BASE, semantics=semantics)
    for value in (torch.nan, torch.inf, -torch.inf, 20.5, -20.5, 20.0, -20.0):
        for sign in (1.0, -1.0):
            new, old, advantages, mask = make_inputs(3, 90, spread=0.1)
            mask[1, 50], old[1, 50], new[1, 50], advantages[1, 50] = True, 0.0, value, sign
            mask[2, 50], new[2, 50] = False, value
            assert_forms_agree("fipo", (new, old, advantages, mask), settings)
            assert_forms_agree("dapo", (new, old, advantages, mask), PPOSettings(dual_clip=None))


@pytest.mark.parametrize("length", [1, 63, 64, 1000, 1025])
@pytest.mark.parametrize("semantics", ["paper", "released"])
def test_forms_agree_with_token_weights_and_a_kl_term(length: int, semantics: Any) -> None:
    """In float64 alone, as every dtype takes a second to compile; test_invariance.py trains with weights in fp32."""
    inputs = make_inputs(4 * length, spread=1.0)
    inputs[3][length : 2 * length] = False  # an empty response
    inputs[3][3 * length :] = True
    generator = torch.Generator().manual_seed(1)
    weights = 2 * torch.rand(4 * length, generator=generator, dtype=torch.float64)
    weights[weights < 0.5] = 0.0
    weights[~inputs[3]] = torch.nan
    reference = inputs[0] + torch.randn(4 * length, generator=generator, dtype=torch.float64)
    reference[~inputs[3]] = torch.inf
    options = {
        "cu_seqlens": torch.arange(5, dtype=torch.int32) * length,
        "token_weights": weights,
        "reference_logprobs": reference,
        "kl_coef": 0.05,
    }
    assert_forms_agree("fipo", inputs, dataclasses.replace(BASE, semantics=semantics), **options)
    assert_forms_agree("dapo", inputs, PPOSettings(dual_clip=None, loss_agg="seq-mean-token-mean"), **options)


@pytest.mark.parametrize("what", ["token_weights", "reference_logprobs"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("fused", [True, False])
def test_weights_and_references_that_are_not_finite_show(what: str, value: float, fused: bool) -> None:
    inputs = make_inputs(3, 90, spread=0.1)
    inputs[3][1, 50] = True
    given = torch.zeros(3, 90, dtype=torch.float64)
    given[1, 50] = value
    options = {what: given, "kl_coef": 0.1 if what == "reference_logprobs" else 0.0}
    loss, _, _ = score("fipo", inputs, BASE, fused=fused, **options)
    assert not loss.isfinite()
    given[1, 50], inputs[3][1, 50] = value, False
    loss, gradient, _ = score("fipo", inputs, BASE, fused=fused, **options)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_a_weight_of_zero_does_not_hide_a_broken_logprob() -> None:
    inputs = make_inputs(3, 90, spread=0.1)
    inputs[3][1, 50], inputs[0][1, 50] = True, torch.nan
    for fused in (True, False):
        assert score("dapo", inputs, BASE, fused=fused, token_weights=torch.zeros(3, 90))[0].isnan()


def test_backward_scales_by_what_comes_from_above_and_repeats() -> None:
    inputs = make_inputs(3, 50)
    logprobs = inputs[0].clone().requires_grad_()
    loss, _ = fipo_loss(logprobs, *inputs[1:], BASE)
    first, again = (torch.autograd.grad(3.0 * loss, logprobs, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    torch.testing.assert_close(first, 3.0 * score("fipo", inputs, BASE)[1], rtol=1e-14, atol=0)


def test_other_dtypes_and_strided_tensors_get_a_gradient_of_their_own_kind() -> None:
    inputs = make_inputs(64, 6)
    half = inputs[0].bfloat16()
    _, gradient, _ = score("fipo", (half, inputs[1].float(), *inputs[2:]), BASE)
    assert gradient.dtype == torch.bfloat16
    _, wanted, _ = score("fipo", (half.float(), inputs[1].float(), *inputs[2:]), BASE)
    assert torch.equal(gradient, wanted.bfloat16())
    columns = tuple(tensor.t() for tensor in make_inputs(6, 64))
    straight = tuple(tensor.contiguous() for tensor in columns)
    assert torch.equal(score("fipo", columns, BASE)[1], score("fipo", straight, BASE)[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_no_bit_of_a_sequence_depends_on_its_neighbours(dtype: torch.dtype) -> None:
    lengths = [1500, 0, 3, 1024, 2, 37, 1025]
    inputs = make_inputs(sum(lengths), dtype=dtype)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    _, together, info = score("fipo", inputs, BASE, cu_seqlens=offsets, denominator=1)
    for start, end in itertools.pairwise(offsets.tolist()):
        part = tuple(tensor[start:end] for tensor in inputs)
        whole = torch.tensor([0, end - start], dtype=torch.int32)
        _, alone, found = score("fipo", part, BASE, cu_seqlens=whole, denominator=1)  # type: ignore[arg-type]
        assert torch.equal(together[start:end], alone)
        for key in ("future_kl", "influence_weights"):
            assert torch.equal(info[key][start:end], found[key])


def test_nothing_is_computed_twice_when_no_gradient_is_wanted() -> None:
    inputs = make_inputs(3, 50)
    loss, info = dapo_loss(*inputs, BASE)
    assert not loss.requires_grad
    assert not info["future_kl"].any()
    assert info["influence_weights"].eq(1).all()


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    lengths=strategies.lists(strategies.integers(0, 40), min_size=1, max_size=6),
    spread=strategies.sampled_from([0.0, 0.1, 1.0, 6.0]),
    half_life=strategies.floats(0.1, 300.0),
    density=strategies.floats(0.0, 1.0),
    loss_agg=strategies.sampled_from(LOSS_AGGREGATIONS),
    semantics=strategies.sampled_from(["paper", "released"]),
    seed=strategies.integers(0, 2**20),
)
def test_forms_agree_on_any_pack(
    lengths: list[int], spread: float, half_life: float, density: float, loss_agg: Any, semantics: Any, seed: int
) -> None:
    inputs = make_inputs(sum(lengths), spread=spread, seed=seed)
    mask = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)) < density
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    settings = dataclasses.replace(BASE, half_life=half_life, loss_agg=loss_agg, semantics=semantics)
    assert_forms_agree("fipo", (*inputs[:3], mask), settings, cu_seqlens=offsets, max_response_len=50)
