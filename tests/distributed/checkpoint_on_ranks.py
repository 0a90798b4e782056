"""What the checkpoint tests run on every rank: train, save, build anew, load, train on, and compare to the last bit."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from actor_on_ranks import make_actor, make_groups, settings_for
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from tiny_models import make_sequences

from megatron_fipo.actor import checkpoint, checkpoint_saver
from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.checkpoint import load_checkpoint, save_checkpoint
from megatron_fipo.actor.checkpoint_files import (
    CheckpointError,
    find_checkpoint,
    read_run_state,
    verify_checkpoint_together,
)
from megatron_fipo.actor.checkpoint_saver import CheckpointSaver
from megatron_fipo.actor.optimizer import build_scheduler
from megatron_fipo.trainer.exchange import scatter_shares

NUM_STEPS, SAVED_STEP, NUM_UPDATES = 3, 1, 2
WARMUP_UPDATES = 4  # crosses the checkpoint after SAVED_STEP * NUM_UPDATES updates


def run_checks(
    model_dir: str,
    roots: str,
    cases: dict[str, dict[str, Any]],
    reshard_from: str,
    reshard_to: list[dict[str, Any]],
    other_model_dir: str | None,
) -> dict[str, Any]:
    """Every check of this file over the same ranks, in one launch; `roots` gets one folder of checkpoints per case."""
    found: dict[str, Any] = {}
    for name, case in cases.items():
        found[name] = resume_case(model_dir, f"{roots}/{name}", **case)
        parallel_state.destroy_model_parallel()
    found["resharded"] = reshard(model_dir, f"{roots}/{reshard_from}", reshard_to)
    if other_model_dir is not None:
        root = f"{roots}/{reshard_from}"
        found["refusals"] = refusals(model_dir, other_model_dir, root, f"{roots}/not a directory")
        found["refusals"]["damage"] = error_of(lambda: verify_checkpoint_together(damaged_copy(root)))
    return found


def run_expert_checks(
    model_dir: str, roots: str, cases: dict[str, dict[str, Any]], reshard_to: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """The cases of a mixture of experts, and each one's checkpoint loaded in other layouts."""
    found: dict[str, Any] = {"resharded": {}}
    for name, case in cases.items():
        found[name] = resume_case(model_dir, f"{roots}/{name}", **case)
        parallel_state.destroy_model_parallel()
        found["resharded"][name] = reshard(model_dir, f"{roots}/{name}", reshard_to[name])
    return found


def damaged_copy(root: str) -> Path:
    """The checkpoint with one bit of its last shard flipped."""
    damaged = Path(root) / "damaged"
    if dist.get_rank() == 0:
        shutil.copytree(find_checkpoint(root), damaged)
        shard = sorted(damaged.glob("*.distcp"))[-1]
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    dist.barrier()
    return damaged


def run_both_ways(model_dir: str, roots: str, layout: dict[str, Any], saved_step: int) -> dict[str, Any]:
    """One case saved at once and beside training: both outcomes, and the files of the two that differ in a byte."""
    found: dict[str, Any] = {}
    for name, is_async in (("sync", False), ("async", True)):
        found[name] = resume_case(model_dir, f"{roots}/{name}", layout, True, is_async=is_async, saved_step=saved_step)
        parallel_state.destroy_model_parallel()
    files = [
        {path.name: path.read_bytes() for path in find_checkpoint(f"{roots}/{name}").iterdir()}
        for name in ("sync", "async")
    ]
    found["names"] = sorted(files[0])
    found["unlike"] = sorted(
        name for name in files[0].keys() | files[1].keys() if files[0].get(name) != files[1].get(name)
    )
    return found


def save_while_training(actor: Actor, root: str, saved_step: int, steps: range, *, is_async: bool) -> list[str]:
    """Save, and train on; asynchronously nothing is written until that training is over. What `latest` says meanwhile
    and at the end."""
    go_on = threading.Event()
    original = checkpoint_saver.write

    def held(*arguments: Any) -> Any:
        assert go_on.wait(120)
        return original(*arguments)

    checkpoint_saver.write = held
    if not is_async:
        go_on.set()
    saver = CheckpointSaver(actor, root, is_async=is_async, say=print)
    try:
        saver.save(saved_step, {"position": 7})
        train_steps(actor, steps)
        assert saver.poll() is None
        latest = Path(root) / "latest"
        meanwhile = latest.read_text() if latest.exists() else "nothing"
        go_on.set()
        saver.finish()
    finally:
        go_on.set()
        saver.close()
        checkpoint_saver.write = original
    return [meanwhile, latest.read_text()]


def resume_case(
    model_dir: str, root: str, layout: dict[str, Any], bf16: bool, is_async: bool = False, saved_step: int = SAVED_STEP
) -> dict[str, Any]:
    """Train straight; train and save half-way; load into a new actor and go on. Names of what differs, and more."""
    made = make_groups(**layout)

    def new_actor() -> Actor:
        actor = make_actor(model_dir, *made, bf16=bf16)
        return replace(actor, scheduler=build_scheduler(actor.optimizer, lr_warmup_iters=WARMUP_UPDATES))

    straight = new_actor()
    metrics = train_steps(straight, range(NUM_STEPS))
    wanted = state_of(straight)

    saving = new_actor()
    train_steps(saving, range(saved_step))
    latest = save_while_training(saving, root, saved_step, range(saved_step, NUM_STEPS), is_async=is_async)

    resumed = new_actor()
    train_steps(resumed, range(5, 6))  # whatever it holds before must leave no trace
    directory = find_checkpoint(root)
    verify_checkpoint_together(directory)
    torch.manual_seed(99)
    same_layout = load_checkpoint(resumed, directory)
    resumed_metrics = train_steps(resumed, range(saved_step, NUM_STEPS))
    return {
        "latest": latest,
        "same_layout": same_layout,
        "state": read_run_state(directory),
        "saving_disturbs": differences(state_of(saving), wanted),
        "differences": differences(state_of(resumed), wanted),
        "metrics_equal": resumed_metrics == metrics[saved_step * NUM_UPDATES :],
        "lrs": [update["lr"] for update in metrics if update is not None],
        "num_tensors": len(wanted),
        "bytes_written": [
            sum(path.stat().st_size for path in directory.glob(f"__{rank}_*.distcp"))
            for rank in range(dist.get_world_size())
        ],
        "gathered": [gathered(resumed, is_loading=is_loading) for is_loading in (False, True)],
    }


def gathered(actor: Actor, *, is_loading: bool) -> list[str]:
    """Names of optimizer tensors to save, or load, that are not the optimizer's own memory."""
    parts = getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])
    held = {
        tensor.untyped_storage().data_ptr()
        for part in parts
        for group in part.optimizer.param_groups
        for parameter in group["params"]
        for tensor in (parameter, *part.optimizer.state[parameter].values())
        if isinstance(tensor, torch.Tensor)
    }
    described = checkpoint._sharded_state(actor, is_loading=is_loading)["optimizer"]
    tensors = [item for item in nested_values(described) if isinstance(item, ShardedTensor)]
    assert len(tensors) > 20, "nothing to save"
    return [item.key for item in tensors if item.data.untyped_storage().data_ptr() not in held]


def reshard(model_dir: str, root: str, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Load the checkpoint in `root` in each layout and train one more step; on rank 0 the parameters."""
    results = []
    for layout in layouts:
        actor = make_actor(model_dir, *make_groups(**layout))
        actor = replace(actor, scheduler=build_scheduler(actor.optimizer, lr_warmup_iters=WARMUP_UPDATES))
        same_layout = load_checkpoint(actor, find_checkpoint(root))
        train_steps(actor, range(SAVED_STEP, SAVED_STEP + 1))
        parameters = {name: value.clone() for name, value in actor.export_weights()}
        results.append({"same_layout": same_layout, "parameters": parameters})
        parallel_state.destroy_model_parallel()
    return results


def refusals(model_dir: str, other_model_dir: str, root: str, not_a_directory: str) -> dict[str, str]:
    """The errors of checkpoints that do not belong to the actor, and of one that cannot be written, on this rank."""
    made = make_groups()
    other, same = make_actor(other_model_dir, *made), make_actor(model_dir, *made)
    return {
        "model": error_of(lambda: load_checkpoint(other, find_checkpoint(root))),
        "schedule": error_of(lambda: load_checkpoint(same, find_checkpoint(root))),
        "write": error_of(lambda: save_checkpoint(same, not_a_directory, 1, None)),
    }


def error_of(function: Any) -> str:
    try:
        function()
    except CheckpointError as error:
        return str(error)
    return "no error"


def train_steps(actor: Actor, steps: range) -> list[dict[str, float] | None]:
    """Steps as the loop makes them: old log-probs, then the updates, over sequences that depend on the step alone."""
    metrics = []
    for step in steps:
        sequences = make_sequences(8, seed=step) if actor.layout.rank == 0 else None
        mini_batches = scatter_shares(
            sequences, NUM_UPDATES, actor.layout, actor.groups.control, actor.arch.hidden_size
        )
        logprobs, _ = actor.old_logprobs(mini_batches)
        start = 0
        for batch in mini_batches:
            old = logprobs[start : start + len(batch)]
            metrics.append(actor.update(batch, old, algorithm="fipo", settings=settings_for("fipo", "paper")))
            start += len(batch)
    return metrics


def state_of(actor: Actor) -> dict[str, torch.Tensor]:
    """Everything on this rank that the next update depends on."""
    state = {
        f"parameter {index}.{name}": p.detach().clone()
        for index, chunk in enumerate(actor.chunks)
        for name, p in chunk.named_parameters()
    }
    for part in getattr(actor.optimizer, "chained_optimizers", [actor.optimizer]):
        for g, group in enumerate(part.optimizer.param_groups):
            state[f"group {g}"] = torch.tensor([group["lr"], group["weight_decay"], group["eps"], *group["betas"]])
            for i, parameter in enumerate(group["params"]):
                state[f"master {g}.{i}"] = parameter.detach().clone()
                for name, value in part.optimizer.state[parameter].items():
                    state[f"{name} {g}.{i}"] = torch.as_tensor(value).clone()
    state["schedule"] = torch.tensor(actor.scheduler.num_steps)
    return state


def differences(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit, on any rank."""
    here = sorted(found.keys() ^ wanted.keys())
    here += [name for name in wanted if name in found and not torch.equal(found[name], wanted[name])]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return [f"rank {rank}: {name}" for rank, names in enumerate(everywhere) for name in names]
