"""What runs on a rank: one checkpoint after the other is verified and loaded, and whatever it makes Python do noted."""

from __future__ import annotations

import copyreg
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from actor_on_ranks import make_actor, make_groups
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatron_fipo.actor.checkpoint import load_checkpoint, load_model
from megatron_fipo.actor.checkpoint_files import CheckpointError, find_checkpoint, read_run_state, verify_checkpoint

MEMORY_BYTES = 48 * 2**30  # of addresses
WATCHED = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "os.mkdir",
)


def load_each(model_dir: str, roots: dict[str, str]) -> dict[str, dict[str, Any]]:
    """For each directory of checkpoints: the outcome, what was executed, and which files outside were opened."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    copyreg.add_extension("os", "mkdir", 0xF0)
    actor = make_actor(model_dir, *make_groups())
    events: list[str] = []
    outside: list[str] = []
    root = ""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not root:
            return
        if event in WATCHED:
            events.append(f"{event} {arguments!r}"[:200])
        if event == "open" and "secret" in str(arguments[0]):
            outside.append(str(arguments[0]))

    sys.addaudithook(watch)
    found = {}
    for name, root in roots.items():
        events.clear()
        outside.clear()
        attributes = class_attributes()
        outcome = outcome_of(actor, root)
        events += sorted(f"attribute {changed}" for changed in class_attributes() ^ attributes)
        found[name] = {"outcome": outcome, "events": list(events), "outside": list(outside)}
    root = ""
    return found


def class_attributes() -> set[str]:
    """The attributes of the classes that a checkpoint's metadata is made of."""
    classes = [metadata.Metadata, metadata.MetadataIndex, metadata.TensorStorageMetadata, filesystem._StorageInfo]
    return {
        f"{cls.__qualname__}.{name}"
        for cls in [*classes, planner.SavePlan, torch.Size]
        for name in vars(cls)
        if name != "__slotnames__"
    }


def outcome_of(actor: Any, root: str) -> str:
    """Where the checkpoint is refused and why; "loaded" when it is not."""
    try:
        directory = find_checkpoint(Path(root))
        verify_checkpoint(directory)
        read_run_state(directory)
    except CheckpointError as error:
        return f"refused: {error}"
    except BaseException as error:
        return f"verify: {type(error).__name__}: {error}"
    outcomes = []
    for load in (lambda: load_checkpoint(actor, directory), lambda: load_model(actor.chunks, directory)):
        try:
            load()
            outcomes.append("loaded")
        except CheckpointError as error:
            outcomes.append(f"refused: {error}")
        except BaseException as error:
            outcomes.append(f"load: {type(error).__name__}: {error}")
    return outcomes[0] if outcomes[0] != "loaded" or outcomes[1] == "loaded" else outcomes[1]
