"""A checkpoint of any layout becomes a Hugging Face directory in one process, bit for bit, without its optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from actor_on_ranks import make_actor, make_groups
from megatron.core import parallel_state
from processes import run_ranks
from tiny_models import save_model

from megatron_fipo.actor.checkpoint import save_checkpoint
from megatron_fipo.actor.checkpoint_files import CheckpointError, find_checkpoint, verify_checkpoint
from megatron_fipo.actor.export import export_checkpoint
from megatron_fipo.patches.megatron_cpu import apply_patches
from megatron_fipo.weights.architecture import read_architecture
from megatron_fipo.weights.hf_files import HFWeights, write_hf_checkpoint

LAYOUTS: dict[str, dict[str, Any]] = {"tp2 bf16": {"tp": 2, "bf16": True}, "pp2 fp32": {"pp": 2, "bf16": False}}
SCALE = 1.25


def save_changed(directory: str) -> None:
    """Change the weights in each layout; save the checkpoint, and the actor's own export beside it."""
    model = f"{directory}/model"
    for name, options in LAYOUTS.items():
        sizes = {key: value for key, value in options.items() if key != "bf16"}
        actor = make_actor(model, *make_groups(**sizes), bf16=options["bf16"])
        actor.optimizer.step()  # of zero gradients: an optimizer is saved after its first step
        with torch.no_grad():
            for chunk in actor.chunks:
                for parameter in chunk.parameters():
                    parameter.mul_(SCALE)  # shards, copies and tied ends alike
        save_checkpoint(actor, f"{directory}/{name}", 1, None)
        if dist.get_rank() == 0:
            write_hf_checkpoint(f"{directory}/{name} wanted", model, actor.export_weights())
        else:
            assert list(actor.export_weights()) == []
        parallel_state.destroy_model_parallel()


def export_all(directory: str) -> str:
    """In one process: export every layout's checkpoint; what is said about another model's."""
    apply_patches()
    model = f"{directory}/model"
    for name in LAYOUTS:
        checkpoint = find_checkpoint(f"{directory}/{name}")
        verify_checkpoint(checkpoint)
        export(checkpoint, f"{directory}/{name} found", model)
    try:
        export(checkpoint, f"{directory}/other", f"{directory}/another")
    except CheckpointError as error:
        return str(error)
    return ""


def export(checkpoint: Path, save_dir: str, model: str) -> None:
    export_checkpoint(
        checkpoint,
        save_dir,
        hf_checkpoint=model,
        arch=read_architecture(model),
        device=torch.device("cpu"),
        transformer_impl="local",
    )
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("export")
    save_model(directory / "model", "qwen2", tied=True)
    save_model(directory / "another", "qwen3", tied=True)
    run_ranks(directory, 2, save_changed, {"directory": str(directory)})
    (refusal,) = run_ranks(directory, 1, export_all, {"directory": str(directory)}, init_process_group=False)
    return directory, refusal


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_export_is_the_model_bit_for_bit(exported: tuple[Path, str], name: str) -> None:
    directory, _ = exported
    found, wanted, before = (HFWeights(directory / text) for text in (f"{name} found", f"{name} wanted", "model"))
    assert found.names == wanted.names
    for tensor in wanted.names:
        assert found.dtype(tensor) == (torch.bfloat16 if LAYOUTS[name]["bf16"] else torch.float32)
        assert torch.equal(found.read(tensor), wanted.read(tensor)), tensor
        changed = SCALE * before.read(tensor).float()
        assert torch.allclose(found.read(tensor).float(), changed, rtol=1e-2, atol=1e-6), tensor


def test_a_checkpoint_of_another_model_is_refused(exported: tuple[Path, str]) -> None:
    directory, refusal = exported
    assert "is of another model" in refusal
    assert not (directory / "other").exists()
