"""Checkpoints of a run, saved by its own actor in a layout."""

from __future__ import annotations

import torch
from actor_on_ranks import make_actor, make_groups

from megatron_fipo.actor.checkpoint import save_checkpoint
from megatron_fipo.actor.weights import load_hf_weights
from megatron_fipo.own_state import NOTHING_DONE
from megatron_fipo.weights.architecture import padded_vocab_size
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
