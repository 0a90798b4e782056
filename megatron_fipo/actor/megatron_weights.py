"""A model inside a torch_dist checkpoint, Megatron-LM's or this program's, as a source of Hugging Face tensors."""

from __future__ import annotations

import argparse
import math
import os
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.actor.checkpoint_files import COMMON, FORMAT, RUN_STATE
from megatron_fipo.actor.checkpoint_reading import CheckpointError, read_bytes, read_json, shown
from megatron_fipo.actor.torch_dist_files import StoredTensors, read_common
from megatron_fipo.config import require
from megatron_fipo.weights.architecture import Architecture, hf_shapes
from megatron_fipo.weights.mapping import (
    OUTPUT,
    expected_megatron_names,
    hf_from_shards,
    hf_names_of,
    partition_of,
    shard_shape,
)
from megatron_fipo.weights.megatron_arguments import argument_differences, vocabulary_note
from megatron_fipo.weights.stored_names import OPTIMIZER_KEY, TRACKER, Place, places_to_read

RELEASE = "release"
_ITERATION = re.compile(r"iter_(\d{7,})")


def find_megatron_checkpoint(path: str | Path) -> Path:
    """The torch_dist directory that Megatron-LM would load from `path`, or `path` itself where it is one.

    Raises CheckpointError saying what is there instead.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{shown(path)} is not a directory, but must be that of a checkpoint")
    tracker = path / TRACKER
    directory = path
    if os.path.lexists(tracker):
        text = read_bytes(tracker, 4096).decode("utf-8", errors="replace").strip()
        if text != RELEASE and not (text.isascii() and text.isdecimal()):
            raise CheckpointError(f"{shown(tracker)} says {ascii(text)[:100]}, but must say a number or 'release'")
        directory = path / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
        if not directory.is_dir():
            raise CheckpointError(f"{shown(tracker)} says {text}, but {shown(directory)} is not there")
    if (directory / FORMAT).is_file():
        return directory
    if any(directory.glob("mp_rank_*")):
        raise CheckpointError(
            f"{shown(directory)} is in Megatron-LM's format `torch` (mp_rank_*), a pickle per rank: load it with "
            "Megatron-LM and save it with --ckpt-format torch_dist (--ckpt-convert-format torch_dist)"
        )
    if (path / "config.json").is_file():
        raise CheckpointError(f"{shown(path)} is a Hugging Face model, but must be a torch_dist checkpoint")
    numbered = sorted(entry.name for entry in path.glob("iter_*"))
    more = f"; it holds {', '.join(numbered[:4])} but no {TRACKER}: name one of these" if numbered else ""
    raise CheckpointError(
        f"{shown(directory)} holds no {FORMAT}: it is no torch_dist checkpoint, of Megatron-LM or of this program{more}"
    )


class MegatronWeights:
    """The model in the torch_dist directory `directory`, read on demand under Hugging Face names: a `WeightSource`.

    Raises CheckpointError listing every difference between the checkpoint (its tensors, and the arguments that it was
    trained with) and the architecture, and every tensor that belongs neither to the model nor to an optimizer.
    """

    def __init__(self, directory: Path, arch: Architecture) -> None:
        self.directory, self.arch = directory, arch
        self.stored = StoredTensors(directory)
        self.settings = read_settings(self.stored)
        self._require_room()
        self._parts: dict[str, list[tuple[Place, ...]]] = {}
        differences = self.settings_differences()
        names = expected_megatron_names(arch, range(arch.num_layers), first_stage=True, last_stage=True)
        self._shapes = {name: shard_shape(name, arch, tp_size=1, padded_vocab=arch.vocab_size) for name in names}
        used: set[str] = set()
        missing = []
        for name in sorted(names):
            found = [
                places for places in places_to_read(name, arch) if all(p.key in self.stored.tensors for p in places)
            ]
            if not found:
                missing.append(name)
                continue
            self._parts[name] = found
            for places in found:
                used |= {place.key for place in places}
                differences += self._shape_differences(name, places)
        if missing:
            differences.append(f"it lacks {_first_few(missing)}")
        left = sorted(key for key in self.stored.tensors.keys() - used if not OPTIMIZER_KEY.match(key))
        if left:
            differences.append(f"it holds tensors that the model does not have: {_first_few(left)}")
        if differences:
            text = "; ".join(dict.fromkeys(differences))
            raise CheckpointError(f"{shown(directory)} is not the {arch.family} model of config.json: {text}")
        self._name_of = {hf: name for name in names for hf in hf_names_of(name)}
        self._hf_shapes = hf_shapes(arch)
        self._last: tuple[str, dict[str, Tensor]] | None = None

    def _require_room(self) -> None:
        """Layers and experts are stacked, in one of the first two dimensions, or have keys of their own: more of them
        than the longest of these would only be counted to be missed, which can take longer than anyone waits."""
        sizes = [self.stored.shape(key) for key in self.stored.tensors]
        most = max([len(sizes), *(max(shape[:2]) for shape in sizes if shape)])
        num_elements = sum(math.prod(shape) for shape in sizes)
        layers, experts = self.arch.num_layers, self.arch.num_moe_experts or 0
        for name, count, known in (
            ("num_hidden_layers", layers, most),
            ("num_experts", experts, most),
            ("num_hidden_layers x num_experts", layers * experts, num_elements),
        ):
            require(
                count <= known, f"config.json: {name}", count, f"<= {known}: more is not in {shown(self.directory)}"
            )

    def settings_differences(self) -> list[str]:
        """What the checkpoint says of its model against the architecture."""
        path = shown(self.directory / COMMON)
        if self.settings is None:
            return []
        if isinstance(self.settings, argparse.Namespace):
            return argument_differences(self.arch, vars(self.settings), f"{path}: args")
        wanted = asdict(self.arch)
        return [
            f"{RUN_STATE} says {name} {found!r}, but config.json makes it {wanted[name]!r}"
            for name, found in self.settings.items()
            if name in wanted and name not in ("dtype", "max_position_embeddings") and found != wanted[name]
        ]

    @property
    def note(self) -> str | None:
        """What a user should know who takes the model from here."""
        if isinstance(self.settings, argparse.Namespace):
            return vocabulary_note(self.arch, vars(self.settings))
        if self.settings is not None:
            return None
        return (
            f"{shown(self.directory)} says nothing of its model (no args): only names and shapes were compared with "
            "config.json; RoPE, norms and the experts' router are taken from there"
        )

    def megatron_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, whole, under its canonical name, in the order of the model."""
        for name in sorted(self._parts, key=place_in_model):
            yield name, self._whole(name)

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every Hugging Face tensor, made from parameters that are read once each."""
        for name, whole in self.megatron_tensors():
            yield from hf_from_shards(name, self.arch, [whole])

    @property
    def names(self) -> list[str]:
        """All tensors, sorted."""
        return sorted(self._hf_shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ValueError if there is no such tensor, as all of these do."""
        if name not in self._hf_shapes:
            raise ValueError(f"{self.directory} holds no {name}")
        return self._hf_shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor in the checkpoint."""
        self.shape(name)
        return self.stored.dtype(self._parts[self._name_of[name]][0][0].key)

    def read(self, name: str) -> Tensor:
        """The whole tensor. What shares a parameter with the one read before is at hand already."""
        self.shape(name)
        megatron_name = self._name_of[name]
        if self._last is None or self._last[0] != megatron_name:
            self._last = megatron_name, dict(hf_from_shards(megatron_name, self.arch, [self._whole(megatron_name)]))
        return self._last[1][name]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive): dimension 0."""
        return self.read(name)[start:stop]

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns `start` to `stop` (exclusive) of a matrix: dimension 1."""
        return self.read(name)[:, start:stop]

    def _whole(self, name: str) -> Tensor:
        """Raises CheckpointError where a checkpoint holds a parameter twice, and not the same."""
        first, *others = ([self.stored.read(p.key, p.index) for p in places] for places in self._parts[name])
        whole = first[0] if len(first) == 1 else torch.cat(first)
        for other in others:
            if not torch.equal(whole, other[0] if len(other) == 1 else torch.cat(other)):
                keys = [places[0].key for places in self._parts[name]]
                raise CheckpointError(f"{self.directory} holds {name} as {' and '.join(keys)}, which differ")
        return whole

    def _shape_differences(self, name: str, places: tuple[Place, ...]) -> list[str]:
        wanted = self._shapes[name]
        wanted = (wanted[0] // len(places), *wanted[1:])
        differences = []
        for place in places:
            found, stacked = self.stored.shape(place.key), (*place.stack, *wanted)
            is_padded = partition_of(name) == "vocab" and len(found) == 2 and found[0] >= wanted[0]
            if is_padded and found[1:] == wanted[1:]:
                continue
            if found != stacked:
                differences.append(f"{place.key} is {list(found)}, but config.json makes it {list(stacked)}")
        return differences


def read_settings(stored: StoredTensors) -> argparse.Namespace | Mapping[str, Any] | None:
    """What a checkpoint says of its model: Megatron-LM's `args`, or the `model` of a run's state; None: nothing.

    Raises CheckpointError for what is there and is neither.
    """
    run_state = stored.directory / RUN_STATE
    if run_state.is_file():
        model = read_json(run_state).get("model")
        if not isinstance(model, dict):
            raise CheckpointError(f"{shown(run_state)} says model {ascii(model)[:100]}, but must say an object")
        return model
    args = read_common(stored).get("args")
    if args is None or isinstance(args, argparse.Namespace):
        return args
    if not isinstance(args, dict | types.SimpleNamespace):
        kind = type(args).__name__
        raise CheckpointError(f"{shown(stored.directory / COMMON)}: args is a {kind}, but must be a Namespace")
    found = argparse.Namespace()
    vars(found).update(args if isinstance(args, dict) else vars(args))
    return found


def place_in_model(name: str) -> tuple[int, int, str]:
    """To sort parameters by: layer by layer, as the shards of large models hold them."""
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer is None:
        return (-1 if name.startswith("embedding") else 10**9 + (name == OUTPUT)), 0, name
    expert = re.search(r"\.experts\.(\d+)\.", name)
    return int(layer[1]), -1 if expert is None else int(expert[1]), name


def _first_few(items: list[str]) -> str:
    return ", ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")
