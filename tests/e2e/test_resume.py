"""A run that ends and is resumed writes the records of one that was never disturbed, generation included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from processes import RankOutput, run_command_on_ranks

NUM_STEPS, SAVED_STEP = 4, 2
PROBLEMS = [{"prompt": f"{i} + {i} = ", "label": str(2 * i)} for i in range(40)]
REWARD = """
from megatron_fipo.types import RewardResult

def grade(response, ground_truth, **extra):
    score = float(len(response) % 2)
    return RewardResult(score, score, response)
"""
NOT_REPEATED = ("time/", "tokens_per_s", "memory")  # in the names of what depends on the machine's mood


def train(directory: Path, model: Path, **more: Any) -> list[RankOutput]:
    """Run the program on two data-parallel ranks with small batches, groups left over, and evaluations."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "own_reward.py").write_text(REWARD)
    for name, problems in (("problems", PROBLEMS[:-4]), ("held_out", PROBLEMS[-4:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    flags = {
        "hf-checkpoint": model,
        "prompt-data": "problems.jsonl",
        "eval-prompt-data": "held_out.jsonl",
        "eval-interval": 3,
        "custom-rm-path": "own_reward:grade",
        "rollout-batch-size": 4,
        "over-sampling-batch-size": 6,
        "n-samples-per-prompt": 4,
        "num-updates-per-rollout": 2,
        "rollout-max-prompt-len": 32,
        "rollout-max-response-len": 24,
        "max-tokens-per-micro-batch": 128,
        "overlong-buffer-len": 4,
        "partial-rollout-len": 9,
        "partial-rollout-older-tokens": "correct",
        "kl-coef": 0.01,
        "lr": 1e-3,
        "lr-warmup-iters": 6,
        "train-iters": NUM_STEPS,
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    command = ["-m", "megatron_fipo.train", "--bf16", "--use-tis", *words]
    return run_command_on_ranks(directory, 2, command, 240.0, env={"TORCHDYNAMO_DISABLE": "1"})


def assert_finished(outputs: list[RankOutput]) -> None:
    for output in outputs:
        assert output.returncode == 0, output.output[-3000:]


def records(output_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The records of a run without what no run repeats."""
    lines = (output_dir / name).read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not any(part in key for part in NOT_REPEATED)}
        for line in lines
    ]


def changes(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> list[str]:
    """What differs between two lists of records, as text."""
    lines = [] if len(found) == len(wanted) else [f"{len(found)} records, but {len(wanted)} wanted"]
    for ours, theirs in zip(found, wanted):
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                lines.append(f"step {theirs['step']}: {name} is {ours.get(name)}, not {theirs.get(name)}")
    return lines


@pytest.fixture(scope="module")
def stopping_model(tmp_path_factory: pytest.TempPathFactory, tiny_chat_model: Path) -> Path:
    """The tiny model, whose turn ends at any capital letter too: its responses differ in length."""
    directory = tmp_path_factory.mktemp("stopping") / "model"
    shutil.copytree(tiny_chat_model, directory)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    ends = [tokenizer["model"]["vocab"][letter] for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    for name in ("config.json", "generation_config.json"):
        config = json.loads((directory / name).read_text())
        config["eos_token_id"] = [config["eos_token_id"], *ends]
        (directory / name).write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, stopping_model: Path) -> Path:
    """The directory of a run of NUM_STEPS steps: out/, checkpoints/, rollouts/; and `saved/`, as it stood half-way."""
    directory = tmp_path_factory.mktemp("undisturbed")
    flags = {"save": "checkpoints", "save_interval": SAVED_STEP, "record_rollouts": "rollouts", "output_dir": "out"}
    assert_finished(train(directory, stopping_model, **flags))
    name = f"step_{SAVED_STEP:07d}"
    shutil.copytree(directory / "checkpoints" / name, directory / "saved" / name)
    (directory / "saved" / "latest").write_text(name)
    return directory


def test_the_undisturbed_run_is_worth_comparing(undisturbed: Path) -> None:
    steps = records(undisturbed / "out")
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(step["grad_norm"] > 0 for step in steps)
    assert steps[0]["lr"] < steps[1]["lr"] < steps[3]["lr"] == 1e-3
    saved = json.loads((undisturbed / "saved" / "step_0000002" / "run_state.json").read_text())
    waiting = saved["trainer"]["collector"]["waiting"]
    assert any("group" in entry for entry in waiting), "no group was left over at the checkpoint"
    assert any("unfinished" in entry for entry in waiting), "no response was unfinished at the checkpoint"
    assert (undisturbed / "checkpoints" / "latest").read_text() == "step_0000004"


def test_a_resumed_run_repeats_generation_and_training_bit_for_bit(
    undisturbed: Path, stopping_model: Path, tmp_path: Path
) -> None:
    flags = {"load": undisturbed / "saved", "save": "checkpoints", "output_dir": "out"}
    assert_finished(train(tmp_path, stopping_model, **flags))
    assert changes(records(tmp_path / "out"), records(undisturbed / "out")[SAVED_STEP:]) == []
    wanted = [record for record in records(undisturbed / "out", "evaluations.jsonl") if record["step"] > SAVED_STEP]
    assert [record["step"] for record in wanted] == [3, 4]
    assert changes(records(tmp_path / "out", "evaluations.jsonl"), wanted) == []
    texts = [record for record in records(undisturbed / "out", "samples.jsonl") if record["step"] > SAVED_STEP]
    assert changes(records(tmp_path / "out", "samples.jsonl"), texts) == []
    manifests = [
        json.loads((root / "checkpoints" / "step_0000004" / "manifest.json").read_text())["files"]
        for root in (tmp_path, undisturbed)
    ]
    shards = [{name: entry for name, entry in files.items() if name.endswith(".distcp")} for files in manifests]
    assert shards[0]
    assert shards[0] == shards[1]


def test_a_run_resumed_in_its_own_directory_drops_what_came_after_the_checkpoint(
    undisturbed: Path, stopping_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed / "out", tmp_path / "out")
    recorded = undisturbed / "rollouts"
    flags = {"load": undisturbed / "saved", "replay_rollouts": recorded, "output_dir": "out"}
    assert_finished(train(tmp_path, stopping_model, **flags))
    assert changes(records(tmp_path / "out"), records(undisturbed / "out")) == []


def test_recorded_rollouts_train_alike_when_sequences_are_cut_and_logits_chunked(
    undisturbed: Path, stopping_model: Path, tmp_path: Path
) -> None:
    flags = {"context_parallel_size": 2, "log_probs_chunk_size": 7, "output_dir": "out", "train_iters": 2}
    assert_finished(train(tmp_path, stopping_model, replay_rollouts=undisturbed / "rollouts", **flags))
    for found, wanted in zip(records(tmp_path / "out"), records(undisturbed / "out")[:2], strict=True):
        assert found["num_tokens"] == wanted["num_tokens"]
        assert found["noise_gauge"] == wanted["noise_gauge"] == 0.0
        for ours, theirs in zip(found["updates"], wanted["updates"], strict=True):
            assert ours["num_kept"] == theirs["num_kept"]
            for name in ("pg_loss", "grad_norm", "influence_weights_mean", "entropy"):
                if name in theirs:  # bf16
                    assert ours[name] == pytest.approx(theirs[name], rel=0.03, abs=2e-3), name


def test_a_damaged_checkpoint_is_one_line_and_leaves_the_records_alone(
    undisturbed: Path, stopping_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed / "saved", tmp_path / "saved")
    shutil.copytree(undisturbed / "out", tmp_path / "out")
    (shard, *_) = sorted((tmp_path / "saved" / "step_0000002").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    outputs = train(tmp_path, stopping_model, load=tmp_path / "saved", output_dir="out")
    assert [output.returncode for output in outputs] == [2, 2]
    (line,) = outputs[0].stderr.strip().splitlines()
    assert line.startswith(f"error: {shard} has ")
    assert "Traceback" not in outputs[1].output
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before
