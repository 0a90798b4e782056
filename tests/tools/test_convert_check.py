"""The comparison of both models' logits, and a run that starts from a converted checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from converting import add_tokenizer, run, save
from processes import run_ranks

from megatron_fipo.actor.megatron_weights import MegatronWeights
from megatron_fipo.arguments import parse_arguments
from megatron_fipo.checks import check_run
from megatron_fipo.weights.hf_files import HFWeights

ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, what the converter made of it, and the same architecture with other weights."""
    directory = tmp_path_factory.mktemp("checked")
    for name, seed in (("model", 0), ("other", 1)):
        source = save(directory / name, family="qwen2", tied=True, vocab_size=261, seed=seed)
        add_tokenizer(source)
    options = ("--hf-checkpoint", directory / "model", "--save", directory / "megatron")
    assert run("hf_to_megatron", *options, "--tensor-model-parallel-size", 2) == 0
    return directory


def check(directory: Path, save: Path, *options: object) -> tuple[int, str]:
    """`megatron_to_hf --check` in a process of its own: it makes itself a job and patches megatron-core."""
    arguments = ("--load", directory / "megatron", "--hf-checkpoint", directory / "model", "--save", save, "--check")
    (directory / "run").mkdir(exist_ok=True)
    (ended,) = run_ranks(
        directory / "run",
        1,
        "run_checkpoint_on_ranks:call_tool",
        {"tool": "megatron_to_hf", "arguments": [str(argument) for argument in (*arguments, *options)]},
        init_process_group=False,
    )
    return ended["status"], ended["out"] + ended["err"]


def test_a_check_compares_both_models_on_a_text(models: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Two ships, four sails. " * 40)
    status, said = check(models, tmp_path / "back", "--check-text", tmp_path / "text.txt")
    assert status == 0, said
    found = re.search(r"check on (\d+) tokens in fp32: max \|delta logit\| (\S+), max KL of a token (\S+) nats", said)
    assert found is not None, said
    assert int(found[1]) == 256, "the model's context"
    assert 0 < float(found[2]) < 1e-3
    assert float(found[3]) < 1e-6


def test_a_check_that_fails_has_a_status_of_its_own(models: Path, tmp_path: Path) -> None:
    status, said = check(models, tmp_path / "back", "--dtype", "bf16", "--check-tolerance", 1e-4)
    assert status == 3, said
    assert "NOT the same model" in said


def test_a_text_that_is_not_there_is_named(models: Path, tmp_path: Path) -> None:
    status, said = check(models, tmp_path / "back", "--check-text", tmp_path / "absent.txt")
    assert status == 2
    assert f"error: --check-text {tmp_path / 'absent.txt'} cannot be read" in said


def settings(models: Path, hf: str, pretrained: Path, output: Path) -> list[str]:
    flags = {
        "hf-checkpoint": models / hf,
        "pretrained-checkpoint": pretrained,
        "task": "small_arithmetic",
        "output-dir": output,
        "device": "cpu",
        "rollout-max-prompt-len": 64,
        "rollout-max-response-len": 64,
        "overlong-buffer-len": 4,
    }
    return [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]


def test_a_run_takes_the_weights_of_the_pretrained_checkpoint(models: Path, tmp_path: Path) -> None:
    checked = check_run(parse_arguments(settings(models, "other", models / "megatron", tmp_path / "out")), ONE_RANK)
    assert isinstance(checked.weights, MegatronWeights)
    wanted = HFWeights(models / "model")
    for name in wanted.names:
        assert torch.equal(checked.weights.read(name), wanted.read(name)), name
    norm = "model.norm.weight"
    assert not torch.equal(checked.weights.read(norm), HFWeights(models / "other").read(norm))
    kwargs = {"model_dir": str(models / "model"), "other_dir": str(models / "other")}
    kwargs["checkpoint"] = str(models / "megatron")
    assert run_ranks(tmp_path, 2, "run_checkpoint_on_ranks:start_from", kwargs) == [[], []]


def test_a_pretrained_checkpoint_that_does_not_fit_names_the_flag(models: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "wider", family="qwen2", tied=True, vocab_size=261, intermediate_size=96)
    add_tokenizer(other)
    with pytest.raises(ValueError, match=r"--pretrained-checkpoint: .*ffn_hidden_size 88, but config.json makes it 96"):
        check_run(parse_arguments(settings(tmp_path, "wider", models / "megatron", tmp_path / "out")), ONE_RANK)
    with pytest.raises(ValueError, match=r"--pretrained-checkpoint: .*is not a directory"):
        check_run(parse_arguments(settings(models, "other", tmp_path / "absent", tmp_path / "out")), ONE_RANK)
    words = [*settings(models, "other", models / "megatron", tmp_path / "out"), "--load", str(models / "megatron")]
    with pytest.raises(ValueError, match=r"--load is .*--pretrained-checkpoint starts from the weights of the other"):
        check_run(parse_arguments(words), ONE_RANK)
