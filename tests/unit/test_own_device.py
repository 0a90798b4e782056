"""Every rank must see all GPUs of its node: one that sees only its own is told so before anything starts."""

from __future__ import annotations

import re

import pytest
import torch

from megatron_fipo.checks import choose_device

VARIABLES = (
    *("LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"),
    *("SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE"),
)


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with CUDA, whose number of visible devices and variables a test sets."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return monkeypatch


def device_of(node: pytest.MonkeyPatch, num_visible: int, **variables: str) -> torch.device:
    node.setattr(torch.cuda, "device_count", lambda: num_visible)
    for name, value in variables.items():
        node.setenv(name, value)
    return choose_device("auto")


@pytest.mark.parametrize(
    ("num_visible", "variables", "wanted"),
    [
        (1, {}, 0),
        (8, {"LOCAL_RANK": "7", "LOCAL_WORLD_SIZE": "8"}, 7),
        (8, {"SLURM_LOCALID": "5"}, 5),
        (8, {"SLURM_LOCALID": "5", "SLURM_STEP_TASKS_PER_NODE": "8(x16)", "SLURM_NODEID": "15"}, 5),
        (4, {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "8(x2),4,2", "SLURM_NODEID": "2"}, 0),
        (4, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 1),
    ],
)
def test_a_rank_takes_the_device_of_its_place_on_the_node(
    node: pytest.MonkeyPatch, num_visible: int, variables: dict[str, str], wanted: int
) -> None:
    assert device_of(node, num_visible, **variables) == torch.device("cuda", wanted)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "3"},
            "the variable SLURM_LOCALID is 3, of at least 4 ranks on this node, but CUDA_VISIBLE_DEVICES is '3', and "
            "shows this rank 1 GPU: every rank must see a GPU for each rank of its node",
        ),
        (  # the first rank too, which is the one that says it
            {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NODEID": "1"},
            "the variable SLURM_LOCALID is 0, of at least 8 ranks on this node, but CUDA_VISIBLE_DEVICES is not set",
        ),
        (
            {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "CUDA_VISIBLE_DEVICES": "0"},
            "the variable LOCAL_RANK is 0, of at least 8 ranks on this node, but CUDA_VISIBLE_DEVICES is '0', and",
        ),
        (
            {"LOCAL_RANK": "1"},
            "the variable LOCAL_RANK is 1, of at least 2 ranks on this node, but CUDA_VISIBLE_DEVICES is not",
        ),
    ],
)
def test_a_rank_that_sees_only_its_own_gpu_is_told_by_both_variables(
    node: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        device_of(node, 1, **variables)
