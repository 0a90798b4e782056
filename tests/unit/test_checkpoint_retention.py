"""Old checkpoints go, the newest, the best and the latest stay, and a removal that is cut short leaves none behind."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from checkpoint_on_disk import reseal, save, step_of_latest, write_aside

from megatron_fipo.actor.checkpoint_files import CheckpointError, checkpoints_in, commit, find_valid_checkpoint, seal
from megatron_fipo.actor.retention import retire


def steps(root: Path) -> list[int]:
    return [int(directory.name[5:12]) for directory in checkpoints_in(root)]


def test_without_a_number_all_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert steps(tmp_path) == [3, 2, 1]


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        save(tmp_path, step, keep_last=2)
    assert steps(tmp_path) == [12, 10]
    save(tmp_path, 13, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000013"]


def test_the_best_stay_beside_the_newest_and_of_equal_ones_the_later(tmp_path: Path) -> None:
    for step, score in enumerate((0.5, 0.7, 0.7, 0.1, None, 0.2), start=1):
        save(tmp_path, step, score=score, keep_last=1, keep_best=2)
    assert steps(tmp_path) == [6, 3, 2]
    save(tmp_path, 7, score=0.7, keep_last=1, keep_best=1)
    assert steps(tmp_path) == [7]


@pytest.mark.parametrize("score", [None, True, "1", [2], math.nan, math.inf, 10**400])
def test_what_is_no_score_is_not_kept_for_it(tmp_path: Path, score: object) -> None:
    save(tmp_path, 1, score=score)
    save(tmp_path, 2, score=-5, keep_last=1, keep_best=1)
    save(tmp_path, 3, keep_last=1, keep_best=1)
    assert steps(tmp_path) == [3, 2]


def test_a_checkpoint_that_cannot_be_read_has_no_score(tmp_path: Path) -> None:
    (save(tmp_path, 1, score=9.0) / "run_state.json").write_text("{")
    save(tmp_path, 2, keep_last=1, keep_best=3)
    assert steps(tmp_path) == [2]


def test_later_steps_of_a_run_left_behind_are_not_touched(tmp_path: Path) -> None:
    for step in (1, 8, 9):
        save(tmp_path, step)
    save(tmp_path, 2, keep_last=1)
    assert steps(tmp_path) == [9, 8, 2]
    assert step_of_latest(tmp_path) == 2


def test_a_removal_cut_short_leaves_nothing_that_looks_like_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    current = save(tmp_path, 2)
    (retired,) = retire(current, keep_last=1, keep_best=0)
    (retired / "rng_0.pt").unlink()  # and the process ends
    assert checkpoints_in(tmp_path) == [current]
    assert step_of_latest(tmp_path) == 2
    save(tmp_path, 3)
    assert not retired.exists()


def test_what_cannot_be_removed_ends_no_later_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    (retired,) = retire(save(tmp_path, 2), keep_last=1, keep_best=0)
    with monkeypatch.context() as patch:

        def busy(path: Path) -> None:
            raise OSError(16, "Device or resource busy", str(path))

        patch.setattr(shutil, "rmtree", busy)
        seal(aside := write_aside(tmp_path, 3))
        current = commit(aside)
        assert step_of_latest(tmp_path) == 3
        assert retire(current, keep_last=None, keep_best=0) == [retired]  # to be tried again
    save(tmp_path, 4)
    assert not retired.exists()


def test_what_is_linked_or_foreign_is_neither_counted_nor_removed(tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "elsewhere", 1)
    root = tmp_path / "root"
    save(root, 2)
    (root / "step_0000001").symlink_to(elsewhere)
    (root / "step_0000000").write_text("mine")
    (root / "step_1").mkdir()
    save(root, 3, keep_last=1)
    assert steps(root) == [3]
    assert (elsewhere / "manifest.json").exists()
    assert sorted(path.name for path in root.iterdir()) == [
        "latest", "step_0000000", "step_0000001", "step_0000003", "step_1"
    ]  # fmt: skip


@pytest.mark.usefixtures("control")
def test_the_latest_is_used_without_a_word(tmp_path: Path) -> None:
    said: list[str] = []
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert find_valid_checkpoint(tmp_path, say=said.append) == tmp_path / "step_0000002"
    (tmp_path / "latest").write_text("step_0000001")
    assert find_valid_checkpoint(tmp_path, say=said.append) == tmp_path / "step_0000001"
    assert said == []
    assert dist.is_initialized()


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize("content", ["step_0000009", "../elsewhere", "", "step_0000002\x00", "x" * 5000, None])
def test_a_pointer_that_leads_nowhere_is_replaced_by_the_newest_whole_one(tmp_path: Path, content: str | None) -> None:
    said: list[str] = []
    save(tmp_path, 1)
    save(tmp_path, 10)
    pointer = tmp_path / "latest"
    pointer.unlink()
    if content is not None:
        pointer.write_text(content)
    assert find_valid_checkpoint(tmp_path, say=said.append) == tmp_path / "step_0000010"
    (line,) = said
    assert line.startswith("WARNING: NOT the latest checkpoint: ")
    assert str(pointer) in line
    assert line.endswith("step_0000010, which is whole, is used")
    assert "\n" not in line


@pytest.mark.usefixtures("control")
def test_of_two_of_one_step_the_one_that_replaces_is_newer(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step_0000001", tmp_path / "step_0000001.1")
    (tmp_path / "latest").unlink()
    assert find_valid_checkpoint(tmp_path, say=lambda line: None).name == "step_0000001.1"


@pytest.mark.usefixtures("control")
def test_without_a_whole_one_all_that_was_tried_is_named(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (save(tmp_path, step) / "rng_0.pt").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in it is whole") as raised:
        find_valid_checkpoint(tmp_path, say=lambda line: None)
    assert [f"step_000000{step}/rng_0.pt is missing" in str(raised.value) for step in (1, 2, 3)] == [True] * 3
    with pytest.raises(CheckpointError, match=r"holds no checkpoint: .*latest does not exist$"):
        find_valid_checkpoint(tmp_path / "nowhere", say=lambda line: None)


@pytest.mark.usefixtures("control")
def test_a_checkpoint_without_its_scores_field_is_whole(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    state = json.loads((directory / "run_state.json").read_text())
    del state["score"]
    (directory / "run_state.json").write_text(json.dumps(state))
    reseal(directory)
    assert find_valid_checkpoint(tmp_path, say=lambda line: None) == directory
