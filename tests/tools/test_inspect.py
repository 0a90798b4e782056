"""What the inspector says of every kind of directory, whole and damaged."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from converting import run, save, tool
from megatron.core.enums import Fp8Recipe
from processes import run_ranks
from safetensors.torch import load_file, save_file

from megatron_fipo.actor.torch_dist_files import Inert, StoredTensors, TorchDistWriter, read_common
from megatron_fipo.weights.hf_files import HFWeights


class Planted:
    """A class that a checkpoint has no business with."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in every form, and two checkpoints of a run that began with it."""
    directory = tmp_path_factory.mktemp("inspected")
    source = save(directory / "hf", family="qwen2", tied=True, max_shard_size="60KB")
    assert run("hf_to_megatron", "--hf-checkpoint", source, "--save", directory / "megatron") == 0
    kwargs = {"model_dir": str(source), "root": str(directory / "run")}
    run_ranks(directory, 2, "run_checkpoint_on_ranks:save_two_steps", kwargs)
    return directory


def inspected(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    status = run("inspect_checkpoint", path, "--json", *options)
    return status, json.loads(capsys.readouterr().out)


def test_a_hugging_face_model(directories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = inspected(capsys, directories / "hf", "--verify")
    weights = HFWeights(directories / "hf")
    assert (status, found["kind"], found["problems"]) == (0, "Hugging Face model", [])
    assert found["num_parameters"] == sum(weights.read(name).numel() for name in weights.names)
    assert found["model_bytes"] == 4 * found["num_parameters"]
    assert found["tensors"]["model.layers.3.mlp.up_proj.weight"] == {
        "shape": [88, 40],
        "dtype": "float32",
        "size_bytes": 14080,
    }
    assert found["holds"]["architecture"]["num_query_groups"] == 2


def test_a_converted_checkpoint(directories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = inspected(capsys, directories / "megatron", "--verify")
    assert (status, found["kind"], found["iteration"]) == (0, "Megatron-LM checkpoint", 0)
    assert found["tensors"]["decoder.layers.mlp.linear_fc1.weight"]["shape"] == [4, 176, 40]
    assert (found["holds"]["optimizer"], found["holds"]["random states"]) == (None, False)
    assert "every tensor of the model can be read" in found["verified"]


@pytest.mark.parametrize("path", ["run", "run/step_0000002"])
def test_a_run(path: str, directories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = inspected(capsys, directories / path, "--verify")
    assert (status, found["kind"], found["iteration"]) == (0, "checkpoint of a run", 2)
    assert found["directory"].endswith("run/step_0000002")
    assert found["others"] == (["step_0000001"] if path == "run" else [])
    assert found["tensors"]["embedding.word_embeddings.weight"]["shape"][1] == 40
    assert found["holds"]["optimizer"]["tensors"] > 0
    assert (found["holds"]["random states"], found["holds"]["scheduler"]) == (True, True)
    assert found["holds"]["run state"]["layout"]["tp"] == 2
    assert "SHA-256 of the manifest" in found["verified"]


def test_a_run_becomes_a_hugging_face_model(
    directories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--hf-checkpoint", directories / "hf", "--save", tmp_path / "back")
    assert run("megatron_to_hf", "--load", directories / "run", *options) == 0
    capsys.readouterr()
    assert run("inspect_checkpoint", tmp_path / "back", "--diff", directories / "hf", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    weights = HFWeights(directories / "hf")
    assert (found["shapes"], found["num_compared"]) == ({}, len(weights.names))
    largest = {name: float(weights.read(name).abs().max()) for name in weights.names}
    assert found["values"].keys() == largest.keys()
    for name, delta in found["values"].items():  # the ranks multiplied every weight by 1.25
        assert delta == pytest.approx(largest[name] / 4, rel=1e-5)
    assert run("inspect_checkpoint", tmp_path / "back", "--diff", directories / "run") == 0
    assert "0 in values" in capsys.readouterr().out
    assert (
        run("inspect_checkpoint", directories / "run" / "step_0000001", "--diff", directories / "run" / "step_0000002")
        == 0
    )
    text = run("inspect_checkpoint", directories / "run" / "step_0000001", "--diff", directories / "megatron")
    assert text == 1


def test_people_read_a_page(directories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect_checkpoint", directories / "run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("step_0000002: checkpoint of a run")
    assert "  iteration        2" in lines
    assert any("layout tp 2" in line for line in lines)
    assert "  not verified     --verify reads every byte" in lines


def test_changed_bytes_are_found(directories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(directories / "run", tmp_path / "run")
    shard = next((tmp_path / "run" / "step_0000002").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert inspected(capsys, tmp_path / "run")[0] == 0, "nothing was hashed"
    status, found = inspected(capsys, tmp_path / "run", "--verify")
    assert status == 1
    message = f"{shard} was changed: its SHA-256 is not the one in the manifest"
    assert found["problems"] == [message]
    options = ("--hf-checkpoint", directories / "hf", "--save", tmp_path / "back")
    assert run("megatron_to_hf", "--load", tmp_path / "run", *options) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "back").exists()
    (tmp_path / "ranks").mkdir()
    kwargs = {"model_dir": str(directories / "hf"), "checkpoint": str(tmp_path / "run" / "step_0000002")}
    told = run_ranks(tmp_path / "ranks", 2, "run_checkpoint_on_ranks:verified_start", kwargs)
    assert told == [f"--pretrained-checkpoint: {message}"] * 2


def test_files_of_a_cache_are_links(directories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "snapshot").mkdir()
    for path in (directories / "hf").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    status, found = inspected(capsys, tmp_path / "snapshot", "--verify")
    assert (status, found["problems"], found["holds"]["tokenizer"]) == (0, [], True)


def test_a_state_of_another_shape_is_no_traceback(
    directories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(directories / "run", tmp_path / "run")
    path = tmp_path / "run" / "step_0000002" / "run_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"trainer": {"collector": {"waiting": 5}}}))
    status, found = inspected(capsys, tmp_path / "run")
    assert (status, found["holds"]["run state"]["groups waiting"]) == (0, None)


@pytest.mark.parametrize("what", ["truncated", "missing"])
def test_a_shard_that_is_not_whole_is_named(
    what: str, directories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(directories / "megatron", tmp_path / "m")
    shard = tmp_path / "m" / "release" / "__0_0.distcp"
    if what == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size - 10)
    status, found = inspected(capsys, tmp_path / "m")
    assert status == 1
    assert found["problems"][0].startswith(f"{shard} " + ("is missing" if what == "missing" else "has "))
    options = ("--hf-checkpoint", directories / "hf", "--save", tmp_path / "back")
    assert run("megatron_to_hf", "--load", tmp_path / "m", *options) == (2 if what == "missing" else 0)
    assert ("__0_0.distcp is missing" in capsys.readouterr().err) == (what == "missing")


def test_a_hugging_face_model_that_is_not_whole_is_told(
    directories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(directories / "hf", tmp_path / "hf")
    first = sorted((tmp_path / "hf").glob("*.safetensors"))[0]
    tensors = load_file(first)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = torch.inf
    save_file(tensors, first, metadata={"format": "pt"})
    status, found = inspected(capsys, tmp_path / "hf", "--verify")
    assert (status, found["problems"]) == (1, [f"{name} holds numbers that are not finite"])
    first.unlink()
    status, found = inspected(capsys, tmp_path / "hf")
    assert status == 1
    assert f"names {first.name!r}, but" in found["problems"][0]


def test_a_quantised_model_is_told_as_such(
    directories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(directories / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    tensors = {
        "w": torch.ones(2, 3).to(torch.float8_e4m3fn),
        "scale": torch.tensor(2.0),
        "u": torch.ones(2).to(torch.uint16),
    }
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    status, found = inspected(capsys, tmp_path / "hf", "--verify")
    assert (status, found["problems"], found["holds"]["quantization"]) == (0, [], {"quant_method": "fp8"})
    assert found["tensors"] == {
        "scale": {"shape": [], "dtype": "float32", "size_bytes": 4},
        "u": {"shape": [2], "dtype": "uint16", "size_bytes": 4},
        "w": {"shape": [2, 3], "dtype": "float8_e4m3fn", "size_bytes": 6},
    }
    shutil.copytree(tmp_path / "hf", tmp_path / "other")
    tensors["w"][1, 2] = 2.5
    save_file(tensors | {"scale": torch.tensor(torch.inf)}, tmp_path / "other" / "model.safetensors")
    assert run("inspect_checkpoint", tmp_path / "hf", "--diff", tmp_path / "other", "--json") == 1
    assert json.loads(capsys.readouterr().out)["values"] == {"scale": "inf", "w": 1.5}


@pytest.mark.parametrize("content", ["nothing", "a legacy checkpoint", "a tracker of nothing", "a tracker of words"])
def test_what_is_no_checkpoint_is_said(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "holds no metadata.json: it is no torch_dist checkpoint"
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    if content == "a legacy checkpoint":
        (tmp_path / "iter_0000007" / "mp_rank_00").mkdir(parents=True)
        tracker.write_text("7")
        message = "is in Megatron-LM's format `torch` (mp_rank_*), a pickle per rank"
    if content == "a tracker of nothing":
        tracker.write_text("12")
        message = "says 12, but "
    if content == "a tracker of words":
        tracker.write_text("../../etc")
        message = "latest_checkpointed_iteration.txt says '../../etc', but must say a number or 'release'"
    assert run("inspect_checkpoint", tmp_path) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_hugging_face_model_is_no_checkpoint_to_convert(
    directories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--load", directories / "hf", "--hf-checkpoint", directories / "hf", "--save", tmp_path / "x")
    assert run("megatron_to_hf", *options) == 2
    assert "is a Hugging Face model, but must be a torch_dist checkpoint" in capsys.readouterr().err


def with_common(directory: Path, common: dict[str, Any]) -> StoredTensors:
    directory.mkdir(exist_ok=True)
    writer = TorchDistWriter(directory)
    writer.add("weight", torch.ones(3))
    writer.finish(common)
    return StoredTensors(directory)


def test_arguments_are_read_without_their_classes(tmp_path: Path) -> None:
    args = argparse.Namespace(a=1, dtype=torch.bfloat16, recipe=Fp8Recipe.mxfp8, where=[tmp_path])
    found = read_common(with_common(tmp_path / "c", {"args": args, "iteration": 3}))["args"]
    assert (found.a, found.dtype) == (1, torch.bfloat16)
    assert isinstance(found.recipe, Inert)
    assert found.recipe.values == (Fp8Recipe.mxfp8.value,)


def test_a_foreign_class_among_the_arguments_is_named_and_not_made(tmp_path: Path) -> None:
    stored = with_common(tmp_path / "c", {"args": argparse.Namespace(a=Planted())})
    with pytest.raises(ValueError, match=r"common\.pt holds .*\.Planted, which is no part of a checkpoint's settings"):
        read_common(stored)


def test_common_state_among_the_tensors_is_read(tmp_path: Path) -> None:
    """As megatron-core 0.19 writes it."""
    writer = TorchDistWriter(tmp_path)
    writer.add("weight", torch.ones(3))
    writer.add_object("common_state/shard_0_1", {"args": argparse.Namespace(num_layers=7), "iteration": 5})
    writer.finish({})
    (tmp_path / "common.pt").unlink()
    found = read_common(StoredTensors(tmp_path))
    assert (found["iteration"], found["args"].num_layers) == (5, 7)


def test_the_tools_import_no_megatron_until_they_run_a_model() -> None:
    modules = "megatron_fipo.actor.conversion, megatron_fipo.actor.inspection"
    program = f"import sys; import {modules}; print('megatron' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert tool("inspect_checkpoint").FOUND_WRONG == 1
