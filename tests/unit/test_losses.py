"""The losses against a naive reference written from the formulas, and what must not change them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo.config import LOSS_AGGREGATIONS, FIPOSettings, PPOSettings
from megatron_fipo.losses import LOSSES, dapo_loss, fipo_loss, grpo_loss

SEMANTICS = ("paper", "released")
BASE = FIPOSettings(influence_low=0.8, influence_high=1.2, safety_threshold=3.0, half_life=8.0)
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # logprobs, old_logprobs, advantages, loss_mask


def make_batch(num_rows: int = 5, length: int = 40, *, spread: float = 0.3, seed: int = 0) -> Batch:
    """[B, L] float64 with a masked prefix, holes and an empty response; sequence-wise advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(num_rows, length, generator=generator, dtype=torch.float64)
    new = old + spread * torch.randn(num_rows, length, generator=generator, dtype=torch.float64)
    advantages = torch.randn(num_rows, 1, generator=generator, dtype=torch.float64).expand(-1, length).clone()
    mask = torch.rand(num_rows, length, generator=generator) < 0.85
    mask[:, : length // 5] = False
    mask[:, -1] = False
    mask[-1] = False
    return new, old, advantages, mask


def spiky_batch(seed: int = 0) -> Batch:
    """Negative advantages throughout, row i with i ratios of about e^3: rows of two and more are dropped."""
    new, old, advantages, mask = make_batch(seed=seed)
    advantages = -advantages.abs() - 0.1
    for row in range(4):
        for position in mask[row].nonzero().flatten()[3 : 3 + row].tolist():
            new[row, position] = old[row, position] + 3.0
    return new, old, advantages, mask


def naive_loss(
    batch: Batch,
    settings: PPOSettings,
    *,
    use_influence: bool = True,
    token_weights: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """The formulas, token by token, with autograd; f is a Python float and so has no gradient."""
    new, old, advantages, mask = batch
    c = math.inf if settings.dual_clip is None else settings.dual_clip
    sums, counts = [], []
    for row in range(len(new)):
        future, dual_clipped, token_losses = 0.0, 0, []
        for t in reversed(range(new.shape[1])):
            if use_influence and isinstance(settings, FIPOSettings):
                future *= 2 ** (-1 / settings.half_life)
            if not mask[row, t]:
                continue
            shift = (new[row, t] - old[row, t]).clamp(-20, 20)
            shift_value = float(shift.detach())
            ratio, advantage, influence = shift.exp(), float(advantages[row, t]), 1.0
            if use_influence and isinstance(settings, FIPOSettings):
                future += shift_value if shift_value <= math.log(c) else 0.0
                influence = min(max(math.exp(future), settings.influence_low), settings.influence_high)
                if advantage < 0 and math.exp(shift_value) > settings.safety_threshold:
                    influence = 1.0 if settings.semantics == "paper" else min(max(influence, 0.8), 1.0)
            advantage *= influence
            clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
            loss = torch.maximum(-advantage * ratio, -advantage * clipped)
            if advantage < 0 and float(loss.detach()) > -advantage * c:
                dual_clipped += 1
                loss = 0 * ratio - advantage * c
            if token_weights is not None:
                loss = loss * token_weights[row, t]
            if reference_logprobs is not None:
                x = (reference_logprobs[row, t] - new[row, t]).clamp(-20, 20)
                loss = loss + kl_coef * (x.exp() - x - 1)
            token_losses.append(loss)
        released = use_influence and isinstance(settings, FIPOSettings) and settings.semantics == "released"
        if released and dual_clipped > 1:
            token_losses = []
        sums.append(sum(token_losses, start=0 * new.sum()))
        counts.append(len(token_losses))
    if settings.loss_agg == "token-mean":
        return sum(sums) / max(sum(counts), 1)
    if settings.loss_agg == "seq-mean-token-mean":
        sums = [total / max(count, 1) for total, count in zip(sums, counts)]
    if settings.loss_agg == "seq-mean-token-sum-norm":
        sums = [total / new.shape[1] for total in sums]
    return sum(sums) / len(sums)


def value_and_gradient(loss_of: Callable[[Batch], Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    logprobs = batch[0].clone().requires_grad_()
    loss = loss_of((logprobs, *batch[1:]))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], atol: float = 1e-12) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=atol)
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=atol)


def pack(batch: Batch, lengths: list[int], order: list[int] | None = None) -> tuple[Batch, Tensor]:
    """The first lengths[i] tokens of row i, end to end in `order`, and their cu_seqlens."""
    order = list(range(len(lengths))) if order is None else order
    packed = tuple(torch.cat([tensor[row, : lengths[row]] for row in order]) for tensor in batch)
    offsets = torch.tensor([0, *(lengths[row] for row in order)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return packed, offsets  # type: ignore[return-value]


@pytest.mark.parametrize("batch", [make_batch(), spiky_batch(), make_batch(spread=2.0, seed=3)])
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("loss_agg", LOSS_AGGREGATIONS)
def test_fipo_equals_the_formulas(batch: Batch, semantics: Any, loss_agg: Any) -> None:
    settings = dataclasses.replace(BASE, semantics=semantics, loss_agg=loss_agg)
    wanted = value_and_gradient(lambda b: naive_loss(b, settings), batch)
    for fused in (True, False):
        assert_same(value_and_gradient(lambda b, fused=fused: fipo_loss(*b, settings, fused=fused)[0], batch), wanted)  # type: ignore[misc]
    assert float(wanted[1].abs().max()) > 1e-4


@pytest.mark.parametrize("batch", [make_batch(), spiky_batch(), make_batch(spread=2.0, seed=3)])
@pytest.mark.parametrize("dual_clip", [None, 10.0])
@pytest.mark.parametrize("loss_agg", LOSS_AGGREGATIONS)
def test_dapo_and_grpo_equal_the_formulas(batch: Batch, dual_clip: float | None, loss_agg: Any) -> None:
    settings = PPOSettings(clip_high=0.2, dual_clip=dual_clip, loss_agg=loss_agg)
    wanted = value_and_gradient(lambda b: naive_loss(b, settings), batch)
    for loss, fused in itertools.product((dapo_loss, grpo_loss), (True, False)):
        found = value_and_gradient(lambda b, loss=loss, fused=fused: loss(*b, settings, fused=fused)[0], batch)  # type: ignore[misc]
        assert_same(found, wanted)


@pytest.mark.parametrize("batch", [make_batch(), spiky_batch(), make_batch(spread=2.0, seed=3)])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("loss_agg", LOSS_AGGREGATIONS)
def test_token_weights_and_the_kl_term_stand_outside_everything_else(batch: Batch, name: str, loss_agg: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = 2 * torch.rand(batch[0].shape, generator=generator, dtype=torch.float64)
    weights[weights < 0.5] = 0.0
    weights[~batch[3]] = torch.nan
    reference = batch[0] + torch.randn(batch[0].shape, generator=generator, dtype=torch.float64)
    settings = dataclasses.replace(BASE, semantics="released", loss_agg=loss_agg)
    options = {"token_weights": weights, "reference_logprobs": reference, "kl_coef": 0.3}
    for given in (
        {"token_weights": weights},
        {key: options[key] for key in ("reference_logprobs", "kl_coef")},
        options,
    ):
        wanted = value_and_gradient(
            lambda b, given=given: naive_loss(b, settings, use_influence=name == "fipo", **given), batch
        )
        for fused in (True, False):
            found = value_and_gradient(
                lambda b, given=given, fused=fused: LOSSES[name](*b, settings, fused=fused, **given)[0], batch
            )
            assert_same(found, wanted)
    plain, info = LOSSES[name](*batch, settings)
    _, weighted = LOSSES[name](*batch, settings, **options)
    assert {key for key in weighted if key not in info} == {"kl_loss"}
    assert {key for key in info if isinstance(info[key], float) and info[key] != weighted[key]} == {"pg_loss"}
    assert torch.equal(info["loss_mask"], weighted["loss_mask"])
    assert int(info["num_kept"]) == int(weighted["num_kept"])
    assert info["pg_loss"] == pytest.approx(float(plain), rel=1e-12)


def test_weights_of_one_and_no_kl_coefficient_change_no_bit_of_the_gradient() -> None:
    batch = make_batch()
    ones, reference = torch.ones_like(batch[0]), batch[1]
    for fused in (True, False):
        plain = value_and_gradient(lambda b, fused=fused: fipo_loss(*b, BASE, fused=fused)[0], batch)
        for options in ({"token_weights": ones}, {"reference_logprobs": reference}):
            found = value_and_gradient(
                lambda b, fused=fused, options=options: fipo_loss(*b, BASE, fused=fused, **options)[0], batch
            )
            assert torch.equal(found[1], plain[1])
            torch.testing.assert_close(found[0], plain[0], rtol=1e-15, atol=0)


def test_gradient_equals_finite_differences_with_the_influence_weights_held() -> None:
    batch = make_batch(2, 12, spread=0.1)
    settings = dataclasses.replace(BASE, influence_low=0.5, influence_high=2.0)
    _, info = fipo_loss(*batch, settings)
    _, gradient = value_and_gradient(lambda b: fipo_loss(*b, settings)[0], batch)
    new, old, advantages, mask = batch
    weighted = advantages * info["influence_weights"]
    for row, t in mask.nonzero().tolist():
        moved = [new.clone(), new.clone()]
        moved[0][row, t] -= 1e-6
        moved[1][row, t] += 1e-6
        below, above = (float(dapo_loss(m, old, weighted, mask, settings)[0]) for m in moved)
        assert float(gradient[row, t]) == pytest.approx((above - below) / 2e-6, abs=1e-8)


def test_influence_changes_the_loss_as_soon_as_the_policies_differ() -> None:
    """Fails when f is 1 for ever, as it is when the old log-probs are the new ones, detached."""
    batch = make_batch(spread=0.05)
    _, info = fipo_loss(*batch, BASE)
    response = batch[3]
    assert float(info["influence_weights"][response].std()) > 0.01
    assert info["future_kl_std"] > 0.05
    fipo, dapo = (value_and_gradient(lambda b, f=f: f(*b, BASE)[0], batch) for f in (fipo_loss, dapo_loss))  # type: ignore[misc]
    assert float((fipo[1] - dapo[1]).abs().max()) > 1e-4
    switched_off, info = fipo_loss(batch[0], batch[0].detach(), *batch[2:], BASE)
    assert info["influence_weights"].eq(1).all()
    assert info["future_kl_std"] == info["ppo_kl"] == 0.0
    assert abs(float(switched_off - fipo[0])) > 1e-3


def test_without_a_shift_fipo_is_dapo() -> None:
    new, _, advantages, mask = make_batch()
    for semantics in SEMANTICS:
        settings = dataclasses.replace(BASE, semantics=semantics)
        fipo = value_and_gradient(lambda b: fipo_loss(*b, settings)[0], (new, new, advantages, mask))  # noqa: B023
        assert_same(fipo, value_and_gradient(lambda b: dapo_loss(*b, BASE)[0], (new, new, advantages, mask)), 0.0)


def test_dapo_is_fipo_with_the_influence_weights_at_one() -> None:
    for batch in (make_batch(), spiky_batch()):
        settings = dataclasses.replace(BASE, influence_low=1 - 1e-15, influence_high=1 + 1e-15)
        fipo = value_and_gradient(lambda b: fipo_loss(*b, settings)[0], batch)  # noqa: B023
        assert_same(fipo, value_and_gradient(lambda b: dapo_loss(*b, BASE)[0], batch))


def test_token_mean_divides_by_response_tokens_and_nothing_else() -> None:
    """d = 0 and A = 1: every token's loss is -1, so the mean shows the normaliser."""
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[0, 2:9], mask[1, 5] = True, True
    zeros, ones = torch.zeros(3, 10), torch.ones(3, 10)
    wanted = {
        "token-mean": (-1.0, 8),
        "seq-mean-token-sum": (-8 / 3, 3),
        "seq-mean-token-mean": (-2 / 3, 3),
        "seq-mean-token-sum-norm": (-8 / 30, 3),
    }
    for loss_agg, (value, count) in wanted.items():
        settings = FIPOSettings(loss_agg=loss_agg)  # type: ignore[arg-type]
        for name, loss_fn in LOSSES.items():
            loss, info = loss_fn(zeros, zeros, ones, mask, settings)
            assert float(loss) == pytest.approx(value, rel=1e-6), name
            assert int(info["num_kept"]) == count
            assert info["num_kept"].shape == ()
            assert info["pg_loss"] == pytest.approx(value, rel=1e-6)
            local_sum, info = loss_fn(zeros, zeros, ones, mask, settings, denominator=1)
            assert float(local_sum) == pytest.approx(value * count, rel=1e-6)
            assert info["pg_loss"] == pytest.approx(value, rel=1e-6)
            halved, _ = loss_fn(zeros, zeros, ones, mask, settings, denominator=torch.tensor(2.0 * count))
            assert float(halved) == pytest.approx(value / 2, rel=1e-6)


def test_a_dummy_sequence_can_be_left_out_of_the_count() -> None:
    mask = torch.zeros(12, dtype=torch.bool)
    mask[1:4], mask[6:8] = True, True
    offsets = torch.tensor([0, 5, 9, 12], dtype=torch.int32)
    zeros, ones = torch.zeros(12), torch.ones(12)
    settings = PPOSettings(loss_agg="seq-mean-token-mean")
    loss, info = grpo_loss(zeros, zeros, ones, mask, settings, cu_seqlens=offsets, num_sequences=2)
    assert (float(loss), int(info["num_kept"])) == (-1.0, 2)
    loss, info = grpo_loss(zeros, zeros, ones, mask, settings, cu_seqlens=offsets)
    assert (float(loss), int(info["num_kept"])) == (pytest.approx(-2 / 3), 3)


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("loss_agg", LOSS_AGGREGATIONS)
@pytest.mark.parametrize("lengths", [[40, 40, 40, 40, 40], [40, 33, 9, 40, 1]])
def test_packed_padded_and_permuted_batches_agree(semantics: Any, loss_agg: Any, lengths: list[int]) -> None:
    settings = dataclasses.replace(BASE, semantics=semantics, loss_agg=loss_agg)
    batch = spiky_batch()
    for row, length in enumerate(lengths):
        batch[3][row, length:] = False
    padded = value_and_gradient(lambda b: fipo_loss(*b, settings)[0], batch)
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        packed, offsets = pack(batch, lengths, order)
        found = value_and_gradient(
            lambda b, offsets=offsets: fipo_loss(*b, settings, cu_seqlens=offsets, max_response_len=40)[0],  # type: ignore[misc]
            packed,
        )
        wanted_gradient = torch.cat([padded[1][row, : lengths[row]] for row in order])
        assert_same(found, (padded[0], wanted_gradient), 1e-14)


@pytest.mark.parametrize("length", [1, 63, 64, 1000])
def test_any_length_packed_equals_padded(length: int) -> None:
    batch = make_batch(3, length, spread=0.1)
    batch[3][:, 0] = True
    padded = value_and_gradient(lambda b: fipo_loss(*b, BASE)[0], batch)
    packed, offsets = pack(batch, [length] * 3)
    found = value_and_gradient(lambda b: fipo_loss(*b, BASE, cu_seqlens=offsets)[0], packed)
    assert_same(found, (padded[0], padded[1].flatten()), 1e-14)
    assert float(padded[1].abs().max()) > 0


def test_micro_batches_add_up_to_the_batch() -> None:
    for loss_agg in LOSS_AGGREGATIONS:
        settings = dataclasses.replace(BASE, semantics="released", loss_agg=loss_agg)  # type: ignore[arg-type]
        batch = spiky_batch()
        whole, info = fipo_loss(*batch, settings)
        parts = [fipo_loss(*(t[rows] for t in batch), settings, denominator=1) for rows in (slice(0, 2), slice(2, 5))]
        count = sum(part["num_kept"] for _, part in parts)
        assert int(count) == int(info["num_kept"])
        assert float(sum(loss for loss, _ in parts) / count) == pytest.approx(float(whole), rel=1e-13)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_garbage_outside_the_mask_leaks_nowhere(garbage: float, name: str, fused: bool) -> None:
    settings = dataclasses.replace(BASE, semantics="released")
    batch = spiky_batch()
    mask = batch[3]
    dirty: Batch = (*(torch.where(mask, tensor, garbage) for tensor in batch[:3]), mask)
    assert_same(
        value_and_gradient(lambda b: LOSSES[name](*b, settings, fused=fused)[0], dirty),
        value_and_gradient(lambda b: LOSSES[name](*b, settings, fused=fused)[0], batch),
        0.0,
    )
    clean_info, dirty_info = (LOSSES[name](*b, settings, fused=fused)[1] for b in (batch, dirty))
    for key, value in clean_info.items():
        if isinstance(value, Tensor):
            assert torch.equal(dirty_info[key], value), key
        elif isinstance(value, float):
            assert math.isfinite(value), key
            assert dirty_info[key] == value, key


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_broken_logprobs_in_the_response_reach_loss_and_gradient(
    bad: float, which: int, name: str, fused: bool
) -> None:
    batch = make_batch()
    position = tuple(batch[3].nonzero()[20].tolist())
    batch[which][position] = bad
    loss, gradient = value_and_gradient(lambda b: LOSSES[name](*b, BASE, fused=fused)[0], batch)
    assert loss.isnan()
    assert gradient[position].isnan()


def test_a_broken_logprob_shows_even_when_its_sequence_is_dropped() -> None:
    batch = spiky_batch()
    settings = dataclasses.replace(BASE, semantics="released")
    first = tuple(batch[3][3].nonzero()[0].tolist())
    batch[0][3][first] = torch.nan
    for fused in (True, False):
        loss, info = fipo_loss(*batch, settings, fused=fused)
        assert not info["loss_mask"][3].any()
        assert loss.isnan()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("loss_agg", LOSS_AGGREGATIONS)
def test_batches_without_a_response_give_zero(name: str, loss_agg: Any) -> None:
    settings = dataclasses.replace(BASE, semantics="released", loss_agg=loss_agg)
    new, old, advantages, mask = make_batch()
    empty = (new, old, advantages, torch.zeros_like(mask))
    loss, gradient = value_and_gradient(lambda b: LOSSES[name](*b, settings)[0], empty)
    assert float(loss) == 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    info = LOSSES[name](*empty, settings)[1]
    assert all(value == 0.0 for value in info.values() if isinstance(value, float))
    nothing = (torch.zeros(0), torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    offsets = torch.zeros(1, dtype=torch.int32)
    loss, _ = value_and_gradient(
        lambda b: LOSSES[name](*b, settings, cu_seqlens=offsets, max_response_len=8)[0], nothing
    )
    assert float(loss) == 0.0


def test_fp32_and_bf16_are_computed_in_fp32() -> None:
    batch = make_batch()
    exact = value_and_gradient(lambda b: fipo_loss(*b, BASE)[0], batch)
    single: Batch = (*(tensor.float() for tensor in batch[:3]), batch[3])
    found = value_and_gradient(lambda b: fipo_loss(*b, BASE)[0], single)
    assert found[0].dtype == torch.float32
    assert_same((found[0].double(), found[1].double()), exact, 1e-6)
    assert fipo_loss(*(tensor.bfloat16() for tensor in batch[:3]), batch[3], BASE)[0].dtype == torch.float32


def test_info_keeps_the_shapes_and_the_mask_dtype_given() -> None:
    batch = make_batch()
    for loss_fn in LOSSES.values():
        info = loss_fn(*batch[:3], batch[3].double(), BASE)[1]
        for key in ("future_kl", "influence_weights", "loss_mask"):
            assert info[key].shape == batch[0].shape
            assert not info[key].requires_grad
        assert torch.equal(info["loss_mask"], batch[3].double())


def test_groups_of_several_ranks_want_packed_shares() -> None:
    batch = make_batch()
    packed, offsets = pack(batch, [40] * 5)
    four = SimpleNamespace(size=lambda: 4)
    for loss_fn in LOSSES.values():
        loss_fn(*batch, BASE, group=SimpleNamespace(size=lambda: 1))
        with pytest.raises(ValueError, match="packed"):
            loss_fn(*batch, BASE, group=four)
        with pytest.raises(ValueError, match="800"):
            loss_fn(*packed, BASE, cu_seqlens=offsets, group=four)


@pytest.mark.parametrize("name", LOSSES)
def test_bad_arguments_are_named(name: str) -> None:
    new, old, advantages, mask = (tensor.flatten() for tensor in make_batch())
    offsets = torch.tensor([0, 200], dtype=torch.int32)
    norm = dataclasses.replace(BASE, loss_agg="seq-mean-token-sum-norm")
    mean = dataclasses.replace(BASE, loss_agg="seq-mean-token-mean")
    for arguments, settings, keywords, message in [
        ((new, old, advantages, mask), BASE, {}, "cu_seqlens is missing"),
        ((new, old[:9], advantages, mask), BASE, {"cu_seqlens": offsets}, r"old_logprobs has shape \(9,\)"),
        ((new, old, advantages[:1], mask), BASE, {"cu_seqlens": offsets}, r"advantages has shape \(1,\)"),
        ((new, old, advantages, mask[:9]), BASE, {"cu_seqlens": offsets}, r"mask has shape \(9,\)"),
        ((new, old, advantages, mask), norm, {"cu_seqlens": offsets}, "max_response_len is None"),
        ((new, old, advantages, mask), mean, {"cu_seqlens": offsets, "num_sequences": 2}, "num_sequences is 2"),
        ((new, old, advantages, mask), BASE, {"cu_seqlens": offsets, "denominator": 0}, "denominator is 0"),
        (
            (new, old, advantages, mask),
            BASE,
            {"cu_seqlens": offsets, "denominator": torch.ones(1)},
            r"denominator has shape \(1,\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            LOSSES[name](*arguments, settings, **keywords)


def test_settings_of_another_algorithm_and_devices_without_kernels_are_refused() -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match=r"settings are PPOSettings\(.*\), but must be FIPOSettings"):
        LOSSES["fipo"](*batch, PPOSettings())
    elsewhere = [tensor.to("meta") for tensor in batch]
    for loss_fn in LOSSES.values():
        with pytest.raises(ValueError, match="log-probs are on meta, but the fused loss wants them on cpu or cuda"):
            loss_fn(*elsewhere, BASE)
