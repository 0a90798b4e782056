"""Safetensors directories: what is broken is named, what is written loads bit-equal and is never half there."""

import json
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fipo.weights.architecture import read_architecture
from megatron_fipo.weights.hf_files import EXPORT_RECEIPT, HFWeights, check_hf_shapes, write_hf_checkpoint

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def save_llama(directory: Path, *, tied: bool = False, max_shard_size: str = "1GB") -> dict[str, Tensor]:
    """A tiny Llama saved by transformers. Returns its tensors by name."""
    config = transformers.LlamaConfig(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def rewrite(directory: Path, **changes: Tensor | None) -> None:
    """Save model.safetensors anew with tensors replaced, added, or (None) left out; `__` stands for a dot."""
    tensors: dict[str, Tensor | None] = dict(load_file(directory / SINGLE))
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, directory / SINGLE)


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_reads_single_files_and_shards(tmp_path, max_shard_size):
    wanted = save_llama(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX).is_file() == (max_shard_size == "20KB")
    weights = HFWeights(tmp_path)
    check_hf_shapes(read_architecture(tmp_path), weights)
    assert weights.names == sorted(wanted)
    name = "model.layers.1.mlp.down_proj.weight"
    assert (weights.shape(name), weights.dtype(name)) == ((48, 88), torch.float32)
    assert torch.equal(weights.read(name), wanted[name])
    assert torch.equal(weights.read_rows(name, 5, 11), wanted[name][5:11])
    assert torch.equal(weights.read_columns(name, 44, 88), wanted[name][:, 44:88])


@pytest.mark.parametrize(("start", "stop"), [(0, 49), (-1, 4), (4, 4)])
def test_rows_outside_the_tensor_are_refused(tmp_path, start, stop):
    save_llama(tmp_path)
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \[48\]"):
        HFWeights(tmp_path).read_rows("model.norm.weight", start, stop)


def test_missing_tensor_and_directory_are_named(tmp_path):
    save_llama(tmp_path)
    with pytest.raises(ValueError, match=r"no safetensors file holds model\.nrom\.weight"):
        HFWeights(tmp_path).read("model.nrom.weight")
    with pytest.raises(ValueError, match="absent is not a directory"):
        HFWeights(tmp_path / "absent")
    (tmp_path / SINGLE).unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        HFWeights(tmp_path)


@pytest.mark.parametrize("damage", ["cut short", "header cut", "empty", "header garbage", "header length"])
def test_damaged_file_is_named(tmp_path, damage):
    save_llama(tmp_path)
    path = tmp_path / SINGLE
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut short": content[:-1],
            "header cut": content[:100],
            "empty": b"",
            "header garbage": content[:8] + b"x" * 64 + content[72:],
            "header length": struct.pack("<Q", 2**60) + content[8:],
        }[damage]
    )
    with pytest.raises(ValueError, match=rf"{path} \(\d+ bytes\) is not a whole safetensors file"):
        HFWeights(tmp_path)


@pytest.mark.parametrize("room", [2**30, 2**34 + 2**32])  # for neither mapping of the file, for one of the two
def test_a_file_that_memory_cannot_map_is_named(tmp_path, room):
    size = 2**34
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
    try:
        with pytest.raises(ValueError, match=r"safetensors \(17179869\d+ bytes\) is more than .* memory can map"):
            HFWeights(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_shards_without_an_index_are_told_from_no_model_at_all(tmp_path):
    save_llama(tmp_path, max_shard_size="20KB")
    (tmp_path / INDEX).unlink()
    with pytest.raises(ValueError, match=r"only model-00001-of-000\d\d\.safetensors, .*: shards need their index"):
        HFWeights(tmp_path)


def test_index_must_agree_with_its_files(tmp_path):
    save_llama(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / INDEX).read_text())
    file = index["weight_map"]["model.norm.weight"]

    def expect(weight_map: object, message: str) -> None:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            HFWeights(tmp_path)

    expect(index["weight_map"] | {"model.norm.weight": "model-9.safetensors"}, "has no such file")
    expect(index["weight_map"] | {"model.norm.weight": f"../{tmp_path.name}/{file}"}, "has no such file")
    expect(index["weight_map"] | {"extra": file}, "extra lies in .*, but it lies in None")
    expect({name: f for name, f in index["weight_map"].items() if name != "model.norm.weight"}, "model.norm.weight")
    expect([], "must be an object")
    expect({}, "is empty")
    for text, message in (("{", "not valid JSON"), ("{}", "has no weight_map"), ("[]", "has no weight_map")):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(ValueError, match=message):
            HFWeights(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, "lacks tensors .*: model.norm.weight"),
        ({"model__layers__2__input_layernorm__weight": torch.ones(48)}, "no use for: model.layers.2.input_layernorm"),
        ({"model__norm__weight": torch.ones(49)}, r"model.norm.weight is \[49\] but must be \[48\]"),
        ({"model__norm__weight": torch.ones(48, dtype=torch.int8)}, "dtype I8"),
        ({"lm_head__weight": None}, "lacks tensors"),
    ],
)
def test_tensors_that_contradict_the_config_are_named(tmp_path, changes, message):
    save_llama(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        check_hf_shapes(read_architecture(tmp_path), HFWeights(tmp_path))


def test_old_rotary_buffers_are_harmless(tmp_path):
    save_llama(tmp_path)
    rewrite(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    rewrite(tmp_path, model__rotary_emb__inv_freq=torch.ones(4))
    check_hf_shapes(read_architecture(tmp_path), HFWeights(tmp_path))


def test_tied_model_may_carry_an_equal_output_layer_only(tmp_path):
    embedding = save_llama(tmp_path, tied=True)["model.embed_tokens.weight"].clone()
    rewrite(tmp_path, lm_head__weight=embedding.clone())
    check_hf_shapes(read_architecture(tmp_path), HFWeights(tmp_path))
    embedding[-1, -1] += 1
    rewrite(tmp_path, lm_head__weight=embedding)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        check_hf_shapes(read_architecture(tmp_path), HFWeights(tmp_path))


@pytest.mark.parametrize("max_shard_bytes", [2**30, 30_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_loads_in_transformers_bit_equal(tmp_path, dtype, max_shard_bytes):
    source, save_dir = tmp_path / "source", tmp_path / "deep" / "export"
    wanted = {name: tensor.to(dtype) for name, tensor in save_llama(source, tied=True).items()}
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    buffer = torch.empty(10**5, dtype=dtype)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in reversed(wanted.items()):  # the order is the producer's
            view = buffer[: tensor.numel()].view(tensor.shape)
            yield name, view.copy_(tensor)  # one buffer for all, as a weight sync has it

    write_hf_checkpoint(save_dir, source, stream(), max_shard_bytes=max_shard_bytes)
    shards = sorted(path.name for path in save_dir.glob("*.safetensors"))
    if max_shard_bytes == 2**30:
        assert shards == [SINGLE]
    else:
        assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
        assert all((save_dir / name).stat().st_size < 30_000 + 4096 for name in shards)
    model = transformers.AutoModelForCausalLM.from_pretrained(save_dir)
    assert model.dtype == dtype
    loaded = dict(model.named_parameters())
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    check_hf_shapes(read_architecture(save_dir), HFWeights(save_dir))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (save_dir / name).read_bytes() == (source / name).read_bytes()
    assert [path.name for path in save_dir.parent.iterdir()] == ["export"]
    assert (save_dir / shards[0]).stat().st_mode == (save_dir / "config.json").stat().st_mode


def test_export_replaces_an_earlier_export_whole(tmp_path):
    source, save_dir = tmp_path / "source", tmp_path / "export"
    tensors = save_llama(source)
    save_dir.mkdir()
    write_hf_checkpoint(save_dir, source, tensors.items(), max_shard_bytes=30_000)
    assert len(list(save_dir.glob("*.safetensors"))) > 1
    write_hf_checkpoint(save_dir, source, ((name, tensor + 1) for name, tensor in tensors.items()))
    assert [path.name for path in save_dir.glob("*.safetensors*")] == [SINGLE]
    assert torch.equal(load_file(save_dir / SINGLE)["model.norm.weight"], torch.full((48,), 2.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "source"]


def test_export_refuses_to_replace_anything_else(tmp_path):
    source, save_dir = tmp_path / "source", tmp_path / "export"
    tensors = save_llama(source)
    with pytest.raises(ValueError, match="must not be that of the model it started from"):
        write_hf_checkpoint(source, source, tensors.items())
    write_hf_checkpoint(save_dir, source, tensors.items())
    (save_dir / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        write_hf_checkpoint(save_dir, source, tensors.items())
    (save_dir / EXPORT_RECEIPT).write_text("{}")
    with pytest.raises(ValueError, match="not the receipt of an export"):
        write_hf_checkpoint(save_dir, source, tensors.items())
    assert (save_dir / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file or link"):
        write_hf_checkpoint(tmp_path / "file", source, tensors.items())
    with pytest.raises(ValueError, match=r"has no config\.json"):
        write_hf_checkpoint(tmp_path / "new", tmp_path / "nowhere", tensors.items())


def test_failed_export_leaves_what_was_there(tmp_path):
    source, save_dir = tmp_path / "source", tmp_path / "export"
    tensors = save_llama(source)
    write_hf_checkpoint(save_dir, source, tensors.items())
    before = {path.name: path.read_bytes() for path in save_dir.iterdir()}

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield "model.norm.weight", torch.zeros(48)
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        write_hf_checkpoint(save_dir, source, failing(), max_shard_bytes=1)
    assert {path.name: path.read_bytes() for path in save_dir.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "source"]
