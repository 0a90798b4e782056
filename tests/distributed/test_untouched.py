"""What must leave parameters and optimizer as they were, bit for bit: the pass under the initial weights, and an update
whose loss or gradient is not finite, on any rank."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from actor_on_ranks import make_actor, make_groups, settings_for
from processes import run_ranks
from tiny_models import make_sequences, save_model, with_rollout_logprobs

from megatron_fipo.config import CorrectionSettings
from megatron_fipo.types import TrainSequence

NUM_SEQUENCES = 8
LAYOUTS: dict[str, dict[str, Any]] = {  # of two ranks; one job for all: starting its processes takes longest
    "dp2": {},
    "dp2 overlapped": {"overlap": True},
    "pp2 overlapped": {"pp": 2, "overlap": True},
    "pp2 vpp2 bf16": {"pp": 2, "vpp": 2, "bf16": True},
    "tp2 sp": {"tp": 2, "sp": True},
    "cp2": {"cp": 2},
    "ep2": {"ep": 2, "moe": True},
}
POISONED_LAYOUTS = ("dp2", "dp2 overlapped", "pp2 vpp2 bf16")
CORRECTION = {"use_tis": True, "kl_coef": 0.1}
LOSS = ("log-probs", "old log-probs", "advantages", "rollout log-probs", "reference log-probs", "weights")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each layout left, by rank."""
    root = tmp_path_factory.mktemp("untouched")
    save_model(root / "dense", "qwen2", tied=True)
    save_model(root / "moe", "qwen3_moe", tied=False)
    ranks = run_ranks(root, 2, run_layouts, {"root": str(root), "layouts": LAYOUTS}, timeout_s=300)
    return {name: [rank[name] for rank in ranks] for name in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_updates_the_reference_is_the_old_log_probs_of_before_them(
    layout: str, found: dict[str, list[dict[str, Any]]]
) -> None:
    lent = [rank["lent"] for rank in found[layout]]
    assert sum(rank["num_logprobs"] for rank in lent) >= NUM_SEQUENCES
    for rank in lent:
        assert rank["reference is the first log-probs"]
        assert rank["the pass leaves every bit"]
        assert rank["views stay"]
        assert rank["updates go on as without it"]
    assert any(rank["the log-probs have moved"] for rank in lent)


def test_the_reference_is_the_checkpoint_s_and_not_the_resumed_state_s(found: dict[str, list[dict[str, Any]]]) -> None:
    for rank in found["dp2"] + found["dp2 overlapped"]:
        assert rank["resumed"] == {"reference is the first log-probs": True, "weights are the saved ones": True}


@pytest.mark.parametrize("what", [*LOSS, "gradient", "own statistics"])
@pytest.mark.parametrize("layout", POISONED_LAYOUTS)
def test_an_update_that_is_not_finite_is_skipped_and_leaves_every_bit(
    what: str, layout: str, found: dict[str, list[dict[str, Any]]]
) -> None:
    ranks = [rank["poisoned"] for rank in found[layout]]
    cases = [name for name in ranks[0] if name.startswith(f"{what} ")]
    assert len(cases) == (1 if layout != "dp2" or what in ("weights", "own statistics") else 3)
    for case in cases:
        assert all(rank[case]["unchanged"] for rank in ranks), case
        in_gradient = float(what == "gradient")
        assert ranks[0][case]["metrics"] == {
            "skipped": 1.0,
            "skipped_for_loss": 1.0 - in_gradient,
            "skipped_for_gradient": in_gradient,
            "lr": 1e-3,
        }
        assert all(rank[case]["metrics"] is None for rank in ranks[1:])


@pytest.mark.parametrize("layout", POISONED_LAYOUTS)
def test_the_next_update_is_as_if_the_skipped_ones_had_never_been(
    layout: str, found: dict[str, list[dict[str, Any]]]
) -> None:
    for rank in found[layout]:
        assert rank["poisoned"]["next"] == {"same state": True, "same metrics": True, "changed": True}
    assert found[layout][0]["poisoned"]["metrics"]["skipped"] == 0.0


# ---- on the ranks


def run_layouts(root: str, layouts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    from megatron.core import parallel_state

    results: dict[str, dict[str, Any]] = {}
    for name, given in layouts.items():
        print("layout", name, flush=True)
        sizes = {key: value for key, value in given.items() if key not in ("bf16", "moe", "overlap")}
        made = make_groups(**sizes)
        directory = str(Path(root) / ("moe" if given.get("moe") else "dense"))

        options = {key: given[key] for key in ("bf16", "overlap") if key in given}
        build = functools.partial(make_actor, directory, *made, keep_reference=True, **options)

        mine = make_sequences(NUM_SEQUENCES)[made[0].dp_rank :: made[0].dp]
        results[name] = {"lent": lend(build(), build(), mine)}
        if made[0].dp == 2 and not given.get("moe"):
            results[name]["resumed"] = resume(build(), build(), mine, Path(root) / f"saved {name}")
        if name in POISONED_LAYOUTS:
            values = (math.nan, math.inf, -math.inf) if name == "dp2" else (math.nan,)
            results[name]["poisoned"] = poison(build(), build(), mine, values)
        parallel_state.destroy_model_parallel()
    return results


def state_of(actor: Any) -> list[torch.Tensor]:
    """Everything an update changes: parameters, their masters, moments, step counters, rates, the schedule's place."""
    from megatron_fipo.actor.model import gather_parameters

    gather_parameters(actor.chunks)
    optimizers = getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])
    tensors = [tensor for chunk in actor.chunks for tensor in chunk.parameters()]
    for part in optimizers:
        for group in part.param_groups:
            tensors += [*group["params"], torch.tensor([group["lr"], group["weight_decay"]], dtype=torch.float64)]
            for parameter in group["params"]:
                kept = part.optimizer.state.get(parameter, {})
                tensors += [torch.as_tensor(kept[key]) for key in sorted(kept)]
    tensors.append(torch.tensor(actor.scheduler.num_steps))
    return [tensor.detach().clone() for tensor in tensors]


def same_bits(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """As bytes, since NaN is not equal to itself."""
    assert len(some) == len(others)
    return all(bytes_of(a) == bytes_of(b) for a, b in zip(some, others))


def bytes_of(tensor: torch.Tensor) -> bytes:
    as_numbers = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return as_numbers.numpy(force=True).tobytes()


def train(actor: Any, sequences: list[TrainSequence], old: list[torch.Tensor], **options: Any) -> Any:
    return actor.update(sequences, old, algorithm="fipo", settings=settings_for("fipo", "paper"), **options)


def lend(actor: Any, control: Any, sequences: list[TrainSequence]) -> dict[str, Any]:
    """Updates with the initial weights lent between them, beside an actor that never lends."""
    first, _ = actor.old_logprobs([sequences])
    control.old_logprobs([sequences])
    places = [parameter.data_ptr() for chunk in actor.chunks for parameter in chunk.parameters()]
    reference, unchanged = [], []
    for _ in range(3):
        train(actor, sequences, first)
        train(control, sequences, first)
        before = state_of(actor)
        reference.append(actor.reference_logprobs([sequences]))
        unchanged.append(same_bits(before, state_of(actor)))
    now, _ = actor.old_logprobs([sequences])
    return {
        "num_logprobs": len(first),
        "reference is the first log-probs": all(same_bits(first, found) for found in reference),
        "the pass leaves every bit": all(unchanged),
        "views stay": places == [parameter.data_ptr() for chunk in actor.chunks for parameter in chunk.parameters()],
        "updates go on as without it": same_bits(state_of(actor), state_of(control)),
        "the log-probs have moved": any(float((a - b).abs().max()) > 1e-3 for a, b in zip(now, first)),
    }


def resume(actor: Any, fresh: Any, sequences: list[TrainSequence], directory: Path) -> dict[str, bool]:
    from megatron_fipo.actor.checkpoint import load_checkpoint, save_checkpoint

    first, _ = actor.old_logprobs([sequences])
    train(actor, sequences, first)
    save_checkpoint(actor, str(directory), 1, {})
    load_checkpoint(fresh, directory / "step_0000001")
    return {
        "reference is the first log-probs": same_bits(first, fresh.reference_logprobs([sequences])),
        "weights are the saved ones": same_bits(state_of(actor), state_of(fresh)),
    }


def poison(actor: Any, control: Any, sequences: list[TrainSequence], values: Sequence[float]) -> dict[str, Any]:
    """Updates that must be skipped, broken by each of `values` on the last rank only, then a clean one, beside an actor
    that only does the clean ones."""
    old, _ = actor.old_logprobs([sequences])
    # off the last stage there are no log-probs, and nobody reads the engine's
    sequences = with_rollout_logprobs(sequences, old or [torch.zeros(len(s.token_ids)) for s in sequences])
    is_broken_here = dist.get_rank() == dist.get_world_size() - 1
    correction = CorrectionSettings(**CORRECTION)
    for each in (actor, control):
        train(each, sequences, old, correction=correction, reference_logprobs=each.reference_logprobs([sequences]))
    reference = actor.reference_logprobs([sequences])
    position = int(np.flatnonzero(sequences[-1].loss_mask)[0])
    found: dict[str, Any] = {}

    def attempt(name: str, **changes: Any) -> None:
        given = {"sequences": sequences, "old": old, "correction": correction, "reference": reference, **changes}
        before = state_of(actor)
        metrics = train(
            actor,
            given["sequences"],
            given["old"],
            correction=given["correction"],
            reference_logprobs=given["reference"],
        )
        found[name] = {"metrics": metrics, "unchanged": same_bits(before, state_of(actor))}

    def with_value(rows: list[torch.Tensor], value: float) -> list[torch.Tensor]:
        changed = [row.clone() for row in rows]
        if is_broken_here:
            changed[-1][position] = value
        return changed

    def with_field(field: str, value: float) -> list[TrainSequence]:
        array = getattr(sequences[-1], field).copy()
        if is_broken_here:
            array[position] = value
        return [*sequences[:-1], dataclasses.replace(sequences[-1], **{field: array})]

    for value in values:
        attempt(f"old log-probs {value}", old=with_value(old, value))
        attempt(f"reference log-probs {value}", reference=with_value(reference, value))
        attempt(f"advantages {value}", sequences=with_field("advantages", value))
        attempt(f"rollout log-probs {value}", sequences=with_field("rollout_logprobs", value))
        with broken_output(actor, value if is_broken_here else 0.0):
            attempt(f"log-probs {value}")
        with broken_gradient(actor, value if is_broken_here else 1.0):
            attempt(f"gradient {value}")
    own = dataclasses.replace(correction, custom_loss_function_path="test_untouched:loss_with_a_broken_statistic")
    attempt("own statistics nan", correction=own)
    weight = next(actor.chunks[-1].parameters()).data.view(-1)
    kept = weight[0].clone()
    if is_broken_here or actor.chunks[0].ddp_config.overlap_param_gather:  # which would bring the owner's value
        weight[0] = float("nan")
    attempt("weights nan")
    weight[0] = kept
    before = state_of(actor)
    metrics = [
        train(each, sequences, old, correction=correction, reference_logprobs=reference) for each in (actor, control)
    ]
    after = state_of(actor)
    found["metrics"] = metrics[0]
    found["next"] = {
        "same state": same_bits(after, state_of(control)),
        "same metrics": metrics[0] == metrics[1],
        "changed": not same_bits(before, after),
    }
    return found


def loss_with_a_broken_statistic(*args: Any, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    from megatron_fipo.losses import dapo_loss

    loss, info = dapo_loss(*args, **options)
    return loss, {**info, "token_stats": {"broken": torch.tensor([0.0, torch.nan])}}


@contextmanager
def broken_output(actor: Any, value: float) -> Any:
    """Add `value` to one log-prob of every micro-batch, where this rank makes any."""
    from megatron_fipo.actor.model import unwrapped

    def change(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.post_process:
            return output
        changed = torch.zeros_like(output)
        changed[0, int(output[0].detach().nonzero()[0, 0])] = value
        return output + changed

    handles = [unwrapped(chunk).register_forward_hook(change) for chunk in actor.chunks]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def broken_gradient(actor: Any, factor: float) -> Any:
    """Multiply the gradient of a parameter: the loss stays finite."""
    make: Callable[[torch.Tensor], torch.Tensor] = lambda gradient: gradient * factor  # noqa: E731
    handle = next(actor.chunks[-1].parameters()).register_hook(make)
    yield
    handle.remove()
