"""A checkpoint directory is committed whole or not at all, and damage is named before anything is loaded."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_on_disk import save, step_of_latest, write_aside

from megatron_fipo.actor import checkpoint_files
from megatron_fipo.actor.checkpoint_files import (
    CheckpointError,
    agreed,
    begin_aside,
    commit,
    find_checkpoint,
    seal,
    verify_checkpoint,
)


def test_a_committed_checkpoint_is_found_and_whole(tmp_path: Path) -> None:
    assert save(tmp_path, 3) == tmp_path / "step_0000003"
    assert step_of_latest(tmp_path) == 3
    save(tmp_path, 6)
    assert step_of_latest(tmp_path) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000003", "step_0000006"]


def test_every_rank_hashes_its_share_and_all_shares_cover_the_files(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    (shard,) = directory.glob("*.distcp")
    flip_a_bit(shard)
    refused = []
    for rank in range(3):
        try:
            verify_checkpoint(directory, rank=rank, num_ranks=3)
        except CheckpointError:
            refused.append(rank)
    assert len(refused) == 1


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (".metadata", Path.unlink, "{} is missing, but the checkpoint's manifest lists it"),
        ("rng_0.pt", Path.unlink, "{} is missing, but the checkpoint's manifest lists it"),
        ("manifest.json", Path.unlink, "{} is missing: "),
        ("__0_0.distcp", truncate, "{} has "),
        ("__0_0.distcp", flip_a_bit, "{} was changed: its SHA-256"),
        ("run_state.json", flip_a_bit, "{} was changed: its SHA-256"),
        ("manifest.json", truncate, "{} cannot be read"),
        ("manifest.json", lambda path: path.write_text("[]"), "{} cannot be read"),
        ("manifest.json", lambda path: path.write_text('{"files": {}}'), "is not in the checkpoint's manifest"),
        ("extra.pt", lambda path: path.write_text("x"), "{} is not in the checkpoint's manifest"),
    ],
)
def test_damage_is_an_error_that_names_the_file(
    tmp_path: Path, file: str, damage: Callable[[Path], object], message: str
) -> None:
    directory = save(tmp_path, 2)
    damage(directory / file)
    with pytest.raises(CheckpointError) as raised:
        verify_checkpoint(directory)
    assert message.format(directory / file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_foreign_class_in_the_metadata_is_named_and_never_called(tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    class Foreign:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (checkpoint_files.os.mkdir, (str(witness),))

    aside = write_aside(tmp_path / "root", 1)
    (aside / ".metadata").write_bytes(pickle.dumps({"state": Foreign()}))
    seal(aside)
    directory = commit(aside)
    with pytest.raises(CheckpointError, match=r"\.metadata holds posix\.mkdir, which is no part"):
        verify_checkpoint(directory)
    assert not witness.exists()


def test_metadata_that_is_no_pickle_is_an_error(tmp_path: Path) -> None:
    aside = write_aside(tmp_path, 1)
    (aside / ".metadata").write_bytes(b"\x80\x04not a pickle")
    seal(aside)
    with pytest.raises(CheckpointError, match=r"\.metadata is not a checkpoint's metadata"):
        verify_checkpoint(commit(aside))


@pytest.mark.parametrize("name", ["", ".", "..", "../elsewhere", "/", "step_0000009", "step_0000001/", "a\nb"])
def test_latest_must_name_a_directory_beside_it(tmp_path: Path, name: str) -> None:
    save(tmp_path / "elsewhere", 1)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "latest").write_text(name)
    with pytest.raises(CheckpointError, match="latest says"):
        find_checkpoint(tmp_path / "root")


def test_latest_must_not_lead_out_through_a_link(tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "elsewhere", 1)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "step_0000001").symlink_to(elsewhere)
    (tmp_path / "root" / "latest").write_text("step_0000001")
    with pytest.raises(CheckpointError, match="latest says 'step_0000001', which is not a checkpoint directory"):
        find_checkpoint(tmp_path / "root")


def test_a_directory_without_latest_holds_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--load is .*, but holds no checkpoint: .*latest does not exist"):
        find_checkpoint(tmp_path / "nowhere")


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("same_step", [False, True])
def test_a_save_that_ends_at_any_point_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_step: bool
) -> None:
    """Every call that changes the file system is in turn the last one."""
    remaining = 0

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **keywords: object) -> object:
            nonlocal remaining
            if remaining == 0:
                raise Killed
            remaining -= 1
            return original(*arguments, **keywords)

        return call

    root = tmp_path / "root"
    step, finished, num_calls = (1 if same_step else 2), False, 0
    while not finished:
        shutil.rmtree(root, ignore_errors=True)
        save(root, 1)
        remaining = num_calls
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", counted(Path.rename))
            patch.setattr(Path, "mkdir", counted(Path.mkdir))
            patch.setattr(Path, "open", counted(Path.open))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            patch.setattr(checkpoint_files, "_sync_directory", counted(checkpoint_files._sync_directory))
            try:
                save(root, step)
                finished = True
            except Killed:
                pass
        assert step_of_latest(root) in (1, step)
        save(root, 3)  # the next run's save is not troubled by what was left
        assert step_of_latest(root) == 3
        assert not [path for path in root.iterdir() if path.name.startswith(".writing")]
        num_calls += 1
    assert num_calls > 10


def test_directories_made_for_checkpoints_are_flushed_into_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(checkpoint_files, "_sync_directory", flushed.append)
    checkpoint_files.begin_aside(tmp_path / "a" / "b", 1)
    assert flushed == [tmp_path / "a", tmp_path]
    checkpoint_files.begin_aside(tmp_path / "a" / "b", 2)
    assert len(flushed) == 2


def test_an_error_of_the_file_system_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        agreed(lambda: begin_aside(tmp_path / "file" / "root", 1), None)
    assert agreed(lambda: 5, None) == [5]
