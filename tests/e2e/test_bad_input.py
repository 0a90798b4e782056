"""What is wrong with a run's input is said in one line, before any engine starts; by one process and under torchrun."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from processes import REPO_ROOT

# Calls main() for one case after the other: importing torch for each would cost a minute.
DRIVER = """
import contextlib, io, json, os, sys
from megatron_fipo.train import main
for case in json.load(sys.stdin):
    os.environ.pop("RANK", None), os.environ.pop("WORLD_SIZE", None)
    os.environ.update(case["env"])
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        status = main(case["arguments"])
    megatron = "megatron.core" in sys.modules
    print(json.dumps({"status": status, "stderr": stderr.getvalue(), "megatron": megatron}), flush=True)
"""
ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1"}
TWO_RANKS = {"RANK": "0", "WORLD_SIZE": "2"}
BASE: dict[str, Any] = {
    "task": "small_arithmetic",
    "rollout-batch-size": 4,
    "n-samples-per-prompt": 2,
    "num-updates-per-rollout": 2,
    "rollout-max-prompt-len": 64,
    "rollout-max-response-len": 8,
    "max-tokens-per-micro-batch": 128,
    "overlong-buffer-len": 4,
    "output-dir": "out",
}


@dataclass(frozen=True)
class Case:
    """One mistake: what differs from BASE (None: the flag is left out) and what the line must hold, in order."""

    wanted: str  # a regular expression
    flags: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=lambda: dict(ONE_RANK))


def from_file(path: str, **more: Any) -> dict[str, Any]:
    return {"task": None, "prompt-data": path, "rm-type": "exact", **more}


CASES: dict[str, Case] = {
    # the command line
    "unknown flag": Case(r"--rollout-batch-sise.*--rollout-batch-size", {"rollout-batch-sise": 4}),
    "fipo with one update": Case(r"--num-updates-per-rollout is 1.*>= 2", {"num-updates-per-rollout": 1}),
    "not started by torchrun": Case(r"RANK and WORLD_SIZE are not set.*torchrun", env={}),
    "a rank that is no number": Case(r"RANK is 'x'.*whole number", env={"RANK": "x", "WORLD_SIZE": "1"}),
    "a rank too many": Case(r"RANK is 0.*less than WORLD_SIZE \(0\)", env={"RANK": "0", "WORLD_SIZE": "0"}),
    # the layout
    "tp that does not divide heads": Case(
        r"--tensor-model-parallel-size is 2.*9", {"tensor-model-parallel-size": 2}, TWO_RANKS
    ),
    "pp that does not divide layers": Case(
        r"--pipeline-model-parallel-size is 2.*3", {"pipeline-model-parallel-size": 2}, TWO_RANKS
    ),
    "a layout that does not divide the ranks": Case(
        r"--tensor-model-parallel-size x --pipeline-model-parallel-size.* is 3.*\(2\)",
        {"pipeline-model-parallel-size": 3},
        TWO_RANKS,
    ),
    "more ranks than samples per update": Case(
        r"--global-batch-size is 4.*\(8\)", env={"RANK": "0", "WORLD_SIZE": "8"}
    ),
    "cuda that is not there": Case(r"--device is 'cuda'.*no CUDA device", {"device": "cuda"}),
    # the checkpoint
    "no such checkpoint": Case(r"nowhere/config\.json", {"hf-checkpoint": "nowhere"}),
    "a checkpoint without config": Case(r"no_config/config\.json", {"hf-checkpoint": "no_config"}),
    "a config that is no json": Case(r"bad_config/config\.json", {"hf-checkpoint": "bad_config"}),
    "a checkpoint without weights": Case(r"no_weights.*model\.safetensors", {"hf-checkpoint": "no_weights"}),
    "a truncated checkpoint": Case(r"truncated/model\.safetensors", {"hf-checkpoint": "truncated"}),
    "a cut header": Case(r"cut_header/model\.safetensors", {"hf-checkpoint": "cut_header"}),
    "a config for other weights": Case(r"contradicts its config\.json.*mlp", {"hf-checkpoint": "other_config"}),
    "a config of more layers than tensors": Case(
        r"too_deep/config\.json: num_hidden_layers is 1000000000", {"hf-checkpoint": "too_deep"}
    ),
    "a checkpoint without tokenizer": Case(r"no_tokenizer.*tokenizer\.json", {"hf-checkpoint": "no_tokenizer"}),
    "a damaged tokenizer": Case(r"tokenizer.*bad_tokenizer", {"hf-checkpoint": "bad_tokenizer"}),
    "a flag that contradicts the checkpoint": Case(r"--num-layers.* 5.* 3", {"num-layers": 5}),
    "prompt and response beyond the context": Case(
        r"--rollout-max-prompt-len \+ --rollout-max-response-len is 136.*128.*config\.json",
        {"rollout-max-prompt-len": 128, "max-tokens-per-micro-batch": 256},
    ),
    # the data
    "an unknown task": Case(r"--task is 'chain_sums'.*did you mean 'chain_sum'", {"task": "chain_sums"}),
    "an unknown parameter of a task": Case(
        r"--task-args is \['max_trems'\].*max_terms", {"task": "chain_sum", "task-args": '{"max_trems": 3}'}
    ),
    "task parameters that are no json": Case(r"--task-args.*JSON", {"task": "chain_sum", "task-args": "max_terms=3"}),
    "a parameter that the task refuses": Case(
        r"--task-args.*chain_sum refuses", {"task": "chain_sum", "task-args": '{"min_terms": 9, "max_terms": 3}'}
    ),
    "a parameter that the task stumbles over": Case(
        r"--task-args is \{'max_terms': 3\.5\}.*chain_sum", {"task": "chain_sum", "task-args": '{"max_terms": 3.5}'}
    ),
    "a prompt longer than allowed": Case(
        r"96 of 96 prompts have more tokens than --rollout-max-prompt-len \(9\)", {"rollout-max-prompt-len": 9}
    ),
    "no such file": Case(r"--prompt-data is 'nothing\.jsonl'", from_file("nothing.jsonl")),
    "an empty file": Case(r"--prompt-data is 'empty\.jsonl'.*no problem", from_file("empty.jsonl")),
    "a malformed line": Case(r"malformed\.jsonl, line 2: not JSON", from_file("malformed.jsonl")),
    "a row without prompt": Case(r"no_prompt\.jsonl, line 1: --input-key is 'prompt'", from_file("no_prompt.jsonl")),
    "a line that is no object": Case(r"list\.jsonl, line 1: .*object", from_file("list.jsonl")),
    "a prompt of a file longer than allowed": Case(
        r"1 of 2 prompts .* --rollout-max-prompt-len \(64\).*long\.jsonl:2; raise it, or choose --on-long-prompt skip",
        from_file("long.jsonl"),
    ),
    "a training problem that is evaluated on": Case(
        r"--prompt-data good\.jsonl and the evaluation data set good must share no prompt",
        from_file("good.jsonl", **{"eval-prompt-data": "good.jsonl"}),
    ),
    # the reward
    "a file without reward": Case(r"prompts of a file need a reward", {"task": None, "prompt-data": "good.jsonl"}),
    "an unknown reward": Case(
        r"--rm-type is 'exakt'.*did you mean 'exact'", {**from_file("good.jsonl"), "rm-type": "exakt"}
    ),
    "a reward that is not there": Case(r"nowhere_module", {"custom-rm-path": "nowhere_module:f"}),
    "a reward whose module raises": Case(r"raising_module:f.*on purpose", {"custom-rm-path": "raising_module:f"}),
    "a reward that does not fail or drop": Case(r"--on-reward-error is 'skip'.*fail", {"on-reward-error": "skip"}),
    # the user's own functions
    "a loss that is not there": Case(
        r"--custom-loss-function-path is 'nowhere_module:f'.*not importable",
        {"custom-loss-function-path": "nowhere_module:f"},
    ),
    "a loss that is no function": Case(
        r"--custom-loss-function-path is 'no_path'.*module:function", {"custom-loss-function-path": "no_path"}
    ),
    # the recipe
    "evaluation sets of one name": Case(
        r"--eval-prompt-data.*good", from_file("other.jsonl", **{"eval-prompt-data": ["good.jsonl", "good=good.jsonl"]})
    ),
    "every prompt left out": Case(
        r"--rollout-max-prompt-len", from_file("good.jsonl", **{"on-long-prompt": "skip", "rollout-max-prompt-len": 2})
    ),
    "partial rollouts of batches that need all": Case(
        r"--over-sampling-batch-size is 4.*--partial-rollout-len", {"partial-rollout-len": 4}
    ),
    "older tokens corrected by nothing": Case(
        r"--partial-rollout-older-tokens is 'correct'.*--use-tis",
        {"partial-rollout-len": 4, "over-sampling-batch-size": 8, "partial-rollout-older-tokens": "correct"},
    ),
    "a bound without its correction": Case(r"--tis-clip is given.*--use-tis", {"tis-clip": 3}),
    "a negative weight of the KL term": Case(r"--kl-coef is -1", {"kl-coef": -1}),
    "a template without a place": Case(
        r"--prompt-template is 'Q:'.*\{prompt\}", from_file("good.jsonl", **{"prompt-template": "Q:"})
    ),
    "evaluation beyond the context": Case(
        r"--rollout-max-prompt-len \+ --eval-max-response-len is 164.*128", {"eval-max-response-len": 100}
    ),
    "a guard's unknown action": Case(
        r"--guard-noise-gauge is 'maybe'.*off, warn, stop", {"guard-noise-gauge": "maybe"}
    ),
    "wandb where it is not": Case(r"--wandb-project is 'p'.*pip install wandb", {"wandb-project": "p"}),
    # the directories
    "a directory that holds a run": Case(r"--output-dir is 'old_run'.*metrics\.jsonl", {"output-dir": "old_run"}),
    "no directory": Case(r"--output-dir is ''", {"output-dir": ""}),
    "a directory that is a file": Case(r"--output-dir is 'good\.jsonl'", {"output-dir": "good.jsonl"}),
    "an export over the model": Case(r"export directory.*started from", {"export-hf": "model"}),
    "an export over something else": Case(r"export directory.*old_run", {"export-hf": "old_run"}),
    "no checkpoint to resume from": Case(r"--load is 'nowhere'", {"load": "nowhere"}),
    "no recorded rollouts": Case(r"--replay-rollouts is 'nowhere'", {"replay-rollouts": "nowhere"}),
    # the engine
    "an engine that does not divide heads": Case(
        r"--rollout-num-gpus-per-engine is 2.*9", {"rollout-num-gpus-per-engine": 2}
    ),
    "an engine's option that is the run's": Case(r"--sglang-port", {"sglang-port": 1}),
}


def command_line(case: Case) -> list[str]:
    flags = {"hf-checkpoint": "model", **BASE, **case.flags}
    given = {flag: value if isinstance(value, list) else [value] for flag, value in flags.items() if value is not None}
    return [word for flag, values in given.items() for word in (f"--{flag}", *map(str, values))]


def make_inputs(directory: Path, model: Path) -> None:
    """Every file the cases name, made from a model that is right."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(model, directory / name))

    copy("model")
    (copy("no_config") / "config.json").unlink()
    (copy("bad_config") / "config.json").write_text("{")
    (copy("no_weights") / "model.safetensors").unlink()
    weights = (model / "model.safetensors").read_bytes()
    (copy("truncated") / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (copy("cut_header") / "model.safetensors").write_bytes(weights[:100])
    config = json.loads((model / "config.json").read_text())
    (copy("other_config") / "config.json").write_text(json.dumps({**config, "intermediate_size": 52}))
    (copy("too_deep") / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    for path in copy("no_tokenizer").glob("token*"):
        path.unlink()
    (copy("bad_tokenizer") / "tokenizer.json").write_text("{}")
    good = '{"prompt": "1 + 1 =", "label": "2"}\n'
    for name, text in {
        "good": good,
        "other": '{"prompt": "3 + 3 =", "label": "6"}\n',
        "empty": "\n",
        "malformed": good + '{"prompt": "2 + 2 =", "label"\n',
        "no_prompt": '{"question": "1 + 1 =", "label": "2"}\n',
        "list": "[1]\n",
        "long": good + json.dumps({"prompt": "long " * 40, "label": "2"}) + "\n",
    }.items():
        (directory / f"{name}.jsonl").write_text(text)
    (directory / "raising_module.py").write_text("raise RuntimeError('on purpose')\n")
    (directory / "old_run").mkdir()
    (directory / "old_run" / "metrics.jsonl").write_text('{"step": 1}\n')


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_chat_model: Path) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory, tiny_chat_model)
    return directory


@pytest.fixture(scope="module")
def answers(inputs: Path) -> dict[str, dict[str, Any]]:
    """What main() did in every case: its status, its stderr, and how long it took."""
    cases = [{"arguments": command_line(case), "env": case.env} for case in CASES.values()]
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=inputs,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(inputs), str(REPO_ROOT)])},
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(json.dumps(cases))
        process.stdin.close()
        found = {}
        last = time.monotonic()
        for name, line in zip(CASES, process.stdout):
            now = time.monotonic()
            found[name] = {**json.loads(line), "seconds": now - last}
            last = now
        rest = process.stderr.read()
        assert len(found) == len(CASES), f"{list(CASES)[len(found)]}: {rest[-3000:]}"
    assert rest == ""  # nothing besides what main() printed, grader processes included
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_told_in_one_line(name: str, answers: dict[str, dict[str, Any]]) -> None:
    answer = answers[name]
    assert answer["status"] == 2
    assert answer["stderr"].startswith("error: ")
    assert answer["stderr"].count("\n") == 1, answer["stderr"]
    assert re.search(CASES[name].wanted, answer["stderr"]), answer["stderr"]


def test_mistakes_are_found_without_megatron_and_without_a_trace(
    answers: dict[str, dict[str, Any]], inputs: Path
) -> None:
    assert not any(answer["megatron"] for answer in answers.values())
    assert not (inputs / "out").exists()


def test_mistakes_are_found_quickly(answers: dict[str, dict[str, Any]]) -> None:
    slowest = max(answers, key=lambda name: answers[name]["seconds"])
    assert answers[slowest]["seconds"] < 30, slowest  # a second on a quiet machine


@pytest.mark.parametrize(
    "case", [CASES["a malformed line"], CASES["a truncated checkpoint"]], ids=["found by rank 0", "found by all"]
)
def test_a_launched_run_ends_with_the_one_line(case: Case, inputs: Path, launch: Callable[[list[str]], Any]) -> None:
    command = launch(
        [
            *("-m", "megatron_fipo.launch", "--nproc-per-node", "2"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *("-m", "megatron_fipo.train"),
            *[str(inputs / word) if (inputs / word).exists() else word for word in command_line(case)],
        ]
    )
    assert command.wait(60) == 2
    assert command.stderr.startswith("error: ")
    assert command.stderr.count("\n") == 1, command.stderr
    assert re.search(case.wanted, command.stderr), command.stderr


@pytest.mark.parametrize("late_s", [0, 3], ids=["together", "the rank that speaks comes late"])
def test_the_line_is_there_once_whichever_rank_fails_first(
    late_s: int, tmp_path: Path, launch: Callable[[list[str]], Any]
) -> None:
    (tmp_path / "program.py").write_text(
        "import os, sys, time\n"
        "from megatron_fipo.train import main\n"
        f"time.sleep({late_s} if os.environ['RANK'] == '0' else 0)\n"
        "sys.exit(main(['--no-such-flag', '1']))\n"
    )
    command = launch(["-m", "megatron_fipo.launch", "--nproc-per-node", "2", "program.py"])
    assert command.wait(60) == 2
    assert command.stderr == "error: unknown flag --no-such-flag; see --help\n"
