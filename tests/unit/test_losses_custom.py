"""The user's own loss: how it is found, what it must give, and the metrics that come of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.config import PPOSettings
from megatron_fipo.losses import LOSSES, collect_token_stats, dapo_loss
from megatron_fipo.losses.custom import custom_metrics, load_custom_loss

MODULE = """
import torch
from megatron_fipo.losses import dapo_loss

not_a_function = 3

def reinforce(logprobs, old_logprobs, advantages, loss_mask, settings, *, denominator=None, **options):
    values = torch.where(loss_mask, -advantages * logprobs, 0)
    info = {"num_kept": loss_mask.sum(), "token_stats": {"surprise": -logprobs[loss_mask]}}
    return values.sum() / denominator, info

def as_dapo(*args, **options):
    loss, info = dapo_loss(*args, **options)
    return loss, {**info, "token_stats": {**info["token_stats"], "my_stat": info["token_stats"]["shift"].abs()}}

async def later(*args, **options):
    return None

def given(logprobs, *args, result, **options):
    return result
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_losses.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "broken_losses.py").write_text("import a_module_that_is_not_there", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    return "my_losses"


def arguments() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    old, shift, advantages = torch.randn(3, 12, generator=generator)
    return [old + 0.1 * shift, old, advantages, torch.arange(12) % 3 != 0, PPOSettings()]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_losses", "must be module:function"),
        (":reinforce", "must be module:function"),
        ("no_such_module:f", "the module 'no_such_module' is not importable"),
        ("my_losses.inner:f", "the module 'my_losses.inner' is not importable"),
        ("my_losses:missing", "'my_losses' has no function 'missing'"),
        ("my_losses:not_a_function", "'my_losses' has no function 'not_a_function'"),
        ("my_losses:later", "must be a plain function, not an async one"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_its_flag(path: str, message: str, module: str) -> None:
    with pytest.raises(ValueError, match=f"--custom-loss-function-path is '{path}', but .*{message}"):
        load_custom_loss(path)


def test_what_the_module_itself_cannot_import_passes_through(module: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        load_custom_loss("broken_losses:f")


def test_it_is_called_as_the_table_s_losses_are_and_keeps_its_value(module: str) -> None:
    values = arguments()
    options = {"denominator": 1.0, "cu_seqlens": torch.tensor([0, 12], dtype=torch.int32), "with_metrics": False}
    loss, info = load_custom_loss(f"{module}:as_dapo")(*values, **options)
    wanted, wanted_info = dapo_loss(*values, **options)
    assert torch.equal(loss, wanted)
    assert int(info["num_kept"]) == int(wanted_info["num_kept"]) == 8
    loss, info = load_custom_loss(f"{module}:reinforce")(*values, **options)
    assert float(loss) == pytest.approx(float((-values[2] * values[0])[values[3]].sum()))
    assert info["num_kept"].shape == ()
    assert float(info["token_stats"]["loss_sum"]) == pytest.approx(float(loss))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned a NoneType, but must return"),
        (torch.zeros(()), r"returned a float32 tensor of shape \(\), but must return \(loss, info\)"),
        ((torch.zeros(()), {}, 1), "returned a tuple of 3, but must return"),
        ((0.5, {"num_kept": 1, "token_stats": {}}), "returned a float as its loss"),
        ((torch.zeros(2), {"num_kept": 1, "token_stats": {}}), r"tensor of shape \(2,\) as its loss"),
        ((torch.zeros(()), {}), "info without num_kept and token_stats"),
        ((torch.zeros(()), {"num_kept": 1}), "info without token_stats"),
        ((torch.zeros(()), {"num_kept": torch.ones(2).int(), "token_stats": {}}), r"\(2,\) as num_kept"),
        ((torch.zeros(()), {"num_kept": 1.5, "token_stats": {}}), "as num_kept, but must return one integer"),
        ((torch.zeros(()), {"num_kept": "1", "token_stats": {}}), "a str as num_kept, but must return one integer"),
        ((torch.zeros(()), {"num_kept": 1, "token_stats": {"a": 1.0}}), "token_stats that are not a mapping"),
        ((torch.zeros(()), {"num_kept": 1, "token_stats": [torch.zeros(1)]}), "token_stats that are not a mapping"),
    ],
)
def test_a_wrong_return_says_what_was_found_and_wanted(result: Any, message: str, module: str) -> None:
    with pytest.raises(ValueError, match=f"--custom-loss-function-path '{module}:given' .*{message}"):
        load_custom_loss(f"{module}:given")(torch.zeros(3), result=result)


def test_its_statistics_may_be_bfloat16_which_numpy_does_not_have(module: str) -> None:
    stats = {"a": torch.tensor([0.5, 1.0], dtype=torch.bfloat16, requires_grad=True)}
    _, info = load_custom_loss(f"{module}:given")(
        torch.zeros(3), result=(torch.zeros(()), {"num_kept": 1, "token_stats": stats})
    )
    assert info["token_stats"]["a"].numpy().tolist() == [0.5, 1.0]


def test_its_metrics_are_the_means_of_what_it_gives_over_all_micro_batches(module: str) -> None:
    logprobs, old, advantages, mask, settings = arguments()
    loss_of = load_custom_loss(f"{module}:reinforce")
    halves = (slice(0, 5), slice(5, 12))
    parts = [
        loss_of(logprobs[half], old[half], advantages[half], mask[half], settings, denominator=1.0)[1]["token_stats"]
        for half in halves
    ]
    whole = float((-advantages * logprobs)[mask].sum())
    assert custom_metrics(collect_token_stats(parts), settings) == pytest.approx(
        {"pg_loss": whole / 8, "surprise": float(-logprobs[mask].mean())}
    )


def test_it_gets_the_authors_metrics_where_it_gives_what_they_are_made_of(module: str) -> None:
    values = [tensor[None] if isinstance(tensor, torch.Tensor) else tensor for tensor in arguments()]
    _, info = load_custom_loss(f"{module}:as_dapo")(*values)
    _, wanted = LOSSES["dapo"](*values)
    found = custom_metrics(info["token_stats"], PPOSettings())
    numbers = {name: value for name, value in wanted.items() if isinstance(value, float)}
    shift = (values[0] - values[1])[values[3]]
    assert found == pytest.approx({**numbers, "my_stat": float(shift.abs().mean())})
