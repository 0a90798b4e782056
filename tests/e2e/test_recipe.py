"""What the recipe adds to the plain loop, in one run of the real program: the user's own generation, loss and reward,
responses that a grader fails on, prompts left out, two evaluation sets, and a guard that ends the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import RankOutput, run_command_on_ranks

NUM_STEPS = 2
OWN = """
import dataclasses

import numpy as np

from megatron_fipo.losses import LOSSES
from megatron_fipo.types import RewardResult

TOOL = "<<tool>>"


def grade(response, ground_truth, **extra):
    if len(response) % 5 == 0:
        raise RuntimeError("no verdict on this one")
    score = float(len(response) % 2)
    return RewardResult(score, score, response[:1] or None)


async def with_tool(requests, generate, tokenizer):
    # half of the length, a tool's words, the other half
    first = [
        dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, max_response_len=6)) for r in requests
    ]
    begun = await generate(first)
    words = np.array(tokenizer.encode(TOOL), dtype=np.int64)
    second = [
        dataclasses.replace(
            r,
            prompt_ids=np.concatenate([r.prompt_ids, c.token_ids, words]),
            sampling=dataclasses.replace(r.sampling, max_response_len=5),
        )
        for r, c in zip(requests, begun)
    ]
    ended = await generate(second)
    return [
        dataclasses.replace(
            e,
            token_ids=np.concatenate([c.token_ids, words, e.token_ids]),
            logprobs=np.concatenate([c.logprobs, np.zeros(len(words), np.float32), e.logprobs]),
            loss_mask=np.repeat([True, False, True], [len(c.token_ids), len(words), len(e.token_ids)]),
        )
        for c, e in zip(begun, ended)
    ]


def half_loss(*args, **kwargs):
    loss, info = LOSSES["fipo"](*args, **kwargs)
    info["token_stats"]["loss_sum"] = info["token_stats"]["loss_sum"] / 2
    return loss / 2, info
"""
PROBLEMS = [{"prompt": f"{i} + {i} = ", "label": str(2 * i)} for i in range(40)]
TOO_LONG = [{"prompt": f"{i} " * 40, "label": "0"} for i in range(3)]


def run(directory: Path, model: Path, *switches: str, **more: Any) -> list[RankOutput]:
    (directory / "own.py").write_text(OWN)
    files = {"problems": PROBLEMS[:-6] + TOO_LONG, "first": PROBLEMS[-6:-3], "second": PROBLEMS[-3:]}
    for name, problems in files.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    flags = {
        "hf-checkpoint": model,
        "prompt-data": "problems.jsonl",
        "on-long-prompt": "skip",
        "custom-rm-path": "own:grade",
        "on-reward-error": "drop",
        "rollout-batch-size": 4,
        "over-sampling-batch-size": 8,
        "n-samples-per-prompt": 4,
        "num-updates-per-rollout": 2,
        "rollout-max-prompt-len": 32,
        "rollout-max-response-len": 24,
        "max-tokens-per-micro-batch": 128,
        "overlong-buffer-len": 4,
        "lr": 1e-3,
        "lr-warmup-iters": 0,
        "train-iters": NUM_STEPS,
        "output-dir": "out",
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    command = ["-m", "megatron_fipo.train", *words, *switches]
    return run_command_on_ranks(directory, 1, command, 200.0, env={"TORCHDYNAMO_DISABLE": "1"})


def records(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "out" / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_chat_model: Path) -> Path:
    """The directory of a run with everything of the user's own."""
    directory = tmp_path_factory.mktemp("recipe")
    own = {"custom_generate_function_path": "own:with_tool", "custom_loss_function_path": "own:half_loss"}
    switches = ["--eval-prompt-data", "one=first.jsonl", "two=second.jsonl", "--n-samples-per-eval-prompt", "4"]
    (output,) = run(
        directory, tiny_chat_model, *switches, "--eval-temperature", "1", "--use-tis", "--kl-coef", "0.1", **own
    )
    assert output.returncode == 0, output.output[-3000:]
    return directory


def test_the_users_own_functions_are_what_runs(finished: Path) -> None:
    steps = records(finished, "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["response_length/max"] <= 24
        num_drawn = sum(update["num_kept"] for update in step["updates"])
        # eight bytes of the tool in each of 16 responses carry no loss
        assert num_drawn <= step["response_length/mean"] * step["num_samples"] - 8 * (16 - step["num_reward_errors"])
        assert step["noise_gauge"] == 0.0
    texts = [sample for sample in records(finished, "samples.jsonl") if "kind" not in sample]
    assert texts
    assert all("<<tool>>" in sample["response"] for sample in texts)


def test_what_was_left_out_is_counted(finished: Path) -> None:
    steps = records(finished, "metrics.jsonl")
    assert sum(step["num_reward_errors"] for step in steps) > 0
    assert all(step["num_prompts_skipped"] <= len(TOO_LONG) for step in steps)
    assert all(step["num_samples"] == 16 for step in steps)


def test_corrections_and_the_distance_to_the_initial_weights_are_logged(finished: Path) -> None:
    first, second = records(finished, "metrics.jsonl")
    assert first["updates"][0]["kl_loss"] == 0.0
    assert second["updates"][0]["kl_loss"] > 0
    assert first["tis/mean"] == pytest.approx(1.0, abs=1e-3)


def test_every_evaluation_set_has_its_figures_and_its_table(finished: Path) -> None:
    for record in records(finished, "evaluations.jsonl"):
        assert {"one/avg@4", "two/avg@4", "one/pass@4", "two/cons@4"} <= record.keys()
        assert record["accuracy"] == pytest.approx((record["one/avg@4"] + record["two/avg@4"]) / 2)
    tables = sorted(path.name for path in (finished / "out" / "evaluations").iterdir())
    assert tables == [f"step_{step:06d}_{name}.md" for step in (0, NUM_STEPS) for name in ("one", "two")]


def test_the_settings_are_kept_with_the_run(finished: Path) -> None:
    config = json.loads((finished / "out" / "config.json").read_text())
    assert config["correction.kl_coef"] == 0.1
    assert config["loss.half_life"] == 32.0


def test_a_guard_ends_the_run_by_name(tmp_path: Path, tiny_chat_model: Path) -> None:
    (output,) = run(tmp_path, tiny_chat_model, "--entropy-floor", "100", guard_entropy_collapse="stop")
    assert output.returncode == 1
    line = output.stderr.strip().splitlines()[-1]
    assert line.startswith("error: step 1: entropy_collapse: ")
    assert "--entropy-floor is 100" in line
    assert len(records(tmp_path, "metrics.jsonl")) == 1
