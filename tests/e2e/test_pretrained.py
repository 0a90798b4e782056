"""A run that begins with Megatron's weights and not with those of --hf-checkpoint: trainer, engine, and the result."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from processes import REPO_ROOT
from safetensors.torch import load_file, save_file
from small_run import START_WITHIN_S, command_line


def test_trainer_and_engine_begin_with_the_weights_of_the_pretrained_checkpoint(
    tiny_chat_model: Path, tmp_path: Path, launch: Callable[[list[str]], Any]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_chat_model, other)
    generator = torch.Generator().manual_seed(7)
    weights = {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(other / "model.safetensors").items()
    }
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    convert = [sys.executable, REPO_ROOT / "tools" / "hf_to_megatron.py"]
    subprocess.run([*convert, "--hf-checkpoint", other, "--save", tmp_path / "megatron"], check=True)

    arguments = command_line(
        tiny_chat_model,
        tmp_path,
        pretrained_checkpoint=tmp_path / "megatron",
        export_hf=tmp_path / "exported",
        train_iters=1,
        lr=1e-9,
    )
    command = launch(arguments)
    assert command.wait(START_WITHIN_S) == 0, command.stderr
    (record,) = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert record["engine_mismatch/mean"] < 1e-4  # of log-probs near log(259): with other weights they are far apart
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == weights.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-7, rtol=1e-5)
