"""tools/evaluate.py on a real engine: killed twice it ends with the bytes of an undisturbed evaluation."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from actor_on_ranks import make_actor, make_groups
from processes import REPO_ROOT, run_ranks

from megatron_fipo.actor.checkpoint import save_checkpoint
from megatron_fipo.metrics.scores import avg_at_k, cons_at_k, pass_at_k
from megatron_fipo.trainer.evaluation_file import CHECKSUM, line_of

NUM_PROBLEMS, NUM_SAMPLES, BLOCK_SIZE = 24, 4, 4
REWARD = """
from megatron_fipo.types import RewardResult

def grade(response, ground_truth, **extra):
    score = float(len(response) % 2)
    return RewardResult(score, score, str(len(response) % 5))
"""
FLAGS = {
    "task": "small_arithmetic",
    "custom-rm-path": "own_reward:grade",
    "num-eval-problems": NUM_PROBLEMS,
    "n-samples-per-eval-prompt": NUM_SAMPLES,
    "eval-block-size": BLOCK_SIZE,
    "eval-temperature": 1.0,
    "eval-top-p": 0.9,
    "rollout-max-prompt-len": 64,
    "eval-max-response-len": 24,
}
Launch = Callable[[list[str]], Any]


def arguments(model: Path, output_dir: Path, **changed: Any) -> list[str]:
    flags = {**FLAGS, **{name.replace("_", "-"): value for name, value in changed.items()}}
    given = {"hf-checkpoint": model, "output-dir": output_dir, **flags}
    words = [word for flag, value in given.items() if value is not None for word in (f"--{flag}", str(value))]
    return [str(REPO_ROOT / "tools" / "evaluate.py"), *words]


def whole_blocks(output_dir: Path) -> int:
    path = output_dir / "responses.jsonl"
    return path.read_bytes().count(b"\n") // (BLOCK_SIZE * NUM_SAMPLES) if path.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_chat_model: Path) -> Path:
    """The output directory of an evaluation that nothing happened to."""
    directory = tmp_path_factory.mktemp("undisturbed")
    (directory / "own_reward.py").write_text(REWARD)
    finished = subprocess.run(
        [sys.executable, *arguments(tiny_chat_model, directory / "out")],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory)},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "24/24 problems, small_arithmetic: accuracy so far 0." in finished.stderr
    assert finished.stdout.startswith("small_arithmetic: avg@4 0.")
    return directory / "out"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/evaluate.py in this process, for what starts no engine."""
    spec = importlib.util.spec_from_file_location("evaluate_tool", REPO_ROOT / "tools" / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["evaluate_tool"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def the_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, without its `error: `."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_the_results_are_the_scores_of_the_responses(undisturbed: Path) -> None:
    lines = (undisturbed / "responses.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["sample"] for record in records] == list(range(NUM_SAMPLES)) * NUM_PROBLEMS
    rows = [records[start : start + NUM_SAMPLES] for start in range(0, len(records), NUM_SAMPLES)]
    correct = [[record["accuracy"] for record in row] for row in rows]
    answers = [[record["answer"] for record in row] for row in rows]
    results = json.loads((undisturbed / "results.json").read_text())
    (data_set,) = results["data_sets"]
    metrics = data_set["metrics"]
    assert 0.2 < results["summary"]["accuracy"] == metrics["avg@4"] == avg_at_k(correct) < 0.8
    assert metrics["pass@2"] == pass_at_k(correct, 2)
    assert metrics["cons@4"] == cons_at_k(answers, correct)
    assert 0 < metrics["pass@4/bootstrap_mean"] < metrics["pass@4"] == pass_at_k(correct, 4)
    assert [row["accuracy"] for row in data_set["problems"]] == [avg_at_k([row]) for row in correct]
    text = (undisturbed / "results.md").read_text()
    assert f"| 2 | {metrics['pass@2']:.4f} |" in text
    assert text.count("| small_arithmetic:") == NUM_PROBLEMS


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_bytes(
    undisturbed: Path, tiny_chat_model: Path, tmp_path: Path, launch: Launch
) -> None:
    (tmp_path / "own_reward.py").write_text(REWARD)
    output_dir = tmp_path / "out"
    command = launch(arguments(tiny_chat_model, output_dir))
    command.wait_for("the first block", lambda: whole_blocks(output_dir) >= 1, 240)
    os.kill(command.process.pid, signal.SIGTERM)
    assert command.wait(60) == 128 + signal.SIGTERM
    assert command.stderr.splitlines()[-1] == "interrupted by SIGTERM"
    first = whole_blocks(output_dir)
    assert 1 <= first < NUM_PROBLEMS // BLOCK_SIZE, "it ended before it was interrupted"

    with (output_dir / "responses.jsonl").open("ab") as file:
        file.write(b'{"data_set": "small_arithmetic", "probl')  # as a power cut leaves it
    command = launch(arguments(tiny_chat_model, output_dir))
    command.wait_for("another block", lambda: whole_blocks(output_dir) > first, 240)
    os.kill(command.process.pid, signal.SIGKILL)
    assert command.wait(60) == -signal.SIGKILL
    second = whole_blocks(output_dir)
    assert f"{first * BLOCK_SIZE} of {NUM_PROBLEMS} problems are answered already" in command.stderr

    command = launch(arguments(tiny_chat_model, output_dir))
    assert command.wait(300) == 0, command.stderr[-3000:]
    assert f"{second * BLOCK_SIZE} of {NUM_PROBLEMS} problems are answered already" in command.stderr
    for name in ("responses.jsonl", "evaluation_settings.json", "results.json", "results.md"):
        assert (output_dir / name).read_bytes() == (undisturbed / name).read_bytes(), name


def test_a_finished_evaluation_is_scored_again_without_an_engine(
    undisturbed: Path, tiny_chat_model: Path, tmp_path: Path, tool: ModuleType
) -> None:
    shutil.copytree(undisturbed, tmp_path / "out")
    (tmp_path / "out" / "results.json").unlink()
    (tmp_path / "out" / "engine-0.log").unlink()
    assert tool.main(arguments(tiny_chat_model, tmp_path / "out")[1:]) == 0
    assert (tmp_path / "out" / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()
    assert not (tmp_path / "out" / "engine-0.log").exists()


def save_as_checkpoint(model: str, root: str) -> None:
    """The model as a run saves it, in fp32."""
    actor = make_actor(model, *make_groups())
    actor.optimizer.step()  # of zero gradients: an optimizer is saved after its first step
    save_checkpoint(actor, root, 7, None)


def test_a_runs_checkpoint_answers_as_its_model(
    undisturbed: Path, tiny_chat_model: Path, tmp_path: Path, launch: Launch
) -> None:
    (tmp_path / "own_reward.py").write_text(REWARD)
    run_ranks(tmp_path, 1, save_as_checkpoint, {"model": str(tiny_chat_model), "root": str(tmp_path / "checkpoints")})
    base = tmp_path / "base"  # gives architecture and tokenizer; the weights can only come from the checkpoint
    shutil.copytree(tiny_chat_model, base, ignore=shutil.ignore_patterns("*.safetensors"))
    command = launch(arguments(base, tmp_path / "out", load=tmp_path / "checkpoints"))
    assert command.wait(300) == 0, command.stderr[-3000:]
    responses = (tmp_path / "out" / "responses.jsonl").read_bytes()
    assert responses == (undisturbed / "responses.jsonl").read_bytes()
    assert not (tmp_path / "out" / ".exported_weights").exists()
    assert "step_0000007" in (tmp_path / "out" / "results.md").read_text()


def test_a_wrong_flag_is_one_line_and_leaves_the_responses_alone(
    undisturbed: Path, tiny_chat_model: Path, launch: Launch
) -> None:
    before = (undisturbed / "responses.jsonl").read_bytes()
    command = launch(arguments(tiny_chat_model, undisturbed, eval_temperature=0.6))
    assert command.wait(120) == 2
    (line,) = command.stderr.splitlines()
    assert line.startswith(f"error: --output-dir {undisturbed} holds an evaluation with other settings: ")
    assert "--eval-temperature is 1.0 there and 0.6 here" in line
    assert (undisturbed / "responses.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 7}, "--seed is 1234 there and 7 here"),
        ({"eval_block_size": 6}, "--eval-block-size is 4 there and 6 here"),
        ({"num_eval_problems": 12}, "prompts of small_arithmetic (SHA-256) is"),
        ({"eval_temprature": 1}, "unknown flag --eval-temprature; did you mean --eval-temperature?"),
        ({"eval_max_response_len": 100}, "at most the checkpoint's context, 128 tokens"),
        ({"rollout_num_gpus_per_engine": 2}, "--rollout-num-gpus-per-engine is 2, but must be a divisor"),
        ({"load": "nowhere"}, "--load is 'nowhere', but holds no checkpoint"),
        ({"hf_checkpoint": "nowhere"}, "nowhere/config.json cannot be read"),
        ({"rollout_max_prompt_len": 3}, "tokens, but --rollout-max-prompt-len allows 3"),
    ],
)
def test_other_settings_and_what_cannot_be_are_named(
    undisturbed: Path,
    tiny_chat_model: Path,
    tool: ModuleType,
    changed: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tool.main(arguments(tiny_chat_model, undisturbed, **changed)[1:]) == 2
    assert message in the_line(capsys)


def test_responses_without_a_verdict_are_not_taken_over_where_that_is_an_error(
    undisturbed: Path, tiny_chat_model: Path, tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, tmp_path / "out")
    path = tmp_path / "out" / "responses.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    record = {name: value for name, value in json.loads(first).items() if name != CHECKSUM}
    path.write_bytes(b"".join([line_of({**record, "error": "timeout: no verdict"}), *rest]))
    words = arguments(tiny_chat_model, tmp_path / "out")[1:]
    assert tool.main(words) == 2
    assert "holds 1 responses without a verdict, the first: timeout: no verdict; take them over" in the_line(capsys)
    assert tool.main([*words, "--on-reward-error", "drop"]) == 0
    assert "WARNING: the reward gave no verdict on 1 responses" in capsys.readouterr().out


def test_other_weights_are_named(
    undisturbed: Path, tiny_chat_model: Path, tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_chat_model, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert tool.main(arguments(other, undisturbed)[1:]) == 2
    assert "model.safetensors (SHA-256) is" in the_line(capsys)
