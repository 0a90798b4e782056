"""What the tests of the converters share: models as published, and the tools called in this process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tiny_models import make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_fipo.weights.hf_files import HFWeights

REPO_ROOT = Path(__file__).resolve().parents[2]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_tool", REPO_ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: object) -> int:
    return tool(name).main([str(argument) for argument in arguments])


def save(directory: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", **fields: Any) -> Path:
    """A model as published: several files, a tokenizer that is only carried along."""
    family, tied = fields.pop("family"), fields.pop("tied")
    make_model(family, tied=tied, **fields).to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    (directory / "tokenizer.json").write_text('{"not": "looked at"}')
    (directory / "merges.txt").write_bytes(b"a b\n\xc3\xa9 c\n")
    return directory


def assert_same_files(found: Path, wanted: Path) -> None:
    one, other = HFWeights(found), HFWeights(wanted)
    assert one.names == other.names
    for name in other.names:
        assert one.dtype(name) == other.dtype(name), name
        assert torch.equal(one.read(name), other.read(name)), name
    for name in ("config.json", "tokenizer.json", "merges.txt"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name


def add_tokenizer(directory: Path) -> None:
    """One token for each byte: what a check of logits needs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (directory / "tokenizer.json").unlink()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
