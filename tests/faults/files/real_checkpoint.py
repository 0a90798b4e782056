"""What runs on a rank: a real actor that trains and saves."""

from __future__ import annotations

from actor_on_ranks import make_actor, make_groups
from checkpoint_on_ranks import train_steps

from megatron_fipo.actor.checkpoint import save_checkpoint


def save_two_steps(model_dir: str, root: str) -> None:
    """Train two steps with a save after each."""
    actor = make_actor(model_dir, *make_groups())
    for step in (1, 2):
        train_steps(actor, range(step - 1, step))
        save_checkpoint(actor, root, step, {"position": step})
