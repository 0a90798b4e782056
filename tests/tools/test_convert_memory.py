"""The converters hold a parameter and a shard at a time, not the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from converting import REPO_ROOT
from transformers import LlamaConfig

from megatron_fipo.weights.architecture import hf_shapes, read_architecture
from megatron_fipo.weights.hf_files import HFWeights, write_hf_checkpoint

MIB = 2**20
SHARD_BYTES = 40 * MIB
LARGEST_BYTES = 32 * MIB  # of the parameters: the embedding


def make_large(directory: Path, *, num_layers: int, hidden_size: int) -> Path:
    """Random bf16 weights in files that end in the middle of layers."""
    config = LlamaConfig(
        vocab_size=16 * hidden_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    (directory / "config").mkdir(parents=True)
    config.save_pretrained(directory / "config")
    shapes = hf_shapes(read_architecture(directory / "config"))
    generator = torch.Generator().manual_seed(0)
    stream = (
        (name, torch.empty(shape, dtype=torch.bfloat16).uniform_(generator=generator)) for name, shape in shapes.items()
    )
    write_hf_checkpoint(directory / "hf", directory / "config", stream, max_shard_bytes=SHARD_BYTES)
    return directory / "hf"


MEASURED = """
import re, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_memory(tool: str, *arguments: object) -> int:
    """Bytes of main memory that the tool held at most, files that it mapped among them."""
    command = [sys.executable, "-c", MEASURED, str(REPO_ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]
    # else glibc keeps up to 64 MiB of what was freed: nothing beside shards of gigabytes, much beside these
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) * 1024


def peaks(directory: Path, source: Path) -> tuple[int, int]:
    there = peak_memory("hf_to_megatron", "--hf-checkpoint", source, "--save", directory / "megatron")
    options = ("--load", directory / "megatron", "--hf-checkpoint", source, "--max-shard-gb", SHARD_BYTES / 1e9)
    return there, peak_memory("megatron_to_hf", *options, "--save", directory / "back")


def test_memory_is_that_of_a_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    source = make_large(large, num_layers=13, hidden_size=1024)
    model_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert model_bytes > 350 * MIB
    assert len(list(source.glob("*.safetensors"))) > 9
    before = peaks(small, make_large(small, num_layers=2, hidden_size=16))
    found = peaks(large, source)
    with capsys.disabled():
        told = ", ".join(f"{(peak - base) / MIB:.0f} MiB" for peak, base in zip(found, before))
        sizes = f"{model_bytes / MIB:.0f} MiB in shards of {SHARD_BYTES / MIB:.0f} MiB"
        print(f"\nconverting {sizes} took {told} more than a tiny model")
    for peak, base in zip(found, before):
        assert peak - base < SHARD_BYTES + LARGEST_BYTES + 10 * MIB < model_bytes / 4
    one, other = HFWeights(source), HFWeights(large / "back")
    for name in ("model.embed_tokens.weight", "model.layers.12.mlp.up_proj.weight"):
        assert torch.equal(one.read(name), other.read(name))
