"""examples/recipes: what each script starts is accepted, agrees with docs/reproduce.md, divides its model and fits."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from megatron_fipo.arguments import Settings, parse_arguments
from megatron_fipo.checks import check_architecture, check_layer_flags
from megatron_fipo.engine_nodes import engines_of_nodes
from megatron_fipo.plan_arguments import parse_plan, plan_given_layout, training_of
from megatron_fipo.planning.show import PLAIN_WIDTH, show_plan
from megatron_fipo.slurm_options import read_command
from megatron_fipo.weights.architecture import read_architecture

MODELS = Path(__file__).resolve().parent / "recipe_models"  # config.json as published; 7B with the paper's positions
RECIPES = {
    "qwen2.5-32b-16x8": ("Qwen2.5-32B", 16, 8),
    "qwen2.5-math-7b-4x8": ("Qwen2.5-Math-7B-32k", 4, 8),
    "qwen2.5-math-7b-1x8": ("Qwen2.5-Math-7B-32k", 1, 8),
    "qwen3-30b-a3b-4x8": ("Qwen3-30B-A3B", 4, 8),
    "smollm2-1gpu": ("SmolLM2-135M-Instruct", 1, 1),
    "smollm2-cpu": ("SmolLM2-135M-Instruct", 1, 2),
}
SHOW_WORDS = "#!/bin/sh\nfor word; do printf '%s\\n' \"$word\"; done\n"


@pytest.fixture(scope="module")
def started(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[str]]:
    """The words that every recipe starts Python with, by recipe and by what the recipe was told."""
    python = tmp_path_factory.mktemp("recipes") / "python"
    python.write_text(SHOW_WORDS)
    python.chmod(0o755)
    found = {}
    for name, (model, *_) in RECIPES.items():
        for told in ("", "plan", "--print-config", "--slurm --time 1:00:00 -- --seed 7"):
            environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "MODEL": str(MODELS / model)}
            if not told:
                environment |= {"NODE_RANK": "1", "MASTER_ADDR": "node0"}
            words = ["bash", str(repo_root / f"examples/recipes/{name}.sh"), *told.split()]
            shown = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=20, check=True)
            found[name, told] = shown.stdout.splitlines()
    return found


def settings_of(words: list[str]) -> Settings:
    return parse_arguments(words[words.index("megatron_fipo.train") + 1 :])


def test_every_recipe_is_tested(repo_root: Path) -> None:
    assert {path.stem for path in (repo_root / "examples/recipes").glob("*.sh")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_the_program_takes_every_flag_and_the_model_the_layout(
    started: dict[tuple[str, str], list[str]], name: str
) -> None:
    model, num_nodes, per_node = RECIPES[name]
    settings = settings_of(started[name, ""])
    assert settings.notes == ()
    arch = read_architecture(MODELS / model)
    training = training_of(settings, arch, num_nodes * per_node, 1.5)
    assert training.layout.world_size == num_nodes * per_node
    assert check_architecture(settings, training.layout) == arch
    check_layer_flags(settings.megatron, arch, training.transformer_impl)
    engines = engines_of_nodes(settings.engine, [per_node] * num_nodes)
    assert sum(engines) * settings.engine.tp_size <= training.layout.world_size
    assert settings.batch.global_batch_size % training.layout.dp == 0


@pytest.mark.parametrize("name", RECIPES)
def test_the_layout_fits_and_the_script_shows_what_the_plan_says(
    started: dict[tuple[str, str], list[str]], name: str, repo_root: Path
) -> None:
    script, *words = started[name, "plan"]
    assert script == "tools/plan.py"
    planned = plan_given_layout(parse_plan(words))
    assert planned.plan.fits
    printed = io.StringIO()
    show_plan(Console(file=printed, width=PLAIN_WIDTH), planned.plan, planned.cost)
    comment = re.search(
        r"^# `plan` says.*\n#\n((?:#   .*\n)+)", (repo_root / f"examples/recipes/{name}.sh").read_text(), re.MULTILINE
    )
    assert comment is not None
    assert [line.removeprefix("#   ") for line in comment[1].splitlines()] == [
        line.rstrip() for line in printed.getvalue().splitlines()
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_nodes_are_the_launchers_and_words_after_the_dashes_the_programs(
    started: dict[tuple[str, str], list[str]], name: str
) -> None:
    _, num_nodes, per_node = RECIPES[name]
    words = started[name, ""]
    launcher = words[: words.index("megatron_fipo.train") - 1]
    assert launcher[:2] == ["-m", "megatron_fipo.launch"]
    assert launcher[launcher.index("--nnodes") + 1] == str(num_nodes)
    assert launcher[launcher.index("--nproc-per-node") + 1] == str(per_node)
    submitting = started[name, "--slurm --time 1:00:00 -- --seed 7"]
    assert submitting[:3] == ["-m", "megatron_fipo.launch", "--slurm"]
    job = read_command(submitting[3:]).job
    assert (job.nodes, job.ranks_per_node, job.sbatch["time"]) == (num_nodes, per_node, "1:00:00")
    assert job.requeue is settings_of(submitting).run.auto_resume
    assert settings_of(submitting).run.seed == 7
    assert settings_of(submitting).megatron == settings_of(words).megatron


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_printed_for_all_nodes_from_one(started: dict[tuple[str, str], list[str]], name: str) -> None:
    words, start = started[name, "--print-config"], started[name, ""]
    program = words.index("megatron_fipo.train") + 1
    _, num_nodes, per_node = RECIPES[name]
    ranks = ["--nnodes", str(num_nodes), "--nproc-per-node", str(per_node)]
    assert words[:program] == ["-m", "megatron_fipo.launch", *ranks, "-m", "megatron_fipo.train"]
    assert words[program:] == [*start[start.index("megatron_fipo.train") + 1 :], "--print-config"]


@pytest.mark.parametrize(("name", "run"), [("qwen2.5-32b-16x8", "fipo-32b"), ("qwen2.5-math-7b-4x8", "fipo-7b")])
def test_the_papers_recipes_are_those_of_the_page_that_reproduces_it(
    started: dict[tuple[str, str], list[str]], name: str, run: str, repo_root: Path
) -> None:
    text = (repo_root / "docs/reproduce.md").read_text(encoding="utf-8")
    found = re.search(rf"python -m megatron_fipo\.launch(?:.*\\\n)+.*--output-dir runs/{run}", text)
    assert found is not None
    command = found[0]
    before = text[: text.index(command)]
    variables = dict(re.findall(r'^ *([A-Z]+)="([^"]*)"$', before, re.MULTILINE))  # the last of each name
    words = command.replace("\\\n", " ").partition("megatron_fipo.train")[2]
    for variable, value in variables.items():
        words = words.replace(f"${variable}", value)
    page, recipe = parse_arguments(shlex.split(words)), settings_of(started[name, ""])
    for section in ("algorithm", "loss", "correction", "batch", "rollout", "data", "engine", "guards", "megatron"):
        assert getattr(recipe, section) == getattr(page, section), section
    assert recipe.run.train_iters == page.run.train_iters
    assert recipe.run.save_interval == page.run.save_interval


def test_the_recipe_for_the_cpu_is_the_quickstarts_run(started: dict[tuple[str, str], list[str]]) -> None:
    settings = settings_of(started["smollm2-cpu", ""])
    assert settings.megatron.device == "cpu"
    assert (settings.megatron.pipeline_model_parallel_size, settings.megatron.bf16) == (2, True)
    assert (settings.batch.rollout_batch_size, settings.batch.n_samples_per_prompt) == (8, 8)
    assert json.loads((MODELS / "SmolLM2-135M-Instruct/config.json").read_text())["num_hidden_layers"] == 30
