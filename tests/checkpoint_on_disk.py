"""Checkpoints as a save writes them, small and without Megatron."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint

from megatron_fipo.actor.checkpoint_files import (
    begin_aside,
    commit,
    find_checkpoint,
    read_run_state,
    remove,
    seal,
    verify_checkpoint,
)
from megatron_fipo.actor.retention import retire


@functools.cache
def torch_dist_files() -> dict[str, bytes]:
    """A checkpoint of one tensor as torch writes it, by file name."""
    with tempfile.TemporaryDirectory() as directory:
        torch.distributed.checkpoint.save({"weight": torch.arange(64.0)}, checkpoint_id=directory, no_dist=True)
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def write_aside(root: Path, step: int, score: object = None) -> Path:
    """What a save writes before it seals."""
    aside = begin_aside(root, step)
    for name, content in torch_dist_files().items():
        (aside / name).write_bytes(content)
    for name in ("rng_0.pt", "common.pt", "metadata.json"):
        (aside / name).write_bytes(b"state")
    state = {"step": step, "model": {}, "layout": {}, "trainer": {"surplus": []}, "score": score}
    (aside / "run_state.json").write_text(json.dumps(state))
    return aside


def save(root: Path, step: int, *, score: object = None, keep_last: int | None = None, keep_best: int = 0) -> Path:
    """A whole checkpoint, and what need not be kept removed."""
    aside = write_aside(root, step, score)
    seal(aside)
    directory = commit(aside)
    for retired in retire(directory, keep_last=keep_last, keep_best=keep_best):
        remove(retired)
    return directory


def reseal(directory: Path) -> Path:
    """Make the manifest of an edited checkpoint true again."""
    (directory / "manifest.json").unlink()
    seal(directory)
    return directory


def step_of_latest(root: Path) -> int:
    """The step that `latest` leads to, after verification."""
    directory = find_checkpoint(root)
    verify_checkpoint(directory)
    return int(read_run_state(directory)["step"])
