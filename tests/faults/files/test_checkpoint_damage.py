"""Damage to a checkpoint is found before a step is made, the file is named, and an older whole one takes its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from fault_table import FaultTable
from files.damage import flipped, flips, remake_manifest, replaced, truncations

from megatron_fipo.actor import checkpoint_files
from megatron_fipo.actor.checkpoint_files import CheckpointError, find_checkpoint, verify_checkpoint

STEP_1, STEP_2 = "step_0000001", "step_0000002"
FILES = (".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "metadata.json", "rng_0.pt", "run_state.json")
INSIDE = (*FILES, "manifest.json")
OF_THE_STEP = ("__0_0.distcp", "__0_1.distcp", "common.pt", "run_state.json")  # the others are the same after each
T = TypeVar("T")
CHOICES = ["choice", pytest.param("others", marks=pytest.mark.full_only)]
EVERY = 4  # of the bit flips is in the fixed choice


def test_the_checkpoint_holds_the_files_that_are_damaged_here(saved: Path) -> None:
    for step in (STEP_1, STEP_2):
        assert sorted(path.name for path in (saved / step).iterdir()) == sorted(INSIDE)
    directory = find_checkpoint(saved)
    verify_checkpoint(directory)
    assert directory.name == STEP_2


def error_of(root: Path) -> str:
    """What keeps the latest checkpoint from being loaded."""
    try:
        verify_checkpoint(find_checkpoint(root))
    except CheckpointError as error:
        return str(error)
    return "not found"


def fallback(root: Path) -> tuple[str, str]:
    """The checkpoint that a resuming run takes, and what it says meanwhile."""
    said: list[str] = []
    try:
        found = checkpoint_files.find_valid_checkpoint(root, say=said.append)
    except CheckpointError as error:
        return f"refused: {error}", "\n".join(said)
    return Path(found).name, "\n".join(said)


def chosen(items: list[T], part: str) -> list[T]:
    """The fixed choice, or all the others."""
    return [item for i, item in enumerate(items) if (i % EVERY == 0) == (part == "choice")]


def record_damage(faults: FaultTable, kind: str, name: str, root: Path, path: Path) -> None:
    """Count damage to `path`: wanted is an error about it, and the older checkpoint with a line about it."""
    found = error_of(root)
    taken, said = fallback(root)
    ok = str(path) in found and taken == STEP_1 and str(path) in said
    faults.record(kind, name, f"{found}; then {taken}, saying {said!r}", ok)
    assert ok, (name, found, taken, said)


@pytest.mark.usefixtures("one_process_job")
@pytest.mark.parametrize("name", INSIDE)
def test_a_truncated_file_is_found(root: Path, faults: FaultTable, name: str) -> None:
    path = root / STEP_2 / name
    content = path.read_bytes()
    for where, size in truncations(len(content)).items():
        with replaced(path, content[:size]):
            record_damage(faults, "checkpoint file cut off", f"{name}, {where}", root, path)


@pytest.mark.usefixtures("one_process_job")
@pytest.mark.parametrize("part", CHOICES)
@pytest.mark.parametrize("name", INSIDE)
def test_a_flipped_bit_is_found(root: Path, faults: FaultTable, name: str, part: str) -> None:
    path = root / STEP_2 / name
    content = path.read_bytes()
    about = path.parent if name == "manifest.json" else path  # a wrong hash speaks of the file that it is of
    for offset, bit in chosen(flips(len(content)), part):
        with replaced(path, flipped(content, offset, bit)):
            record_damage(faults, "bit flip in a checkpoint", f"{name}, byte {offset}", root, about)


@pytest.mark.usefixtures("one_process_job")
@pytest.mark.parametrize("part", CHOICES)
def test_damage_to_latest_is_found(root: Path, faults: FaultTable, part: str) -> None:
    pointer = root / "latest"
    content = pointer.read_bytes()
    damages = {f"cut off, {where}": content[:size] for where, size in truncations(len(content)).items()}
    damages |= {f"byte {i}, bit {bit}": flipped(content, i, bit) for i in range(len(content)) for bit in range(8)}
    for name, damaged in chosen(list(damages.items()), part):
        kind = "checkpoint file cut off" if name.startswith("cut") else "bit flip in a checkpoint"
        with replaced(pointer, damaged):
            found, (taken, said) = error_of(root), fallback(root)
            ok = str(pointer) in found and taken == STEP_2 and str(pointer) in said
            faults.record(kind, f"latest, {name}", f"{found}; then {taken}, saying {said!r}", ok)
            assert ok, (name, damaged, found, taken, said)


@pytest.mark.usefixtures("one_process_job")
@pytest.mark.parametrize("name", INSIDE)
def test_a_deleted_file_is_found(root: Path, faults: FaultTable, name: str) -> None:
    with replaced(root / STEP_2 / name, None):
        record_damage(faults, "checkpoint file deleted", name, root, root / STEP_2 / name)


@pytest.mark.usefixtures("one_process_job")
def test_a_deleted_latest_is_an_error(root: Path, faults: FaultTable) -> None:
    (root / "latest").unlink()
    found = error_of(root)
    taken, said = fallback(root)
    ok = str(root / "latest") in found and (taken == STEP_2 or taken.startswith("refused"))
    faults.record("checkpoint file deleted", "latest", f"{found}; {taken}, {said!r}", ok)
    assert ok, (found, taken)


def swap(one: Path, other: Path) -> None:
    """Exchange two files."""
    first, second = one.read_bytes(), other.read_bytes()
    assert first != second, (one, other)
    one.write_bytes(second)
    other.write_bytes(first)


def take_over(name: str) -> Callable[[Path], Path]:
    """The file of the older checkpoint in the place of the newer's."""

    def damage(root: Path) -> Path:
        content = (root / STEP_1 / name).read_bytes()
        assert content != (root / STEP_2 / name).read_bytes(), f"{name} is the same in both"
        (root / STEP_2 / name).write_bytes(content)
        return root / STEP_2 / name

    return damage


def swap_shards(root: Path) -> Path:
    swap(root / STEP_2 / "__0_0.distcp", root / STEP_2 / "__0_1.distcp")
    return root / STEP_2 / "__0_0.distcp"


def foreign_manifest(root: Path) -> Path:
    shutil.copy(root / STEP_1 / "manifest.json", root / STEP_2 / "manifest.json")
    return root / STEP_2 / ".metadata"


def manifest_without(name: str) -> Callable[[Path], Path]:
    """A manifest made anew over a checkpoint that lacks a file."""

    def damage(root: Path) -> Path:
        (root / STEP_2 / name).unlink()
        remake_manifest(root / STEP_2)
        return root / STEP_2 / "manifest.json"

    return damage


def manifest_before_damage(root: Path) -> Path:
    """A manifest made anew, and a shard that changes afterwards."""
    remake_manifest(root / STEP_2)
    shard = root / STEP_2 / "__0_1.distcp"
    shard.write_bytes(flipped(shard.read_bytes(), 5000, 3))
    return shard


def added(name: str) -> Callable[[Path], Path]:
    """A file that nobody saved."""

    def damage(root: Path) -> Path:
        path = root / STEP_2 / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        return path if path.parent == root / STEP_2 else path.parent

    return damage


def other_step(root: Path) -> Path:
    """The older checkpoint under the newer one's name: all its files are whole."""
    shutil.rmtree(root / STEP_2)
    shutil.copytree(root / STEP_1, root / STEP_2)
    return root / STEP_2 / "run_state.json"


SWAPS: dict[str, Callable[[Path], Path]] = {
    "two shards exchanged": swap_shards,
    **{f"{name} of the older checkpoint": take_over(name) for name in OF_THE_STEP},
    "the older checkpoint's manifest": foreign_manifest,
    "the older checkpoint under the newer one's name": other_step,
    "manifest made anew before a shard changed": manifest_before_damage,
    **{f"manifest made anew without {name}": manifest_without(name) for name in FILES if ".distcp" not in name},
    "manifest made anew without a shard": manifest_without("__0_1.distcp"),
    **{
        f"extra {name}": added(name)
        for name in ("x", "__0_2.distcp", "rng_1.pt", "sub/x", ".hidden", "manifest.json.1")
    },
}


@pytest.mark.usefixtures("one_process_job")
@pytest.mark.parametrize("name", SWAPS)
def test_what_does_not_belong_together_is_found(root: Path, faults: FaultTable, name: str) -> None:
    path = SWAPS[name](root)
    found, (taken, said) = error_of(root), fallback(root)
    about = (
        str(path) if "older checkpoint's manifest" not in name and "anew without" not in name else str(root / STEP_2)
    )
    ok = about in found and taken == STEP_1 and about in said
    faults.record("swapped, foreign and extra files", name, f"{found}; then {taken}, saying {said!r}", ok)
    assert ok, (found, taken, said)


@pytest.mark.usefixtures("one_process_job")
def test_without_a_whole_checkpoint_nothing_is_loaded(root: Path, faults: FaultTable) -> None:
    for step in (STEP_1, STEP_2):
        shard = root / step / "__0_0.distcp"
        shard.write_bytes(flipped(shard.read_bytes(), 1000, 0))
    taken, said = fallback(root)
    ok = taken.startswith("refused") and str(root) in taken
    faults.record("swapped, foreign and extra files", "no checkpoint is whole", f"{taken}, saying {said!r}", ok)
    assert ok, (taken, said)
