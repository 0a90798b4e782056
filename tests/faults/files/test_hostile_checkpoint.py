"""A checkpoint that somebody made up, its manifest included, is refused and nothing in it is executed."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_table import FaultTable
from files.damage import remake_manifest
from files.gadgets import Calls, broken_pickles, gadgets, saved, with_pickle
from processes import run_ranks
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

STEP = "step_0000002"
NUM_PARTS = 3
Damage = Callable[[Path], None]


def write(name: str, content: bytes) -> Damage:
    return lambda directory: (directory / name).write_bytes(content) and None


def metadata_of(directory: Path) -> Metadata:
    return torch.distributed.checkpoint.FileSystemReader(directory).read_metadata()


def change_metadata(change: Callable[[Path, Any], None]) -> Damage:
    """`.metadata` with a change in what it says."""

    def damage(directory: Path) -> None:
        metadata = metadata_of(directory)
        change(directory, metadata)
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))

    return damage


def first_of(metadata: Any, *, with_bytes: bool) -> Any:
    """The place of one item: an object's bytes, or a tensor."""
    return next(index for index in metadata.storage_data if (index.offset is None) == with_bytes)


def item_replaced(content: bytes, *, with_bytes: bool) -> Damage:
    """A shard with `content` at its end, in the place of an item of its."""

    def change(directory: Path, metadata: Any) -> None:
        index = first_of(metadata, with_bytes=with_bytes)
        info = metadata.storage_data[index]
        shard = directory / info.relative_path
        offset = shard.stat().st_size
        shard.write_bytes(shard.read_bytes() + content)
        metadata.storage_data[index] = _StorageInfo(info.relative_path, offset, len(content))

    return change_metadata(change)


def tensor_called_bytes(content: bytes) -> Damage:
    """A tensor that `.metadata` calls an object of bytes: torch loads those as it pleases."""

    def change(directory: Path, metadata: Any) -> None:
        index = first_of(metadata, with_bytes=False)
        described = BytesStorageMetadata()
        described.size = metadata.state_dict_metadata[index.fqn].size  # type: ignore[attr-defined]
        metadata.state_dict_metadata[index.fqn] = described
        shard = directory / "__0_0.distcp"
        offset = shard.stat().st_size
        shard.write_bytes(shard.read_bytes() + content)
        for other in [other for other in metadata.storage_data if other.fqn == index.fqn]:
            metadata.storage_data[other] = _StorageInfo("__0_0.distcp", offset, len(content))
        plain = type(index)(index.fqn)
        metadata.storage_data[plain] = _StorageInfo("__0_0.distcp", offset, len(content))

    return change_metadata(change)


def stored_elsewhere(path: str) -> Damage:
    """A `.metadata` that leads out of the directory; `path` may name {root}."""

    def change(directory: Path, metadata: Any) -> None:
        outside = directory.parent.parent / "secret.distcp"
        for index, info in list(metadata.storage_data.items()):
            if info.relative_path == "__0_0.distcp":
                outside.write_bytes((directory / "__0_0.distcp").read_bytes())
                where = path.format(root=directory.parent.parent)
                metadata.storage_data[index] = _StorageInfo(where, info.offset, info.length)

    return change_metadata(change)


def stored_at(offset: Any, length: Any) -> Damage:
    def change(directory: Path, metadata: Any) -> None:
        index = first_of(metadata, with_bytes=False)
        metadata.storage_data[index] = _StorageInfo("__0_0.distcp", offset, length)

    return change_metadata(change)


def linked(name: str) -> Damage:
    """A file that is a link to one outside."""

    def damage(directory: Path) -> None:
        outside = directory.parent.parent / f"secret_{name}"
        shutil.move(directory / name, outside)
        (directory / name).symlink_to(outside)

    return damage


def run_state(**changes: Any) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / "run_state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def rng_with_pickle(pickled: bytes, **extra: Any) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / "rng_0.pt"
        path.write_bytes(with_pickle(path.read_bytes(), pickled, **extra))

    return damage


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def bomb() -> bytes:
    """64 MB of zeros that call themselves a torch.save file's pickle, in 64 KB."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(64 * 2**20))
        archive.writestr("archive/version", b"3\n")
    return out.getvalue()


def cases(canary: Path) -> dict[str, Damage]:
    """Every hostile checkpoint by name."""
    found: dict[str, Damage] = {}
    for name, pickled in gadgets(canary):
        found[f".metadata: {name}"] = write(".metadata", pickled)
        found[f"common.pt: {name}"] = write("common.pt", saved(pickled))
        found[f"rng_0.pt: {name}"] = write("rng_0.pt", saved(pickled))
        found[f"object in a shard: {name}"] = item_replaced(saved(pickled), with_bytes=True)
        found[f"tensor in a shard: {name}"] = item_replaced(saved(pickled), with_bytes=False)
    gadget = pickle.dumps(Calls(Path.mkdir, canary))
    found["tensor called an object"] = tensor_called_bytes(saved(gadget))
    for name in ("common.pt", "rng_0.pt", "__0_0.distcp"):
        found[f"{name}: a pickle and no archive"] = write(name, gadget)
        found[f"{name}: an array of objects"] = write(name, npy(np.array([Calls(Path.mkdir, canary)], dtype=object)))
        found[f"{name}: a bomb"] = write(name, bomb())
    for name, pickled in broken_pickles():
        found[f".metadata: {name}"] = write(".metadata", pickled)
        found[f"rng_0.pt: {name}"] = write("rng_0.pt", saved(pickled))
    pollution = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}S'poison'\nI1\nstb."
    found[".metadata: a changed class"] = write(".metadata", pollution)
    for path in (
        "../../secret.distcp",
        "{root}/secret.distcp",
        "sub/../../../secret.distcp",
        "a\0b",
        "__0_9.distcp",
        "",
    ):
        found[f".metadata leads to {path!r}"] = stored_elsewhere(path)
    for offset, length in ((2**63, 10), (-5, 10), (0, 2**62), (0, -1), ("0", 10), (0, None), (1.5, 2)):
        found[f".metadata puts a tensor at {offset!r}, {length!r}"] = stored_at(offset, length)
    for name in ("common.pt", "rng_0.pt", "run_state.json", "__0_0.distcp", ".metadata", "manifest.json"):
        found[f"{name} is a link"] = linked(name)
    return found | json_cases()


def json_cases() -> dict[str, Damage]:
    """What is written in JSON."""
    found: dict[str, Damage] = {}
    texts = {
        "not JSON": b"{",
        "nested 100,000 deep": b"[" * 100_000,
        "an integer of 5,000 digits": b'{"step": ' + b"9" * 5000 + b"}",
        "no UTF-8": b'{"step": "\xff"}',
        "a list": b"[1]",
        "null": b"null",
    }
    for name, text in texts.items():
        found[f"run_state.json: {name}"] = write("run_state.json", text)
        found[f"metadata.json: {name}"] = write("metadata.json", text)
        found[f"manifest.json: {name}"] = write("manifest.json", text)
    for step in (-1, 1, 2.5, True, None, "2", [2], 10**30, float("nan"), float("inf")):
        found[f"run_state.json: step {step!r}"] = run_state(step=step)
    for name in ("model", "layout"):
        for value in (None, [], 5, {}):
            found[f"run_state.json: {name} {value!r}"] = run_state(**{name: value})
    for backend in ("zarr", "../torch_dist", "", None):
        text = {"sharded_backend": backend, "sharded_backend_version": 1, "common_backend": "torch"}
        found[f"metadata.json: backend {backend!r}"] = write("metadata.json", json.dumps(text).encode())
    names = ("../secret", "/secret", "a\0b", "..", ".", "", "\ud800", "x" * 5000, "run_state.json/", "./run_state.json")
    for name in names:
        found[f"manifest.json names {name[:20]!r}"] = manifest_names(name)
    for entry in (None, [], {"size_bytes": True, "sha256": 0}, {"size_bytes": -1}, {"sha256": "x"}, 1e30):
        found[f"manifest.json says {entry!r} of a file"] = manifest_says(entry)
    return found


def manifest_names(name: str) -> Damage:
    def damage(directory: Path) -> None:
        (directory.parent / "secret").write_bytes(b"secret")
        remake_manifest(directory)
        manifest = json.loads((directory / "manifest.json").read_text())
        manifest["files"][name] = manifest["files"]["run_state.json"]
        (directory / "manifest.json").write_text(json.dumps(manifest))

    return damage


def manifest_says(entry: Any) -> Damage:
    def damage(directory: Path) -> None:
        manifest = json.loads((directory / "manifest.json").read_text())
        manifest["files"]["run_state.json"] = entry
        (directory / "manifest.json").write_text(json.dumps(manifest))

    return damage


KINDS = (
    ("manifest", "file names and manifests"),
    ("leads", "file names and manifests"),
    ("link", "file names and manifests"),
)


def kind_of(name: str) -> str:
    found = next((kind for word, kind in KINDS if word in name), None)
    return found or ("hostile JSON" if ".json" in name else "hostile pickle or archive in a checkpoint")


@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.full_only) for i in range(1, NUM_PARTS))])
def test_nothing_in_a_checkpoint_is_executed(
    saved: Path, model_dir: Path, tmp_path: Path, faults: FaultTable, part: int
) -> None:
    canary = tmp_path / "canary"
    chosen = dict(list(cases(canary).items())[part::NUM_PARTS])
    roots = {}
    for i, (name, damage) in enumerate(chosen.items()):
        root = tmp_path / f"{i}" / "checkpoints"
        shutil.copytree(saved / STEP, root / STEP)
        (root / "latest").write_text(STEP)
        damage(root / STEP)
        if not name.startswith("manifest.json"):
            remake_manifest(root / STEP)
        roots[name] = str(root)
    (found,) = run_ranks(
        tmp_path, 1, "files.hostile_checkpoint:load_each", {"model_dir": str(model_dir), "roots": roots}, 300
    )
    for name in chosen:
        outcome = found[name]
        ok = outcome["outcome"].startswith("refused") and not outcome["events"] and not outcome["outside"]
        faults.record(kind_of(name), name, str(outcome)[:400], ok)
    assert not canary.exists()
    assert not faults.failed, "\n".join(f"{fault.name}: {fault.outcome}" for fault in faults.failed)
