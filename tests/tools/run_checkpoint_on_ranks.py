"""Checkpoints of a run, saved by its own actor in a layout; actors that start from one; tools beside them."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from actor_on_ranks import make_actor, make_groups
from converting import run

from megatron_fipo.actor.checkpoint import save_checkpoint
from megatron_fipo.actor.megatron_weights import MegatronWeights, find_megatron_checkpoint
from megatron_fipo.actor.weights import load_hf_weights
from megatron_fipo.own_state import NOTHING_DONE
from megatron_fipo.run import _verified_start
from megatron_fipo.weights.architecture import padded_vocab_size, read_architecture
from megatron_fipo.weights.hf_files import HFWeights


def save_two_steps(model_dir: str, root: str) -> None:
    """Tensor parallel over two ranks, every weight 1.25 times the model's."""
    actor = make_actor(model_dir, *make_groups(tp=2))
    actor.optimizer.step()  # of zero gradients, which only decays
    padded = padded_vocab_size(actor.arch.vocab_size, 2)
    load_hf_weights(actor.chunks, actor.arch, HFWeights(model_dir), actor.layout, padded_vocab=padded)
    with torch.no_grad():
        for chunk in actor.chunks:
            for parameter in chunk.parameters():
                parameter.mul_(1.25)
    for step in (1, 2):
        save_checkpoint(actor, root, step, NOTHING_DONE)


def start_from(model_dir: str, other_dir: str, checkpoint: str) -> list[str]:
    """The parameters in which an actor that started from a torch_dist checkpoint differs from one that started from the
    model it was made of, in a layout of all ranks; `other_dir` is of the same architecture, with other weights."""
    layout, groups = make_groups(tp=2)
    arch = read_architecture(other_dir)
    actor = make_actor(other_dir, layout, groups)
    padded = padded_vocab_size(arch.vocab_size, 2)
    found = []
    for source in (MegatronWeights(find_megatron_checkpoint(checkpoint), arch), HFWeights(model_dir)):
        load_hf_weights(actor.chunks, arch, source, layout, padded_vocab=padded)
        found.append({name: value.detach().clone() for name, value in actor.chunks[0].named_parameters()})
    one, other = found
    return [name for name in one if not torch.equal(one[name], other[name])]


def verified_start(model_dir: str, checkpoint: str) -> str:
    """What is wrong with a run's checkpoint that another run is to start from, as each rank says it."""
    make_groups(tp=2)
    try:
        _verified_start(MegatronWeights(Path(checkpoint), read_architecture(model_dir)))
    except ValueError as error:
        return str(error)
    return "nothing"


def call_tool(tool: str, arguments: list[str]) -> dict[str, Any]:
    """What a program in tools/ does in this process, and what it says."""
    said = {"out": io.StringIO(), "err": io.StringIO()}
    with contextlib.redirect_stdout(said["out"]), contextlib.redirect_stderr(said["err"]):
        status = run(tool, *arguments)
    return {"status": status, **{name: stream.getvalue() for name, stream in said.items()}}
