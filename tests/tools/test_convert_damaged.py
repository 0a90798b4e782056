"""What a conversion must notice: numbers that do not fit, bytes that changed, settings nobody wrote, wrong places."""

from __future__ import annotations

import argparse
import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from converting import add_tokenizer, assert_same_files, run, save
from processes import run_ranks
from safetensors.torch import load_file, save_file
from torch.serialization import set_crc32_options

from megatron_fipo import conversion_check
from megatron_fipo.actor.conversion import hf_to_megatron, megatron_to_hf
from megatron_fipo.actor.torch_dist_files import StoredTensors, TorchDistWriter, _save, read_common
from megatron_fipo.weights.hf_files import HFWeights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "hf", family="qwen3", tied=False)


@pytest.fixture
def megatron(model: Path, tmp_path: Path) -> Path:
    assert run("hf_to_megatron", "--hf-checkpoint", model, "--save", tmp_path / "megatron") == 0
    return tmp_path / "megatron"


def back(megatron: Path, model: Path, capsys: pytest.CaptureFixture[str], *options: object) -> tuple[int, str]:
    """Status and stderr of the way back; what failed has left nothing."""
    capsys.readouterr()
    save_dir = megatron.parent / "back"
    status = run("megatron_to_hf", "--load", megatron, "--hf-checkpoint", model, "--save", save_dir, *options)
    said = capsys.readouterr().err
    if status:
        assert said.count("\n") == 1, said
        assert not save_dir.exists()
    return status, said


def test_a_number_beyond_the_dtype_is_an_error(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model, tmp_path / "hf")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = -7e4
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    options = ("--hf-checkpoint", tmp_path / "hf", "--save", tmp_path / "out")
    assert run("hf_to_megatron", *options, "--dtype", "fp16") == 2
    assert "decoder.final_layernorm.weight holds 70000, but --dtype float16 ends at 65504" in capsys.readouterr().err
    assert run("hf_to_megatron", *options) == 0
    status, said = back(tmp_path / "out", tmp_path / "hf", capsys, "--dtype", "fp16")
    assert status == 2
    assert "model.norm.weight holds 70000, but --dtype float16 ends at 65504" in said


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_changed_bytes_of_a_tensor_are_noticed(megatron: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = megatron / "release" / "__0_0.distcp"
    flip(shard, shard.read_bytes().index(HFWeights(model).read("model.norm.weight").numpy().tobytes()) + 5)
    status, said = back(megatron, model, capsys)
    assert (status, f"decoder.final_layernorm.weight in {shard} was changed: Bad CRC-32" in said) == (2, True), said
    assert run("inspect_checkpoint", megatron, "--verify") == 1
    assert "was changed: Bad CRC-32" in capsys.readouterr().out
    flip(megatron / "release" / "common.pt", (megatron / "release" / "common.pt").read_bytes().index(b"num_layers"))
    status, said = back(megatron, model, capsys)
    assert (status, "common.pt was changed: Bad CRC-32" in said) == (2, True), said


def test_archives_without_sums_are_read(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_crc32_options(False)
    try:
        assert run("hf_to_megatron", "--hf-checkpoint", model, "--save", tmp_path / "megatron") == 0
    finally:
        set_crc32_options(True)
    assert back(tmp_path / "megatron", model, capsys) == (0, "")
    assert_same_files(tmp_path / "back", model)


def with_args(megatron: Path, change: Callable[[dict[str, Any]], object]) -> None:
    common = read_common(StoredTensors(megatron / "release"))
    common["args"] = change(vars(common["args"]))
    torch.save(common, megatron / "release" / "common.pt")


OTHER_ARGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a dictionary": (lambda args: args | {"rotary_base": 3}, "args says rotary_base 3, but config.json makes it 10000"),
    "another namespace": (
        lambda args: types.SimpleNamespace(**args | {"norm_epsilon": 7}),
        "args says norm_epsilon 7, but config.json makes it 1e-06",
    ),
    "a tensor": (
        lambda args: argparse.Namespace(**args | {"hidden_size": torch.tensor([40, 40])}),
        "args says hidden_size [40, 40], but config.json makes it 40",
    ),
    "a list": (lambda args: [1], "common.pt: args is a list, but must be a Namespace"),
    "an array": (
        lambda args: argparse.Namespace(x=torch.ones(3).numpy()),
        "common.pt",
    ),
}


@pytest.mark.parametrize("kind", OTHER_ARGS)
def test_arguments_of_another_kind_are_compared_or_refused(
    kind: str, megatron: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = OTHER_ARGS[kind]
    with_args(megatron, change)
    status, said = back(megatron, model, capsys)
    assert (status, message in said) == (2, True), said
    assert "weights_only" not in said, "torch's advice is not ours"


def test_a_checkpoint_that_says_nothing_of_its_model_is_taken_with_a_note(
    megatron: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_args(megatron, lambda args: None)
    status, said = back(megatron, model, capsys)
    assert status == 0
    assert said.startswith(f"NOTE: {megatron / 'release'} says nothing of its model (no args): only names and shapes")


@pytest.mark.parametrize(
    ("said", "vocab_size", "status", "message"),
    [
        ({}, 3, 2, "args says vocab_size 131, but config.json makes it 3"),
        ({"vocab_size": None}, 131, 0, ""),
        (
            {"vocab_size": None},
            120,
            0,
            "NOTE: args says padded_vocab_size 256, but config.json's vocab_size 120 is padded",
        ),
        ({"vocab_size": None, "tensor_model_parallel_size": 2}, 120, 0, ""),
        ({"vocab_size": None, "make_vocab_size_divisible_by": 1}, 120, 2, "padded_vocab_size 256, but config.json has"),
    ],
)
def test_a_vocabulary_is_not_cut_without_a_word(
    said: dict[str, Any],
    vocab_size: int,
    status: int,
    message: str,
    megatron: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_args(megatron, lambda args: argparse.Namespace(**args | said))
    shutil.copytree(model, tmp_path / "hf")
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": vocab_size}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    found, told = back(megatron, tmp_path / "hf", capsys)
    assert (found, message in told, "NOTE" in told) == (status, True, "NOTE" in message), told


def test_results_do_not_go_into_a_checkpoint(megatron: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = megatron / "release" / "deep" / "hf"
    for tool, options in (("megatron_to_hf", ("--load", megatron)), ("hf_to_megatron", ())):
        assert run(tool, *options, "--hf-checkpoint", model, "--save", inside) == 2
        assert f"--save {inside} lies inside the checkpoint {megatron / 'release'}" in capsys.readouterr().err
    assert not inside.parent.exists()


@pytest.mark.parametrize(
    ("tool", "options", "message"),
    [
        ("hf_to_megatron", ("--make-vocab-size-divisible-by", 10**11), "but must be >= 1 and <= 1048576"),
        ("megatron_to_hf", ("--max-shard-gb", "inf"), "--max-shard-gb is inf, but must be > 0 and finite"),
        ("hf_to_megatron", ("--check", "--check-tolerance", "nan"), "--check-tolerance is nan, but must be >= 0"),
    ],
)
def test_absurd_sizes_are_one_line(
    tool: str,
    options: tuple[object, ...],
    message: str,
    megatron: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = ("--load", megatron) if tool == "megatron_to_hf" else ()
    assert run(tool, *load, "--hf-checkpoint", model, "--save", megatron.parent / "x", *options) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said


def test_a_check_that_cannot_be_made_is_refused_before_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = save(tmp_path / "hf", family="qwen2", tied=True, vocab_size=131)
    options = ("--hf-checkpoint", small, "--save", tmp_path / "out", "--check")
    add_tokenizer(small)
    assert run("hf_to_megatron", *options) == 2
    said = capsys.readouterr().err
    assert "--check: a token id of the tokenizer in" in said
    assert "but must be less than config.json's vocab_size 131" in said
    (small / "tokenizer.json").unlink()
    assert run("hf_to_megatron", *options) == 2
    assert "holds no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    environment: dict[str, str] = {}
    with pytest.raises(ValueError, match="--check runs on the CPU, but CUDA is in use already"):
        conversion_check._patch_for_cpu(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": ""}, "what hides GPUs from a process that has not used one yet"


def test_a_check_takes_experts_of_any_size_and_layers_under_keys_of_their_own(tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 14, "num_experts": 5, "num_experts_per_tok": 3, "vocab_size": 261}
    source = save(tmp_path / "hf", family="qwen3_moe", tied=False, **sizes)
    add_tokenizer(source)
    assert run("hf_to_megatron", "--hf-checkpoint", source, "--save", tmp_path / "stacked") == 0
    stored = StoredTensors(tmp_path / "stacked" / "release")
    (tmp_path / "layers").mkdir()
    writer = TorchDistWriter(tmp_path / "layers")
    for key in stored.tensors:
        rest = key.removeprefix("decoder.layers.")
        for index in range(stored.shape(key)[0] if rest != key else 0):
            writer.add(f"decoder.layers.{index}.{rest}", stored.read(key, (index,)))
        if rest == key:
            writer.add(key, stored.read(key))
    writer.finish(read_common(stored))
    arguments = ["--load", tmp_path / "layers", "--hf-checkpoint", source, "--save", tmp_path / "back", "--check"]
    kwargs = {"tool": "megatron_to_hf", "arguments": [str(argument) for argument in arguments]}
    (tmp_path / "run").mkdir()
    (ended,) = run_ranks(tmp_path / "run", 1, "run_checkpoint_on_ranks:call_tool", kwargs, init_process_group=False)
    assert (ended["status"], "the same model" in ended["out"]) == (0, True), ended


class Failing:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def write(self, data: Any) -> int:
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_stops_a_write_is_what_is_raised(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised:
        _save(torch.ones(3), Failing(error))  # type: ignore[arg-type]
    assert raised.value is error


def test_an_export_that_was_edited_is_not_replaced(
    megatron: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert back(megatron, model, capsys) == (0, "")
    assert back(megatron, model, capsys) == (0, "")
    edited = megatron.parent / "back" / "model.safetensors"
    content = edited.read_bytes()
    for change in (content[:-4] + b"mine", content + b"mine"):
        edited.write_bytes(change)
        capsys.readouterr()
        options = ("--hf-checkpoint", model, "--save", edited.parent)
        assert run("megatron_to_hf", "--load", megatron, *options) == 2
        assert "holds model.safetensors, but must be absent, empty or an earlier export" in capsys.readouterr().err
        assert edited.read_bytes() == change


def test_layers_that_no_file_holds_are_refused_at_once(model: Path, megatron: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "hf")
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 10**9, "layer_types": None}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="num_hidden_layers is 1000000000, but must be at most the number of tensors"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "out")
    with pytest.raises(ValueError, match="num_hidden_layers is 1000000000, but must be <= 256: more is not in"):
        megatron_to_hf(megatron / "release", tmp_path / "hf", tmp_path / "out")


def test_an_interrupted_replacement_gives_the_earlier_export_its_name_back(megatron: Path, model: Path) -> None:
    save_dir = megatron.parent / "back"
    megatron_to_hf(megatron / "release", model, save_dir)
    before = (save_dir / "model.safetensors").stat().st_ino
    real, calls = Path.rename, []

    def rename(path: Path, target: Path) -> Path:
        calls.append(path.name)
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return real(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            megatron_to_hf(megatron / "release", model, save_dir)
    assert (save_dir / "model.safetensors").stat().st_ino == before
    assert sorted(path.name for path in megatron.parent.iterdir()) == ["back", "megatron"]
    megatron_to_hf(megatron / "release", model, save_dir)
    assert (save_dir / "model.safetensors").stat().st_ino != before
    assert sorted(path.name for path in megatron.parent.iterdir()) == ["back", "megatron"]
