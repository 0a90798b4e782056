"""Training state as a Megatron torch_dist checkpoint: any layout can load it, the same layout resumes bit for bit.

checkpoint_files.py commits and verifies the directory; here is what goes into it and how it comes back.
"""

from __future__ import annotations

import functools
import json
import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.safe_globals import register_safe_globals
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.checkpoint_files import (
    RUN_STATE,
    CheckpointError,
    agreed,
    begin_aside,
    commit,
    read_run_state,
    seal,
)
from megatron_fipo.actor.model import gather_parameters, unwrapped


def save_checkpoint(actor: Actor, root: str, step: int, trainer_state: Mapping[str, Any] | None) -> None:
    """Write `root/step_NNNNNNN` after `step` finished steps and point `root/latest` at it.

    `trainer_state` (rank 0; JSON) is everything outside Megatron: data position and surplus groups. Until all of it is
    on disk `latest` names the checkpoint before. Raises CheckpointError on every rank when one cannot write. Collective
    over all ranks.
    """
    rank, control = actor.layout.rank, actor.groups.control
    aside = agreed(lambda: str(begin_aside(Path(root), step)) if rank == 0 else None, control)[0]
    assert aside is not None, "rank 0 names the directory"
    directory = Path(aside)
    gather_parameters(actor.chunks)
    with _writing_in_this_process():
        try:
            dist_checkpointing.save(_sharded_state(actor, is_loading=False), aside, content_metadata=_format(actor))
        except (CheckpointException, OSError) as error:  # raised on every rank
            raise CheckpointError(f"the checkpoint {root}/step_{step:07d} cannot be written: {error}") from error

    def write_rest() -> None:
        torch.save(_rng_state(), directory / f"rng_{rank}.pt")
        if rank == 0:
            state = {"step": step, "model": _model_of(actor), "layout": _layout_of(actor), "trainer": trainer_state}
            (directory / RUN_STATE).write_text(json.dumps(state), encoding="utf-8")

    agreed(write_rest, control)
    seal(directory, control)
    agreed(lambda: commit(directory).name if rank == 0 else None, control)


def load_checkpoint(actor: Actor, directory: Path) -> bool:
    """Load model, optimizer, schedule and, at the layout that saved it, the random states.

    `directory` must have passed `verify_checkpoint`. Returns whether layout and precision are the saved ones: then the
    run goes on bit for bit. Raises CheckpointError when it holds another model or optimizer or was trained with another
    schedule; the actor is then of no further use. Collective over all ranks.
    """
    state = read_run_state(directory)
    require_same_architecture(directory, state["model"], _model_of(actor))
    register_safe_globals()
    _allocate_optimizer_state(actor)
    wanted = _hyperparameters(actor)
    try:
        loaded = dist_checkpointing.load(_sharded_state(actor, is_loading=True), str(directory))
    except (CheckpointException, CheckpointingException, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{directory} does not fit this model: {error}") from error
    for index, chunk in enumerate(actor.chunks):
        unwrapped(chunk).load_state_dict(loaded["model"][f"chunk_{index}"])
    actor.optimizer.load_state_dict(_fitted_optimizer_state(actor, loaded["optimizer"]))
    actor.scheduler.num_steps = 0  # it adds what it loads
    actor.scheduler.load_state_dict(loaded["scheduler"])
    _require_same_hyperparameters(directory, _hyperparameters(actor), wanted)
    same_layout = state["layout"] == _layout_of(actor)
    if same_layout:
        _set_rng_state(torch.load(directory / f"rng_{actor.layout.rank}.pt", weights_only=True))
    return same_layout


def load_model(chunks: Sequence[nn.Module], directory: Path) -> None:
    """Load the model alone, whatever layout saved it; `directory` must have passed `verify_checkpoint`.

    Raises CheckpointError when its tensors do not fit. Collective over all ranks.
    """
    register_safe_globals()
    wanted = {"model": _sharded_model(chunks)}
    try:
        loaded = dist_checkpointing.load(wanted, str(directory))
    except (CheckpointException, CheckpointingException, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{directory} does not fit this model: {error}") from error
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


@contextmanager
def _writing_in_this_process() -> Iterator[None]:
    """Spare a synchronous save the manager process through which megatron-core hands results over: it is started by
    spawning, lives as long as this process, and survives its being killed."""
    assert hasattr(filesystem_async, "_results_queue"), "megatron-core's FileSystemWriterAsync has changed"
    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


def _allocate_optimizer_state(actor: Actor) -> None:
    """Give Adam moments to load into: torch's has none before its first step. Parameters stay as they are."""
    for part in _distributed_parts(actor):
        rates = [group["lr"] for group in part.param_groups]
        for group in part.param_groups:
            group["lr"] = 0.0  # the step with zero gradients would still decay the weights
        part._init_optimizer_states_with_dummy_values()
        for group, rate in zip(part.param_groups, rates):
            group["lr"] = rate


def _distributed_parts(actor: Actor) -> list[DistributedOptimizer]:
    parts = getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])
    return [part for part in parts if isinstance(part, DistributedOptimizer)]


def _format(actor: Actor) -> dict[str, Any]:
    """Adam's state in the parameters' own shapes: readable at any TP, PP and DP."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": _is_on_cpu(actor),  # gather over gloo, without `.cuda()`
        "chained_optim_avoid_prefix": True,  # one name for a moment, whether or not experts have their own optimizer
    }


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
        fitted[index] = {**saved[0], "optimizer": settings, "param_state": own["param_state"]}
    return fitted[0] if len(parts) == 1 else fitted


def _is_on_cpu(actor: Actor) -> bool:
    return actor.device.type == "cpu"


def _sharded_state(actor: Actor, *, is_loading: bool) -> dict[str, Any]:
    for part in _distributed_parts(actor):
        part.get_parameter_state_dp_zero = functools.partial(_state_with_gaps, part)
        if _is_on_cpu(actor):
            part.data_parallel_group_gloo = part.data_parallel_group  # which is gloo already
    model = _sharded_model(actor.chunks)
    optimizer = actor.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_format(actor))
    for part in [optimizer, *optimizer.values()]:
        if isinstance(part, dict) and part.get("param_state", ...) is None:
            del part["param_state"]  # gathered elsewhere: what is not a tensor must be the same on every rank
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": actor.scheduler.state_dict(),
    }


def _sharded_model(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """Under global layer numbers inside, so that any number of chunks can load what any other saved."""
    return {f"chunk_{index}": unwrapped(chunk).sharded_state_dict() for index, chunk in enumerate(chunks)}


def _state_with_gaps(part: DistributedOptimizer, **options: Any) -> dict[Any, Any] | None:
    """`get_parameter_state_dp_zero` with every bucket where the buffer has it.

    megatron-core strings the buckets together without the padding at their ends, but then cuts parameters out at their
    places in the padded buffer: with two buckets (a tied embedding on the last stage, or overlapping reduction) and a
    padded one, all later parameters would be saved with their neighbours' moments, without an error.
    """
    state = DistributedOptimizer.get_parameter_state_dp_zero(part, **options)
    if state is None:
        return None
    for index, buffer in enumerate(part.buffers):
        for tensors in state[index].values():
            for name, packed in tensors.items():
                if name != "numel_unpadded":
                    tensors[name] = _spread(packed, buffer)
    return state


def _spread(packed: torch.Tensor, buffer: Any) -> torch.Tensor:
    """[buffer.numel_unpadded] -> [buffer.numel], zeros in the padding of buckets."""
    spread = packed.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        end = start + bucket.numel_unpadded
        spread[bucket.offset : bucket.offset + bucket.numel_unpadded] = packed[start:end]
        start = end
    assert start == len(packed), (start, len(packed))
    return spread


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


def _require_same_hyperparameters(directory: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if saved[name] != value:
            raise CheckpointError(
                f"{directory} was trained with {name} {saved[name]}, but this run's flags say {value}"
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


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state(), "tracker": dict(get_cuda_rng_tracker().get_states())}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(dict(state["tracker"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
