"""docs/reproduce.md: its commands are ones the program takes, in layouts that divide the models."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_fipo.arguments import Settings, parse_arguments
from megatron_fipo.engine_nodes import engines_of_nodes
from megatron_fipo.evaluation_arguments import parse_evaluation
from megatron_fipo.flags.presets import PRESETS
from megatron_fipo.parallel import ParallelLayout

GPUS_PER_NODE = 8
MODELS = {  # attention heads, key-value heads, layers, positions
    "models/Qwen2.5-32B": (40, 8, 64, 131072),
    "models/Qwen2.5-Math-7B-32k": (28, 4, 28, 32768),
}


@pytest.fixture(scope="module")
def text(repo_root: Path) -> str:
    return (repo_root / "docs/reproduce.md").read_text(encoding="utf-8")


def commands(text: str, program: str) -> list[list[str]]:
    """The words of every command that begins with `program`, with the shell variables set before it put in."""
    variables: dict[str, str] = {}
    found = []
    for block in re.findall(r"(?:^    .*\n?)+", text, re.MULTILINE):
        for name, value in re.findall(r'^ *([A-Z]+)="([^"]*)"$', block, re.MULTILINE):
            variables[name] = value
        command = textwrap.dedent(block).replace("\\\n", " ")
        if command.startswith(program):
            for name in {"DATA", "LAYOUT", "NODES", "EVAL"} & variables.keys():
                command = command.replace(f"${name}", variables[name])
            found.append(shlex.split(command))
    return found


def training_commands(text: str) -> list[tuple[int, Settings]]:
    """(nodes, settings) of every training command."""
    found = []
    for words in commands(text, "python -m megatron_fipo.launch"):
        start = words.index("megatron_fipo.train")
        assert words[words.index("--nproc-per-node") + 1] == str(GPUS_PER_NODE)
        found.append((int(words[words.index("--nnodes") + 1]), parse_arguments(words[start + 1 :])))
    return found


def test_the_training_commands_are_accepted_and_use_every_algorithm_and_model(text: str) -> None:
    found = training_commands(text)
    assert len(found) == 5
    assert {(settings.algorithm, settings.run.hf_checkpoint) for _, settings in found} == {
        (algorithm, model) for algorithm in ("fipo", "dapo") for model in MODELS
    }
    outputs = [(settings.run.output_dir, settings.run.save) for _, settings in found]
    assert len(set(outputs)) == len(outputs)


def test_layouts_divide_the_models_and_the_ranks(text: str) -> None:
    for num_nodes, settings in training_commands(text):
        heads, groups, layers, positions = MODELS[settings.run.hf_checkpoint]
        megatron, rollout, engine = settings.megatron, settings.rollout, settings.engine
        tp, pp, cp = (
            megatron.tensor_model_parallel_size,
            megatron.pipeline_model_parallel_size,
            megatron.context_parallel_size,
        )
        layout = ParallelLayout.for_world(num_nodes * GPUS_PER_NODE, 0, tp=tp, pp=pp, cp=cp, sequence_parallel=True)
        assert (heads % tp, groups % tp, layers % pp) == (0, 0, 0)
        assert settings.batch.global_batch_size % layout.dp == 0
        assert rollout.rollout_max_prompt_len + rollout.rollout_max_response_len <= positions
        assert sum(engines_of_nodes(engine, [GPUS_PER_NODE] * num_nodes)) * engine.tp_size == layout.world_size
        assert heads % engine.tp_size == groups % engine.tp_size == 0


def test_engines_are_given_the_time_that_a_generation_batch_takes(text: str) -> None:
    for num_nodes, settings in training_commands(text):
        assert settings.rollout.over_sampling_batch_size is not None
        num_engines = sum(engines_of_nodes(settings.engine, [GPUS_PER_NODE] * num_nodes))
        num_responses = settings.rollout.over_sampling_batch_size * settings.batch.n_samples_per_prompt
        num_tokens = num_responses * settings.rollout.rollout_max_response_len / 2
        tokens_per_s = 10_000 * num_engines
        assert settings.engine.request_timeout_s >= num_tokens / tokens_per_s, settings.run.output_dir


def test_the_evaluation_tool_repeats_the_runs_own_evaluation(text: str) -> None:
    runs = {settings.run.save: settings for _, settings in training_commands(text)}
    evaluations = commands(text, "python tools/evaluate.py")
    assert len(evaluations) == 2
    for words in evaluations:
        request = parse_evaluation(words[2:])
        run = runs[request.run.load]
        assert request.run.hf_checkpoint == run.run.hf_checkpoint
        assert request.bf16 is run.megatron.bf16 is True
        assert request.max_response_len == run.rollout.rollout_max_response_len
        assert request.max_prompt_len == run.rollout.rollout_max_prompt_len
        for name in (
            "eval_prompt_data label_key rm_type on_long_prompt n_samples_per_eval_prompt eval_temperature eval_top_p "
            "eval_top_k"
        ).split():
            assert getattr(request.data, name) == getattr(run.data, name), name


def test_the_fair_comparison_differs_from_fipo_by_the_loss_alone(text: str) -> None:
    settings = {settings.run.output_dir: settings for _, settings in training_commands(text)}
    fipo, fair = settings["runs/fipo-7b"], settings["runs/dapo-7b-fair"]
    assert (fair.batch, fair.rollout, fair.megatron, fair.data) == (
        fipo.batch,
        fipo.rollout,
        fipo.megatron,
        fipo.data,
    )


def test_every_preset_is_named(text: str) -> None:
    assert [name for name in PRESETS if name not in text] == []


def test_the_script_that_prepares_aime_2025_writes_the_columns_of_the_other_files(text: str, tmp_path: Path) -> None:
    script = re.search(r"python - <<'EOF'\n(.*?)\n    EOF", text, re.DOTALL)
    assert script is not None
    for name in ("raw/aime25", "data"):
        (tmp_path / name).mkdir(parents=True)
    rows = [{"problem": "What is $1 + 1$?", "answer": "2", "id": "0"}, {"problem": "6 * 7?", "answer": 42, "id": "1"}]
    (tmp_path / "raw/aime25/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    subprocess.run([sys.executable, "-c", textwrap.dedent(script[1])], cwd=tmp_path, check=True, timeout=60)
    written = [json.loads(line) for line in (tmp_path / "data/aime-2025.jsonl").read_text().splitlines()]
    assert [row["reward_model"]["ground_truth"] for row in written] == ["2", "42"]
    assert [row["extra_info"]["index"] for row in written] == [0, 1]
    (message,) = written[0]["prompt"]
    assert message["role"] == "user"
    assert "\n\nWhat is $1 + 1$?\n\n" in message["content"]


def test_the_7b_copy_gets_its_positions(text: str, tmp_path: Path) -> None:
    directory = tmp_path / "models/Qwen2.5-Math-7B"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 4096, "num_hidden_layers": 28}))
    copy = re.search(r"    cp -r models/\S+ (\S+)\n    sed .*\n", text)
    assert copy is not None
    subprocess.run(["bash", "-c", textwrap.dedent(copy[0])], cwd=tmp_path, check=True, timeout=60)
    config = json.loads((tmp_path / copy[1] / "config.json").read_text())
    assert config == {"max_position_embeddings": 32768, "num_hidden_layers": 28}
