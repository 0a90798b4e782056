"""What runs on every rank: a real actor is given broken numbers, one at a time, on its last rank only."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from actor_on_ranks import make_actor, make_groups, settings_for
from megatron.core import parallel_state
from tiny_models import make_sequences, with_rollout_logprobs

from megatron_fipo.actor import pipeline
from megatron_fipo.actor.checkpoint import save_checkpoint
from megatron_fipo.actor.checkpoint_files import CheckpointError
from megatron_fipo.actor.finite_weights import BrokenWeights
from megatron_fipo.actor.model import unwrapped
from megatron_fipo.config import CorrectionSettings
from megatron_fipo.types import TrainSequence

CORRECTION = {"kl_coef": 0.1, "use_tis": True}
FIELDS = ("advantages", "rollout_logprobs")


def break_numbers(
    model_dir: str, root: str, layouts: dict[str, dict[str, Any]], values: list[float]
) -> dict[str, dict[str, dict[str, Any]]]:
    """By layout and case: what the update came to, and whether everything is still finite."""
    found = {}
    for name, given in layouts.items():
        options = {key: given[key] for key in ("bf16",) if key in given}
        made = make_groups(**{key: value for key, value in given.items() if key != "bf16"})
        actor = make_actor(model_dir, *made, keep_reference=True, **options)
        found[name] = _of_updates(actor, values) | _of_weights(actor, values, f"{root}/{name}")
        parallel_state.destroy_model_parallel()
    return found


def _of_updates(actor: Any, values: list[float]) -> dict[str, dict[str, Any]]:
    """Updates with a broken number each; the actor goes on from whatever they left."""
    sequences = make_sequences(16)[actor.layout.dp_rank :: actor.layout.dp]
    old, _ = actor.old_logprobs([sequences])
    sequences = with_rollout_logprobs(sequences, old or [torch.zeros(len(s.token_ids)) for s in sequences])
    reference = actor.reference_logprobs([sequences])
    position = int(np.flatnonzero(sequences[-1].loss_mask)[0])
    found: dict[str, dict[str, Any]] = {}

    def attempt(
        name: str,
        given: list[TrainSequence] = sequences,
        old_logprobs: list[torch.Tensor] = old,
        reference_logprobs: list[torch.Tensor] = reference,
    ) -> None:
        before = state_of(actor)
        metrics = actor.update(
            given,
            old_logprobs,
            algorithm="fipo",
            settings=settings_for("fipo", "paper"),
            correction=CorrectionSettings(**CORRECTION),
            reference_logprobs=reference_logprobs,
        )
        after = state_of(actor)
        found[name] = {
            "is_finite": all(bool(torch.isfinite(tensor).all()) for tensor in after),
            "unchanged": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
            "skipped": None if metrics is None else metrics["skipped"],
            "metrics_finite": metrics is None or all(np.isfinite(v) for v in metrics.values() if isinstance(v, float)),
        }

    def with_value(rows: list[torch.Tensor], value: float) -> list[torch.Tensor]:
        changed = [row.clone() for row in rows]
        if changed and is_last_rank():
            changed[-1][position] = value
        return changed

    def with_field(field: str, value: float) -> list[TrainSequence]:
        array = getattr(sequences[-1], field).copy()
        if is_last_rank():
            array[position] = value
        return [*sequences[:-1], dataclasses.replace(sequences[-1], **{field: array})]

    for value in values:
        attempt(f"old log-probs {value}", old_logprobs=with_value(old, value))
        attempt(f"reference log-probs {value}", reference_logprobs=with_value(reference, value))
        for field in FIELDS:
            attempt(f"{field.replace('_', ' ')} {value}", given=with_field(field, value))
        with _broken_output(actor, value):
            attempt(f"log-probs {value}")
        with _broken_gradient(actor, value):
            attempt(f"gradient {value}")
        for name, change in (("loss plus", torch.add), ("loss times", torch.mul)):
            with _broken_loss(change, value):
                attempt(f"{name} {value}")
    attempt("nothing")
    return found


def _of_weights(actor: Any, values: list[float], root: str) -> dict[str, dict[str, Any]]:
    """A broken weight, and a broken moment of Adam's: what is exported and saved then."""
    found = {}
    weight = list(actor.chunks[-1].parameters())[-1].data.view(-1)
    kept = weight[0].clone()
    for value in values:
        if is_last_rank():
            weight[0] = value
        found[f"weight pushed {value}"] = {"error": _error_of(lambda: [None for _ in actor.export_weights()])}
        error = _error_of(lambda: save_checkpoint(actor, root, 1, {}))
        found[f"weight saved {value}"] = {"error": error, "left": sorted(p.name for p in Path(root).glob("[!.]*"))}
        weight[0] = kept
        dist.barrier()
    return found


def state_of(actor: Any) -> list[torch.Tensor]:
    """Parameters and moments of this rank."""
    tensors = [parameter.detach().clone() for chunk in actor.chunks for parameter in chunk.parameters()]
    for part in getattr(actor.optimizer, "chained_optimizers", [actor.optimizer]):
        for moments in part.optimizer.state.values():
            tensors += [value.clone() for value in moments.values() if isinstance(value, torch.Tensor)]
        tensors += [p.detach().clone() for group in part.param_groups for p in group["params"]]
    first = [tensor for tensor in tensors if tensor.numel()]
    return first


def is_last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def _error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except BrokenWeights as error:
        return str(error)
    except (CheckpointError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@contextlib.contextmanager
def _broken_output(actor: Any, value: float) -> Iterator[None]:
    """Add `value` to one log-prob of every micro-batch of the last rank's."""

    def change(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.post_process or not is_last_rank():
            return output
        changed = torch.zeros_like(output)
        changed[0, int(output[0].detach().nonzero()[0, 0])] = value
        return output + changed

    handles = [unwrapped(chunk).register_forward_hook(change) for chunk in actor.chunks]
    yield
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def _broken_gradient(actor: Any, value: float) -> Iterator[None]:
    """Put `value` into a parameter's gradient on the last rank: the loss stays finite."""

    def change(gradient: torch.Tensor) -> torch.Tensor:
        if not is_last_rank():
            return gradient
        changed = gradient.clone()
        changed.view(-1)[0] = value
        return changed

    handle = next(actor.chunks[-1].parameters()).register_hook(change)
    yield
    handle.remove()


@contextlib.contextmanager
def _broken_loss(change: Callable[[torch.Tensor, float], torch.Tensor], value: float) -> Iterator[None]:
    """What the loss function returns, plus or times `value` on the last rank."""
    before = pipeline.LOSSES["fipo"]

    def broken(*arguments: Any, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        loss, info = before(*arguments, **options)
        return (change(loss, value) if is_last_rank() else loss), info

    pipeline.LOSSES["fipo"] = broken
    yield
    pipeline.LOSSES["fipo"] = before
