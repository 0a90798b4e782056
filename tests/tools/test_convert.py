"""The converters on models that no table knows: there and back bit for bit, and refusals that name the cause."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from converting import LLAMA3, assert_same_files, run, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from megatron_fipo.actor.torch_dist_files import StoredTensors, read_common
from megatron_fipo.weights.hf_files import HFWeights

MODELS: dict[str, dict[str, Any]] = {
    "qwen2 tied": {"family": "qwen2", "tied": True},
    "qwen2 untied bf16": {"family": "qwen2", "tied": False, "dtype": torch.bfloat16, "vocab_size": 257},
    "qwen3 fp16, wide heads": {"family": "qwen3", "tied": True, "dtype": torch.float16, "head_dim": 22},
    "qwen3 one group": {"family": "qwen3", "tied": False, "num_key_value_heads": 1, "vocab_size": 128},
    "qwen3_moe bf16": {"family": "qwen3_moe", "tied": False, "dtype": torch.bfloat16, "head_dim": 6},
    "llama 3.1": {
        "family": "llama",
        "tied": False,
        "rope_parameters": LLAMA3,
        "head_dim": 14,
        "num_key_value_heads": 4,
        "dtype": torch.bfloat16,
    },
    "llama in many small files": {"family": "llama", "tied": True, "max_shard_size": "9KB", "num_hidden_layers": 3},
}


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bit_equal(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "hf", **MODELS[name])
    assert run("hf_to_megatron", "--hf-checkpoint", source, "--save", tmp_path / "megatron") == 0
    options = ("--load", tmp_path / "megatron", "--hf-checkpoint", source, "--max-shard-gb", 2e-5)
    assert run("megatron_to_hf", *options, "--save", tmp_path / "back") == 0
    assert_same_files(tmp_path / "back", source)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())["metadata"]["total_size"] > 0


def test_whatever_a_tokenizer_may_be_made_of_is_carried_over(model: Path, tmp_path: Path) -> None:
    classes = [name for names in TOKENIZER_MAPPING_NAMES.values() for name in ([names] if names else [])]
    found = [getattr(transformers, name, None) for name in classes]
    names = {name for one in found for name in getattr(one, "vocab_files_names", {}).values() if isinstance(name, str)}
    assert {"vocab.txt", "spiece.model", "tokenizer.model", "merges.txt"} < names
    names |= {"tokenizer.4.0.0.json", "added_tokens.json", "LICENSE", "additional_chat_templates/rag.jinja"}
    shutil.copytree(model, tmp_path / "hf")
    (tmp_path / "hf" / "additional_chat_templates").mkdir()
    for name in (*names, "README.md", "modeling.py", "onnx.bin"):
        (tmp_path / "hf" / name).write_text(f"this is {name}")
    assert run("hf_to_megatron", "--hf-checkpoint", tmp_path / "hf", "--save", tmp_path / "megatron") == 0
    options = ("--load", tmp_path / "megatron", "--hf-checkpoint", tmp_path / "hf", "--save", tmp_path / "back")
    assert run("megatron_to_hf", *options) == 0
    assert {name: (tmp_path / "back" / name).read_text() for name in names} == {
        name: f"this is {name}" for name in names
    }
    assert not any((tmp_path / "back" / name).exists() for name in ("README.md", "modeling.py", "onnx.bin"))

    assert run("megatron_to_hf", *options) == 0  # its own export may be replaced
    (tmp_path / "back" / "additional_chat_templates" / "mine.jinja").write_text("mine")
    assert run("megatron_to_hf", *options) == 2


def test_the_vocabulary_is_padded_with_zeros_for_the_tensor_parallel_size(tmp_path: Path) -> None:
    source = save(tmp_path / "hf", family="qwen2", tied=False)
    options = ("--tensor-model-parallel-size", 2, "--make-vocab-size-divisible-by", 12, "--dtype", "bf16")
    assert run("hf_to_megatron", "--hf-checkpoint", source, "--save", tmp_path / "megatron", *options) == 0
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text() == "release"
    stored = StoredTensors(tmp_path / "megatron" / "release")
    for key, hf in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        tensor = stored.read(key)
        assert (tensor.shape, tensor.dtype) == ((144, 40), torch.bfloat16)
        assert torch.equal(tensor[:131], HFWeights(source).read(hf).bfloat16())
        assert not tensor[131:].any()
    common = read_common(stored)
    assert vars(common["args"]).items() >= {
        ("num_layers", 4), ("padded_vocab_size", 144), ("add_qkv_bias", True), ("bf16", True), ("num_query_groups", 2)
    }  # fmt: skip
    assert (common["iteration"], common["checkpoint_version"]) == (0, 3.0)


def test_absent_fields_are_those_of_transformers(tmp_path: Path) -> None:
    source = save(tmp_path / "hf", family="llama", tied=False, num_key_value_heads=4, head_dim=10)
    config = json.loads((source / "config.json").read_text())
    kept = {name: config[name] for name in config if name not in ("num_key_value_heads", "head_dim", "rms_norm_eps")}
    for name in ("rope_parameters", "tie_word_embeddings", "dtype", "torch_dtype", "attention_bias", "hidden_act"):
        kept.pop(name, None)
    (source / "config.json").write_text(json.dumps(kept))
    assert run("hf_to_megatron", "--hf-checkpoint", source, "--save", tmp_path / "megatron") == 0
    assert (
        run("megatron_to_hf", "--load", tmp_path / "megatron", "--hf-checkpoint", source, "--save", tmp_path / "back")
        == 0
    )
    assert_same_files(tmp_path / "back", source)


def change(path: Path, **fields: Any) -> None:
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))


def rewrite(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def split_in_files(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def only_pickles(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def without_second_file(directory: Path) -> None:
    split_in_files(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def truncated_second_file(directory: Path) -> None:
    split_in_files(directory)
    truncate(directory / "model-00002-of-00002.safetensors")


def with_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = torch.nan


def of_two_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()


def config_with(**fields: Any) -> Callable[[Path], None]:
    return lambda directory: change(directory / "config.json", **fields)


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
BAD_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown": (config_with(model_type="mamba2"), "model_type is 'mamba2', but must be one of ['llama'"),
    "another hidden size": (config_with(hidden_size=48), "contradicts its config.json"),
    "a layer more": (config_with(num_hidden_layers=5, layer_types="absent"), "lacks tensors that its config.json asks"),
    "a layer less": (config_with(num_hidden_layers=3, layer_types="absent"), "has no use for: model.layers.3."),
    "biased attention": (config_with(**LLAMA, attention_bias=True), "attention_bias is True"),
    "truncated": (lambda d: truncate(d / "model.safetensors"), "is not a whole safetensors file"),
    "pickles": (only_pickles, "pytorch_model.bin: pickles are not read, convert them to safetensors"),
    "missing file": (without_second_file, "names 'model-00002-of-00002.safetensors', but"),
    "truncated file": (truncated_second_file, "model-00002-of-00002.safetensors ("),
    "not a number": (
        lambda d: rewrite(d, with_nan),
        "layers.2.mlp.linear_fc2.weight holds a number that is not finite",
    ),
    "two dtypes": (lambda d: rewrite(d, of_two_dtypes), "choose one with --dtype"),
    "not there": (shutil.rmtree, "config.json cannot be read"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "hf", family="qwen2", tied=False)


@pytest.mark.parametrize("name", BAD_MODELS)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD_MODELS[name]
    shutil.copytree(model, tmp_path / "hf")
    damage(tmp_path / "hf")
    assert run("hf_to_megatron", "--hf-checkpoint", tmp_path / "hf", "--save", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tensor-model-parallel-size", 3), "--tensor-model-parallel-size is 3, but must be a divisor of the"),
        (("--tensor-model-parallel-size", 0), "--tensor-model-parallel-size is 0, but must be >= 1"),
        (("--make-vocab-size-divisible-by", 0), "--make-vocab-size-divisible-by is 0, but must be >= 1"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_name_the_flag(
    options: tuple[object, ...], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("hf_to_megatron", "--hf-checkpoint", model, "--save", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_directories_that_hold_something_are_not_written_into(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert run("hf_to_megatron", "--hf-checkpoint", model, "--save", tmp_path / "out") == 2
    assert "must be absent or an empty directory" in capsys.readouterr().err
    assert run("hf_to_megatron", "--hf-checkpoint", model, "--save", tmp_path / "megatron") == 0
    options = ("--load", tmp_path / "megatron", "--hf-checkpoint", model, "--save", tmp_path / "out")
    assert run("megatron_to_hf", *options) == 2
    assert "holds mine.txt" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_all_differences_from_another_model_are_listed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("hf_to_megatron", "--hf-checkpoint", model, "--save", tmp_path / "megatron") == 0
    other = save(tmp_path / "other", family="qwen3", tied=True, intermediate_size=96, num_hidden_layers=3)
    change(other / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert (
        run("megatron_to_hf", "--load", tmp_path / "megatron", "--hf-checkpoint", other, "--save", tmp_path / "x") == 2
    )
    said = capsys.readouterr().err
    for part in (
        "args says num_layers 4, but config.json makes it 3",
        "ffn_hidden_size 88, but config.json makes it 96",
        "rotary_base 10000, but config.json makes it 500000",
        "add_qkv_bias True, but config.json makes it False",
        "qk_layernorm False, but config.json makes it True",
        "untie_embeddings_and_output_weights True, but config.json makes it False",
        "decoder.layers.mlp.linear_fc1.weight is [4, 176, 40], but config.json makes it [3, 192, 40]",
        "it lacks decoder.layers.0.self_attention.k_layernorm.weight",
        "it holds tensors that the model does not have: decoder.layers.self_attention.linear_qkv.bias",
        "output_layer.weight",
    ):
        assert part in said
    assert not (tmp_path / "x").exists()


def test_a_full_disk_leaves_nothing_behind(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        status = run("hf_to_megatron", "--hf-checkpoint", model, "--save", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    said = capsys.readouterr().err
    assert status == 2
    assert f"--save {tmp_path / 'out'} cannot be written: " in said
    assert "File too large" in said
    assert list(tmp_path.iterdir()) == []


def test_files_of_the_export_say_their_dtype(model: Path, tmp_path: Path) -> None:
    assert run("hf_to_megatron", "--hf-checkpoint", model, "--save", tmp_path / "megatron") == 0
    options = (
        "--load",
        tmp_path / "megatron",
        "--hf-checkpoint",
        model,
        "--save",
        tmp_path / "back",
        "--dtype",
        "fp16",
    )
    assert run("megatron_to_hf", *options) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float16"
    with safe_open(tmp_path / "back" / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.float16
