"""A forward-only pass meets the scales of the update that follows and leaves none behind.

Transformer Engine's delayed scaling is imitated by a layer that rounds its input under a scale and by the same steps
between passes: what it saw is noted in every pass, scales are made after passes with gradients only.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from megatron_fipo.actor.fp8_scaling import DelayedScaling, drop_quantised_weights, has_delayed_scaling

LARGEST = 448.0


class Layer(nn.Module):
    """One tensor quantised on its way in; its state is made in the first pass, as Transformer Engine's."""

    def __init__(self, history: int = 2) -> None:
        super().__init__()
        self.fp8_meta: dict[str, SimpleNamespace] = {}
        self.history = history

    def forward(self, x: Tensor) -> Tensor:
        for direction in ("scaling_fwd", "scaling_bwd"):
            blank = SimpleNamespace(scale=torch.ones(1), amax_history=torch.zeros(self.history, 1))
            self.fp8_meta.setdefault(direction, blank)
        state = self.fp8_meta["scaling_fwd"]
        state.amax_history[0] = torch.maximum(state.amax_history[0], x.detach().abs().max())
        return (x * state.scale).to(torch.float8_e4m3fn).float() / state.scale


def make_scales(model: nn.Module) -> None:
    for layer in model:
        state = layer.fp8_meta["scaling_fwd"]
        amax = state.amax_history.max(dim=0).values
        state.scale.copy_(torch.where(amax > 0, LARGEST / amax, state.scale))
        state.amax_history.copy_(torch.roll(state.amax_history, -1, 0))
        state.amax_history[0] = 0.0


def train(model: nn.Sequential, batches: list[Tensor]) -> list[Tensor]:
    outputs = []
    for batch in batches:
        outputs.append(model(batch))
        make_scales(model)
    return outputs


def forward(model: nn.Sequential, batches: list[Tensor], after_each) -> list[Tensor]:
    outputs = []
    for batch in batches:
        outputs.append(model(batch))
        after_each()
    return outputs


def old_pass(model: nn.Sequential, scaling: DelayedScaling, batches: list[Tensor]) -> list[Tensor]:
    with scaling.as_in_training(lambda after_each: forward(model, batches[:1], after_each)) as after_each:
        return forward(model, batches, after_each)


def make(history: int = 2) -> tuple[nn.Sequential, DelayedScaling]:
    model = nn.Sequential(Layer(history), Layer(history))
    return model, DelayedScaling([model], lambda: make_scales(model))


def batches(num: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, generator=generator) * 0.02 * (i + 1) for i in range(num)]


def test_the_first_update_repeats_the_pass_bit_for_bit() -> None:
    model, scaling = make()
    for seed in range(3):
        old = old_pass(model, scaling, batches(4, seed))
        assert all(torch.equal(a, b) for a, b in zip(old, train(model, batches(4, seed))))


def test_without_it_the_update_would_not_and_its_scales_would_be_others() -> None:
    left_alone, _ = make()
    train(left_alone, batches(2))
    cared_for, scaling = make()
    train(cared_for, batches(2))
    unlike = [torch.ones(64)]
    plain = forward(left_alone, unlike + batches(3, 1), lambda: None)[1:]
    old_pass(cared_for, scaling, unlike + batches(3, 1))
    first, second = train(left_alone, batches(3, 1)), train(cared_for, batches(3, 1))
    assert not all(torch.equal(a, b) for a, b in zip(plain, first))
    assert not torch.equal(first[1], second[1])  # the amax of the pass, 1, is in the scales of the second micro-batch


def test_the_pass_leaves_training_as_it_found_it() -> None:
    disturbed, scaling = make()
    undisturbed, _ = make()
    train(disturbed, batches(3))
    train(undisturbed, batches(3))
    before = {name: tensor.clone() for name, tensor in scaling.state().items()}
    places = [layer.fp8_meta["scaling_fwd"].scale.data_ptr() for layer in disturbed]
    old_pass(disturbed, scaling, batches(5, 7))
    assert len(before) == 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in scaling.state().items())
    assert places == [layer.fp8_meta["scaling_fwd"].scale.data_ptr() for layer in disturbed]
    assert all(torch.equal(a, b) for a, b in zip(train(disturbed, batches(2, 1)), train(undisturbed, batches(2, 1))))


def test_a_pass_that_fails_leaves_training_as_it_found_it() -> None:
    model, scaling = make()
    train(model, batches(2))
    before = scaling.state()
    with pytest.raises(RuntimeError, match="size of tensor"), scaling.as_in_training(lambda after: None):
        model(torch.ones(64)) + torch.ones(3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in scaling.state().items())


def test_before_the_first_pass_of_all_the_forward_scales_are_learnt() -> None:
    model, scaling = make()
    values = batches(1)[0] / 10
    learnt, blank = old_pass(model, scaling, [values])[0], nn.Sequential(Layer(), Layer())(values)
    assert (learnt - values).abs().mean() < values.abs().mean() / 16
    assert (blank - values).abs().mean() > values.abs().mean() / 4


def test_a_state_is_loaded_before_the_first_pass() -> None:
    first, scaling = make()
    train(first, batches(3))
    state = scaling.state()
    second, resumed = make()
    resumed.load(state)
    assert resumed.state().keys() == state.keys()  # a checkpoint before any pass
    old = old_pass(second, resumed, batches(4, 1))
    assert all(torch.equal(a, b) for a, b in zip(old, old_pass(first, scaling, batches(4, 1))))
    assert all(torch.equal(a, b) for a, b in zip(train(first, batches(4, 1)), train(second, batches(4, 1))))


def test_another_models_state_is_refused() -> None:
    first, scaling = make()
    train(first, batches(1))
    for model, message in (
        (nn.Sequential(Layer()), r"the FP8 scaling state of chunk_0\.1\..* is not that of this model"),
        (nn.Sequential(Layer(5), Layer(5)), r"has shape \(2, 1\), but .* \(5, 1\): .* --fp8-amax-history-len"),
    ):
        resumed = DelayedScaling([model], lambda: None)
        resumed.load(scaling.state())
        with pytest.raises(ValueError, match=message):
            old_pass(model, resumed, batches(1))


def test_only_the_delayed_recipe_has_a_state() -> None:
    assert has_delayed_scaling(SimpleNamespace(fp8="hybrid", fp8_recipe="delayed"))
    assert not has_delayed_scaling(SimpleNamespace(fp8="hybrid", fp8_recipe="tensorwise"))
    assert not has_delayed_scaling(SimpleNamespace(fp8=None, fp8_recipe="delayed"))
    assert DelayedScaling([nn.Linear(2, 2)]).state() == {}


def test_quantised_copies_of_weights_are_let_go_of() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0]._fp8_workspaces = kept = {"weight": torch.ones(2)}
    drop_quantised_weights([model])
    assert kept == {}
    assert model[0]._fp8_workspaces is kept
