"""Training state as a Megatron torch_dist checkpoint: any layout can load it, the same layout resumes bit for bit.

checkpoint_files.py commits and verifies the directory; here is what goes into it and how it comes back.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import nn

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.checkpoint_files import (
    COMMON,
    METADATA,
    RUN_STATE,
    CheckpointError,
    agreed,
    begin_aside,
    commit,
    read_run_state,
    seal,
)
from megatron_fipo.actor.checkpoint_loading import load_sharded
from megatron_fipo.actor.checkpoint_reading import read_tensors, reason
from megatron_fipo.actor.checkpoint_writing import Snapshot, Written, saved, take_snapshot, write, write_metadata
from megatron_fipo.actor.finite_weights import require_finite_weights
from megatron_fipo.actor.model import gather_parameters, unwrapped
from megatron_fipo.actor.optimizer_shards import use_own_shards

FP8_SCALES = "fp8_scaling"
FORMAT_OF_STATE = {
    "distrib_optim_sharding_type": "fully_reshardable",  # in the parameters' own shapes: readable at any TP, PP and DP
    "chained_optim_avoid_prefix": True,  # one name for a moment, whether or not experts have their own optimizer
}


def save_checkpoint(
    actor: Actor,
    root: str | Path,
    step: int,
    trainer_state: Mapping[str, Any] | None,
    *,
    score: float | None = None,
) -> Path:
    """Write `root/step_NNNNNNN` after `step` finished steps and point `root/latest` at it; its path.

    `trainer_state` (rank 0; JSON) is everything outside Megatron: data position and surplus groups. Until all of it is
    on disk `latest` names the checkpoint before. Raises CheckpointError on every rank when one cannot write. Collective
    over all ranks. CheckpointSaver does the same beside training, and removes what is old.
    """
    control = actor.groups.control
    aside = begin_together(root, step, control)
    snapshot = snapshot_of(actor, step, trainer_state, score)
    everywhere = agreed(lambda: write(snapshot, aside, threading.Event()), control)
    return commit_together(aside, snapshot, everywhere, control)


def begin_together(root: str | Path, step: int, control: dist.ProcessGroup) -> Path:
    """An empty directory aside, made by rank 0 and there on every rank. Raises CheckpointError on all. Collective."""
    dist.barrier(group=control)  # a rank may still be giving up the save before
    name = agreed(lambda: str(begin_aside(Path(root), step)) if control.rank() == 0 else None, control)[0]
    assert name is not None, "rank 0 names the directory"
    aside = Path(name)

    def require_directory() -> None:
        if not aside.is_dir():
            raise CheckpointError(f"{aside}, which rank 0 made, is not there on every rank: see all one file system?")

    agreed(require_directory, control)
    return aside


def commit_together(aside: Path, snapshot: Snapshot, everywhere: Sequence[Written], control: dist.ProcessGroup) -> Path:
    """Make what all ranks wrote a checkpoint: rank 0 adds the description and the manifest, renames and points at it.

    Raises CheckpointError on every rank. Collective.
    """

    def commit_all() -> str | None:
        if snapshot.metadata is None:
            return None
        entries = {name: entry for written in everywhere for name, entry in written.entries.items()}
        entries[METADATA] = write_metadata(aside, snapshot.metadata, everywhere)
        seal(aside, entries)
        return str(commit(aside))

    name = agreed(commit_all, control)[0]
    assert name is not None, "rank 0 planned for all"
    return Path(name)


def snapshot_of(actor: Actor, step: int, trainer_state: Mapping[str, Any] | None, score: float | None) -> Snapshot:
    """This rank's part of the checkpoint after `step` finished steps, in memory of its own.

    `trainer_state` and `score` (rank 0; JSON) are written as they are. Raises CheckpointError on every rank when one
    cannot take its part, BrokenWeights when the weights hold a number that is not finite. Collective over all ranks.
    """
    rank, control = actor.layout.rank, actor.groups.control
    require_finite_weights(actor.chunks, control, num_updates=actor.scheduler.num_steps)
    small_files: dict[str, bytes] = {}

    def take_small_files() -> None:
        small_files[f"rng_{rank}.pt"] = saved(_state_of_layout(actor))
        if rank == 0:
            model, layout = _model_of(actor), _layout_of(actor)
            state = {"step": step, "model": model, "layout": layout, "trainer": trainer_state, "score": score}
            small_files[RUN_STATE] = json.dumps(state).encode()

    def begin() -> None:
        gather_parameters(actor.chunks)
        _begin_optimizer_state(actor)

    states: list[dict[str, Any]] = []
    snapshots: list[Snapshot] = []

    def describe() -> None:
        states.append({**_sharded_state(actor, is_loading=False), "content_metadata": FORMAT_OF_STATE})

    # one after the other: a rank that has no memory left must not leave the others waiting in what comes next
    agreed(take_small_files, control)
    agreed(begin, control)
    agreed(describe, control)
    agreed(lambda: snapshots.append(take_snapshot(states[0], small_files, control)), control)
    return snapshots[0]


def load_checkpoint(actor: Actor, directory: Path) -> bool:
    """Load model, optimizer, schedule and, at the layout that saved it, the random states and the scales of FP8.

    `directory` must have passed `verify_checkpoint`. Returns whether layout and precision are the saved ones: then the
    run goes on bit for bit. Raises CheckpointError when it holds another model or optimizer or was trained with another
    schedule; the actor is then of no further use. Collective over all ranks.
    """
    control = actor.groups.control
    state = read_run_state(directory)
    require_same_architecture(directory, state["model"], _model_of(actor))
    layout = _layout_of(actor)
    unsaid = layout.keys() - state["layout"].keys()
    if unsaid:
        raise CheckpointError(f"{directory / RUN_STATE} holds a layout without {', '.join(sorted(unsaid))}")
    _allocate_optimizer_state(actor)
    wanted = _hyperparameters(actor)
    loaded = load_sharded(_sharded_state(actor, is_loading=True), directory, control)
    agreed(lambda: _take_over(actor, loaded, directory), control)
    _require_same_hyperparameters(directory, _hyperparameters(actor), wanted)
    same_layout = state["layout"] == layout
    if same_layout:
        agreed(lambda: _set_state_of_layout(actor, directory / f"rng_{actor.layout.rank}.pt"), control)
    return same_layout


def load_model(chunks: Sequence[nn.Module], directory: Path) -> None:
    """Load the model alone, whatever layout saved it; `directory` must have passed `verify_checkpoint`.

    Raises CheckpointError when its tensors do not fit. Collective over all ranks.
    """
    loaded = load_sharded({"model": _sharded_model(chunks)}, directory, dist.distributed_c10d._get_default_group())
    for index, chunk in enumerate(chunks):
        unwrapped(chunk).load_state_dict(loaded["model"][f"chunk_{index}"])


def require_same_architecture(directory: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming the first property of a model in which the checkpoint's (`saved`) is another.

    How the Hugging Face files hold the weights is no such property.
    """
    for name, value in wanted.items():
        if name != "dtype" and saved.get(name) != value:
            raise CheckpointError(
                f"{directory / RUN_STATE} is of another model: its {name} is {saved.get(name)!r}, but this run's "
                f"(--hf-checkpoint and flags) is {value!r}"
            )


def _take_over(actor: Actor, loaded: dict[str, Any], directory: Path) -> None:
    """Put what was loaded in its places. Raises CheckpointError naming a piece that is not there."""
    for name in ("scheduler", "optimizer"):
        if not isinstance(loaded.get(name), dict):
            raise CheckpointError(f"{directory / COMMON} holds no state of the {name}: a piece of the run is missing")
    settings = loaded["optimizer"]
    if _distributed_parts(actor) and "optimizer" not in settings and 0 not in settings:
        raise CheckpointError(f"{directory / COMMON} holds no settings of the optimizer: a piece of the run is missing")
    missing = actor.scheduler.state_dict().keys() - loaded["scheduler"].keys()
    if missing:
        raise CheckpointError(f"{directory / COMMON} holds a scheduler's state without {', '.join(sorted(missing))}")
    what = "model"
    try:
        for index, chunk in enumerate(actor.chunks):
            unwrapped(chunk).load_state_dict(loaded["model"][f"chunk_{index}"])
        what = "optimizer"
        actor.optimizer.load_state_dict(_fitted_optimizer_state(actor, settings))
        what = "scheduler"
        actor.scheduler.num_steps = 0  # it adds what it loads
        actor.scheduler.load_state_dict(loaded["scheduler"])
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        raise CheckpointError(
            f"{directory / COMMON} holds a state of the {what} without, or with another, {reason(error)}"
        ) from error


def _allocate_optimizer_state(actor: Actor) -> None:
    """Give Adam moments to load into: torch's has none before its first step. Parameters stay as they are."""
    for part in _distributed_parts(actor):
        rates = [group["lr"] for group in part.param_groups]
        for group in part.param_groups:
            group["lr"] = 0.0  # the step with zero gradients would still decay the weights
        part._init_optimizer_states_with_dummy_values()
        for group, rate in zip(part.param_groups, rates):
            group["lr"] = rate


def _begin_optimizer_state(actor: Actor) -> None:
    """Before its first update the optimizer has no state to save: give it the one that update would begin with."""
    if all(part.optimizer.state for part in _distributed_parts(actor)):
        return
    _allocate_optimizer_state(actor)
    for part in _distributed_parts(actor):
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"].zero_()
        for group in part.optimizer.param_groups:
            if "step" in group:
                group["step"] = 0


def _distributed_parts(actor: Actor) -> list[DistributedOptimizer]:
    parts = getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])
    return [part for part in parts if isinstance(part, DistributedOptimizer)]


def _fitted_optimizer_state(actor: Actor, loaded: dict[Any, Any]) -> dict[Any, Any]:
    """What was loaded, divided among this actor's optimizers.

    With expert parallelism megatron-core keeps two, one of them for the experts, and numbers them; without, one. Their
    tensors come back under the parameters' names either way, but the settings and step counts of their parameter groups
    as they were saved. These are the same for experts and for all else.
    """
    parts = _distributed_parts(actor)
    if not parts:
        return loaded
    saved = [loaded] if "optimizer" in loaded else [loaded[i] for i in range(len(loaded)) if i in loaded]
    groups = [group for part in saved for group in part["optimizer"]["param_groups"]]
    groups = [{**group, "is_expert_parallel": not group["is_expert_parallel"]} for group in groups] + groups
    fitted = {}
    for index in range(len(parts)):
        own = loaded if len(parts) == 1 else loaded[index]
        settings = {**saved[0]["optimizer"], "param_groups": [dict(group) for group in groups]}
        fitted[index] = {**saved[0], "optimizer": settings, "param_state": own.get("param_state", {})}
    return fitted[0] if len(parts) == 1 else fitted


def _sharded_state(actor: Actor, *, is_loading: bool) -> dict[str, Any]:
    """megatron-core's description of model, optimizer and schedule, whose tensors are the actor's own."""
    for part in _distributed_parts(actor):
        use_own_shards(part)
    model = _sharded_model(actor.chunks)
    optimizer = actor.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(FORMAT_OF_STATE))
    for part in [optimizer, *optimizer.values()]:
        if isinstance(part, dict) and part.get("param_state", ...) == {}:
            del part["param_state"]  # a share of padding alone: what is not a tensor must be the same on every rank
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": actor.scheduler.state_dict(),
    }


def _sharded_model(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """Under global layer numbers inside, so that any number of chunks can load what any other saved."""
    return {f"chunk_{index}": unwrapped(chunk).sharded_state_dict() for index, chunk in enumerate(chunks)}


def _model_of(actor: Actor) -> dict[str, Any]:
    """What a checkpoint must share with the actor that loads it."""
    architecture = asdict(actor.arch)
    architecture.pop("dtype")  # how the Hugging Face files hold the weights: nothing the checkpoint depends on
    return {**architecture, "use_distributed_optimizer": actor.chunks[0].ddp_config.use_distributed_optimizer}


def _hyperparameters(actor: Actor) -> dict[str, Any]:
    """What flags say and loading would silently replace."""
    schedule = {name: value for name, value in actor.scheduler.state_dict().items() if name != "num_steps"}
    group = actor.optimizer.param_groups[0]
    return {**schedule, "adam_beta1": group["betas"][0], "adam_beta2": group["betas"][1], "adam_eps": group["eps"]}


def _require_same_hyperparameters(directory: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if not isinstance(found[name], int | float | str | None) or found[name] != value:
            raise CheckpointError(
                f"{directory} was trained with {name} {found[name]}, but this run's flags say {value}"
            )


def _layout_of(actor: Actor) -> dict[str, Any]:
    """What must be the same for the run to go on bit for bit."""
    layout = actor.layout
    return {
        **{name: getattr(layout, name) for name in ("tp", "pp", "cp", "dp", "vpp", "ep", "etp")},
        "sequence_parallel": layout.sequence_parallel,
        "params_dtype": str(next(actor.chunks[0].parameters()).dtype),
        "device": actor.device.type,
    }


def _state_of_layout(actor: Actor) -> dict[str, Any]:
    """What only a rank of the same layout has a use for."""
    scales = {} if actor.scaling is None else {FP8_SCALES: actor.scaling.state()}
    return {**_rng_state(), **scales}


def _set_state_of_layout(actor: Actor, path: Path) -> None:
    _set_rng_state(path)
    if actor.scaling is None:
        return
    scales = read_tensors(path).get(FP8_SCALES)
    if not isinstance(scales, dict) or not all(isinstance(scale, torch.Tensor) for scale in scales.values()):
        raise CheckpointError(f"{path} holds no {FP8_SCALES!r}: it was saved without --fp8-recipe delayed")
    actor.scaling.load(scales)


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state(), "tracker": dict(get_cuda_rng_tracker().get_states())}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(path: Path) -> None:
    """Take the random states from `path`. Raises CheckpointError naming one that it does not hold."""
    state, wanted = read_tensors(path), _rng_state()
    for name in wanted:
        if not isinstance(state, dict) or name not in state:
            raise CheckpointError(f"{path} holds no {name!r} random state: a piece of the run's state is missing")
    if not isinstance(state["tracker"], dict) or state["tracker"].keys() != wanted["tracker"].keys():
        raise CheckpointError(f"{path} holds other random states than {sorted(wanted['tracker'])}")
    try:
        torch.set_rng_state(state["cpu"])
        get_cuda_rng_tracker().set_states(dict(state["tracker"]))
        if "cuda" in wanted:
            torch.cuda.set_rng_state(state["cuda"])
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} holds a random state that cannot be set: {reason(error)}") from error
