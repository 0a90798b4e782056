"""`--print-config` finds, in one process, what a start would refuse; its launcher tells it of the ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_fipo.arguments import Settings, parse_arguments
from megatron_fipo.launch import main as launch
from megatron_fipo.preview import MOST_DATA_BYTES, preview
from megatron_fipo.weights.architecture import hf_shapes, read_architecture

QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 259,
    "hidden_size": 36,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
EIGHT = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer cannot be loaded: problems are read without it."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(QWEN2), encoding="utf-8")
    shapes = hf_shapes(read_architecture(directory))
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, directory / "model.safetensors")
    return directory


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is undone
        monkeypatch.delenv(name)


def words(model: Path, *flags: str) -> list[str]:
    problems = model.parent / "problems.jsonl"
    problems.write_text('{"prompt": "1 + 1?", "answer": "2"}\n', encoding="utf-8")
    data = ["--prompt-data", str(problems), "--label-key", "answer", "--rm-type", "exact"]
    return ["--hf-checkpoint", str(model), "--output-dir", str(model.parent / "run"), *data, *flags]


def seen(model: Path, *flags: str, environment: dict[str, str] = EIGHT) -> tuple[list[str], list[str]]:
    settings: Settings = parse_arguments(words(model, *flags))
    problems, notes = preview(settings, environment)
    return [problem for problem in problems if "holds no tokenizer" not in problem], list(notes)


def test_a_command_line_that_starts_has_no_problems_and_leaves_nothing(model: Path) -> None:
    assert seen(model, "--device", "cpu") == ([], [])
    assert not (model.parent / "run").exists()


def test_everything_is_named_at_once(model: Path) -> None:
    (model.parent / "run").write_text("a file")
    flags = ["--tensor-model-parallel-size", "4", "--hidden-size", "64", "--rollout-max-response-len", "40000"]
    flags += ["--max-tokens-per-micro-batch", "50000", "--rollout-num-gpus-per-engine", "5", "--label-key", "nothing"]
    problems, _ = seen(model, *flags)
    beginnings = (
        "--tensor-model-parallel-size is 4, but must be a divisor of the model's 6 attention heads",
        "--rollout-num-gpus-per-engine is 5, but must be a divisor of the checkpoint's 6 attention heads",
        "--hidden-size is 64, but the checkpoint's config.json says 36",
        "--output-dir is",
        f"{model.parent / 'problems.jsonl'}, line 1: --label-key is 'nothing'",
    )
    assert len(problems) == len(beginnings)
    for problem, beginning in zip(problems, beginnings):
        assert problem.startswith(beginning)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--rollout-max-prompt-len", "16384"], "must be at most the checkpoint's context, 32768 tokens"),
        (["--tensor-model-parallel-size", "3"], "is 3, but must be a divisor of the number of ranks (8)"),
        (["--pretrained-checkpoint", "/nowhere"], "--pretrained-checkpoint"),
        (["--load", "/nowhere"], "--load is '/nowhere', but must be a directory of this program's checkpoints"),
        (["--prompt-data", "/nowhere.jsonl"], "--prompt-data is '/nowhere.jsonl', but no such file exists"),
        (["--eval-prompt-data", "a=/nowhere.jsonl"], "'/nowhere.jsonl', but no such file exists"),
        (["--rollout-placement", "disaggregated"], "--rollout-num-engines"),
        (["--rm-type", "rexact"], "--rm-type is 'rexact'"),
        (["--moe-router-dtype", "fp32"], "the checkpoint's model (qwen2) has no experts"),
        (["--fp8-recipe", "blockwise"], "used with --fp8-format e4m3 or hybrid"),
    ],
)
def test_what_a_start_refuses_is_a_problem(flags: list[str], wanted: str, model: Path) -> None:
    flags = ["--max-tokens-per-micro-batch", "50000", *flags]
    assert [problem for problem in seen(model, *flags)[0] if wanted in problem]


def test_weights_of_another_shape_are_a_problem(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({**QWEN2, "intermediate_size": 64}))
    ((problem,), _) = seen(model)
    assert "model.layers.0.mlp" in problem


def test_missing_weights_are_named_beside_flags_that_contradict_the_checkpoint(model: Path) -> None:
    (model / "model.safetensors").unlink()
    problems, _ = seen(model, "--hidden-size", "64")
    assert [problem.split()[0] for problem in problems] == ["--hidden-size", str(model)]
    assert "holds neither model.safetensors nor" in problems[1]


def test_what_cannot_be_known_here_is_a_note(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_fipo.preview.torch.cuda.is_available", lambda: False)
    problems, notes = seen(model, "--tensor-model-parallel-size", "6", "--use-nccl-ub", environment={})
    assert problems == []
    assert notes == [
        "how many ranks there will be is not known here: 6, or a multiple",
        "no CUDA device is visible here, where a start would be refused: --use-nccl-ub is True, but must be absent "
        "where there is no CUDA device",
    ]
    with (model.parent / "large.jsonl").open("wb") as file:
        file.truncate(MOST_DATA_BYTES + 2**20)
    _, notes = seen(model, "--prompt-data", str(model.parent / "large.jsonl"))
    assert "prompts of 17 MiB are read at the start, and were not read for this" in notes


def test_flags_that_agree_with_the_checkpoint_are_no_problem(model: Path) -> None:
    heads = ["--group-query-attention", "--num-query-groups", "6"]  # as many groups as heads are no contradiction
    flags = ["--num-layers", "4", "--rotary-base", "1000000", "--add-qkv-bias", "--max-position-embeddings", "30000"]
    assert seen(model, *heads, *flags)[0] == []
    flags = ["--hidden-size", "64", "--qk-layernorm", "--max-position-embeddings", "65536"]
    ((problem,), _) = seen(model, *flags)
    differences = problem.split("; ")
    named = ["--hidden-size", "--max-position-embeddings", "--qk-layernorm"]
    assert [difference.split()[0] for difference in differences] == named
    assert differences[0] == "--hidden-size is 64, but the checkpoint's config.json says 36"


def test_a_script_that_sets_expandable_segments_hears_of_it_before_it_is_on_gpus(model: Path) -> None:
    environment = EIGHT | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    (problem,), _ = seen(model, environment=environment)
    assert problem.startswith("the variable PYTORCH_CUDA_ALLOC_CONF is 'expandable_segments:True', but must not set")
    assert seen(model, "--device", "cpu", environment=environment)[0] == []
    apart = ["--rollout-placement", "disaggregated", "--rollout-num-engines", "1"]
    assert seen(model, *apart, environment=environment)[0] == []


LAUNCHERS = {
    "torchrun": ["--nnodes", "2", "--node_rank", "1", "--nproc_per_node", "3"],
    "slurm": ["--slurm", "--nodes", "2", "--ntasks-per-node", "3", "--no-requeue"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_launcher_tells_of_all_ranks_and_starts_nothing(
    launcher: str, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = ["-m", "megatron_fipo.train", *words(model), "--print-config"]
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    assert launch([*LAUNCHERS[launcher], *program, *layout]) == 2
    out, err = capfd.readouterr()
    assert "megatron.pipeline_model_parallel_size" in out
    assert err.startswith("error: ")
    assert "is 4, but must be a divisor of the number of ranks (6)" in err
    assert err.count("\n") == 1
