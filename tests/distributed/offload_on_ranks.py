"""What the tests of leaving the device run on every rank: one actor goes and comes back, another is left alone."""

from __future__ import annotations

from typing import Any

import torch
from actor_on_ranks import make_actor, make_groups, settings_for
from megatron.core import parallel_state
from tiny_models import make_sequences

from megatron_fipo.actor import offload
from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.model import gather_parameters
from megatron_fipo.actor.offload import PARTS, Offloader
from megatron_fipo.actor.owned_tensors import ActorAway
from megatron_fipo.trainer.exchange import scatter_shares

NUM_SEQUENCES = 8


def run_cases(model_dirs: dict[str, str], cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`leave_and_return` in every case's layout, one after the other."""
    found = {}
    for name, case in cases.items():
        print("case", name, flush=True)
        found[name] = leave_and_return(model_dirs[case["model"]], case["layout"], case["options"], case["keep"])
        parallel_state.destroy_model_parallel()
    return found


def leave_and_return(
    model_dir: str, layout: dict[str, Any], options: dict[str, Any], keep_gradients: bool
) -> dict[str, Any]:
    """Two actors make the same updates; one is away before the first, between the first two and before the last."""
    made = make_groups(**layout)
    options = {"keep_reference": True, **options}
    still, moved = (make_actor(model_dir, *made, **options) for _ in range(2))
    offload.PIECE_BYTES = 10_000  # so that tensors lie across the pieces of main memory
    offloader = Offloader(moved.chunks, moved.optimizer, moved.device, keep_gradients=keep_gradients)
    found: dict[str, Any] = {"changed": [], "metrics": []}
    found["bytes"] = [there_and_back(moved, offloader, found["changed"], keep_gradients)]
    for _ in range(3):
        found["metrics"].append([one_update(actor) for actor in (still, moved)])
        found["bytes"].append(there_and_back(moved, offloader, found["changed"], keep_gradients))
    found["wanted_bytes"] = {
        part: sum(value.untyped_storage().nbytes() for value in unique(tensors_of(moved)[part])) for part in PARTS
    }
    for actor in (still, moved):
        gather_parameters(actor.chunks)
    found["refusals"] = refusals_while_away(moved, offloader)
    found["differences"] = differences(
        tensors_of(still), tensors_of(moved), PARTS if keep_gradients else ("parameters", "optimizer")
    )
    found["num_tensors"] = {part: len(tensors) for part, tensors in tensors_of(moved).items()}
    exported = [{name: value.clone() for name, value in actor.export_weights()} for actor in (still, moved)]
    found["exports_agree"] = list(exported[0]) == list(exported[1]) and all(
        torch.equal(exported[0][name], exported[1][name]) for name in exported[0]
    )
    return found


def there_and_back(
    actor: Actor, offloader: Offloader, changed: list[str], keep_gradients: bool
) -> dict[str, dict[str, int]]:
    """Leave as a sync does, parameters last, and come back; names of what is not as it was go to `changed`."""
    gather_parameters(actor.chunks)
    tensors = tensors_of(actor)
    before = {part: {name: value.clone() for name, value in named.items()} for part, named in tensors.items()}
    addresses = {part: [value.untyped_storage()._cdata for value in named.values()] for part, named in tensors.items()}
    left = {"gradients": offloader.leave("gradients"), "optimizer": offloader.leave("optimizer", "gradients")}
    assert offloader.away == ("gradients", "optimizer")
    list(actor.export_weights())  # parameters are still there
    left["parameters"] = offloader.leave("parameters")
    assert offloader.away == PARTS
    assert offloader.bytes_away == sum(left.values())
    sizes = {value.untyped_storage().nbytes() for named in tensors.values() for value in named.values()}
    assert sizes == {0}, sizes
    returned = {part: offloader.enter(part, part) for part in PARTS}
    assert offloader.away == ()
    assert offloader.bytes_away == 0
    after = tensors_of(actor)
    assert {part: [value.untyped_storage()._cdata for value in named.values()] for part, named in after.items()} == (
        addresses
    )
    if not keep_gradients:
        before["gradients"] = {name: torch.zeros_like(value) for name, value in before["gradients"].items()}
    changed += differences(before, after, PARTS)
    return {"left": left, "returned": returned}


def one_update(actor: Actor) -> float:
    """One step of the loop, reference included: the metrics say whether its sums were the same."""
    sequences = make_sequences(NUM_SEQUENCES)
    mine = scatter_shares(
        sequences if actor.layout.rank == 0 else None, 1, actor.layout, actor.groups.control, actor.arch.hidden_size
    )
    old, _ = actor.old_logprobs(mine)
    reference = actor.reference_logprobs(mine)
    assert len(reference) == len(old)
    metrics = actor.update(mine[0], old, algorithm="fipo", settings=settings_for("fipo", "paper"))
    return float("nan") if metrics is None else metrics["grad_norm"] + sum(float(values.sum()) for values in reference)


def refusals_while_away(actor: Actor, offloader: Offloader) -> list[str]:
    """What each call says when some of the actor has left. It all comes back afterwards."""
    said = []
    mini_batches = [make_sequences(NUM_SEQUENCES)]

    def update() -> None:
        actor.update(mini_batches[0], [], algorithm="fipo", settings=settings_for("fipo", "paper"))

    for parts, calls in (
        (("optimizer",), (update,)),
        (("gradients",), (update,)),
        (
            PARTS,
            (
                update,
                lambda: actor.old_logprobs(mini_batches),
                lambda: actor.reference_logprobs(mini_batches),
                lambda: list(actor.export_weights()),
            ),
        ),
    ):
        offloader.leave(*parts)
        for call in calls:
            try:
                call()
            except ActorAway as error:
                said.append(str(error))
            else:
                said.append("nothing")
        offloader.enter(*PARTS)
    return said


def tensors_of(actor: Actor) -> dict[str, dict[str, torch.Tensor]]:
    """Everything an update reads and writes on this rank, by part and name, gathered apart from the code tested.

    An fp32 parameter's master is the parameter.
    """
    parameters: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    for index, chunk in enumerate(actor.chunks):
        for name, parameter in chunk.named_parameters():
            parameters[f"{index}.{name}"] = parameter.detach()
            gradients[f"{index}.{name}"] = parameter.main_grad
        parameters |= {f"{index}.buffer.{i}": b.detach() for i, b in enumerate(chunk.module.buffers())}
    owned = {value.untyped_storage()._cdata for value in parameters.values()}
    optimizer: dict[str, torch.Tensor] = {}
    for part, one in enumerate(getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])):
        if one.optimizer is None:
            continue
        for number, parameter in enumerate(p for group in one.optimizer.param_groups for p in group["params"]):
            if parameter.untyped_storage()._cdata not in owned:
                optimizer[f"{part}.{number}.master"] = parameter.detach()
            for name, value in one.optimizer.state.get(parameter, {}).items():
                if name != "step":
                    optimizer[f"{part}.{number}.{name}"] = value
    return {"parameters": parameters, "gradients": gradients, "optimizer": optimizer}


def unique(named: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """One tensor per storage."""
    return list({value.untyped_storage()._cdata: value for value in named.values()}.values())


def differences(
    one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]], parts: tuple[str, ...]
) -> list[str]:
    """Names of tensors that are not the same bits."""
    found = []
    for part in parts:
        found += sorted(f"{part} {name}" for name in set(one[part]) ^ set(other[part]))
        found += [
            f"{part} {name}"
            for name, value in one[part].items()
            if name in other[part] and not torch.equal(value.view(torch.uint8), other[part][name].view(torch.uint8))
        ]
    return found
