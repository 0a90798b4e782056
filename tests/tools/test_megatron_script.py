"""The launch script that the guide makes of a pretraining script trains: on CPU ranks, with real engines, and
the sizes of a tiny model at the end of its command line."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from e2e.conftest import Launched, save_tiny_chat_model
from small_run import REWARD
from transformers import Qwen2Config, Qwen2ForCausalLM

RUN = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
NUM_STEPS = 2
SHAPE = {
    "--num-layers": 4,
    "--hidden-size": 36,
    "--ffn-hidden-size": 48,
    "--num-attention-heads": 6,
    "--num-query-groups": 2,
    "--max-position-embeddings": 256,
}
SIZES = {
    "--rollout-max-prompt-len": 32,
    "--rollout-max-response-len": 32,
    "--overlong-buffer-len": 4,
    "--rollout-batch-size": 4,
    "--n-samples-per-prompt": 4,
    "--num-updates-per-rollout": 2,
    "--global-batch-size": 8,
    "--train-iters": NUM_STEPS,
    "--lr-warmup-iters": 1,
    "--save-interval": 1,
    "--eval-interval": 1,
}


def save_tiny_qwen2(directory: Path) -> Path:
    """Qwen2.5-7B's own architecture, but for its sizes."""
    save_tiny_chat_model(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    qwen2 = Qwen2Config(
        vocab_size=config["vocab_size"],
        hidden_size=SHAPE["--hidden-size"],
        intermediate_size=SHAPE["--ffn-hidden-size"],
        num_hidden_layers=SHAPE["--num-layers"],
        num_attention_heads=SHAPE["--num-attention-heads"],
        num_key_value_heads=SHAPE["--num-query-groups"],
        max_position_embeddings=SHAPE["--max-position-embeddings"],
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        eos_token_id=config["eos_token_id"],
        bos_token_id=None,
    )
    Qwen2ForCausalLM(qwen2).save_pretrained(directory)
    return directory


def test_the_converted_script_trains(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_qwen2(tmp_path / "model")
    (tmp_path / "own_reward.py").write_text(REWARD)
    problems = [{"prompt": f"{i} + {i} = ", "answer": str(2 * i)} for i in range(40)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    text = (repo_root / "examples/megatron/fipo_qwen2.5_7b.sh").read_text(encoding="utf-8")
    assert text.count("--rm-type math_verify") == 1  # a model that answers noise has nothing right
    script = tmp_path / "fipo.sh"
    script.write_text(text.replace("--rm-type math_verify", "--custom-rm-path own_reward:grade"), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "GPUS_PER_NODE": "2",
        "TP_SIZE": "2",
        "MASTER_PORT": str(port),
        "OUTPUT_DIR": str(tmp_path / "out"),
    }.items():
        monkeypatch.setenv(name, value)
    tiny = [str(word) for item in {**SHAPE, **SIZES}.items() for word in item]
    places = [str(tmp_path / "ckpt"), str(tmp_path / "tb"), str(model), str(tmp_path / "problems.jsonl")]
    command = Launched(["-c", RUN, "bash", str(script), *places, *tiny, "--transformer-impl", "local"], tmp_path)
    try:
        assert command.wait(400) == 0, command.stderr[-3000:]
    finally:
        command.end()

    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert [(record["num_samples"], len(record["updates"])) for record in records] == [(16, 2), (16, 2)]
    assert all(0 < record["engine_mismatch/mean"] < 0.1 for record in records)  # bf16 as the script says
    assert records[-1]["lr"] == 1e-6
    assert (tmp_path / "ckpt/latest").exists()
    assert list((tmp_path / "tb").glob("events.out.tfevents.*"))
    notes = re.findall(r"(?m)^(--[a-z-]+).* has no effect: ", command.stderr)
    assert len(notes) == len(set(notes)) == 12  # said once, on one rank
    assert {"--lr-decay-style", "--overlap-param-gather", "--eval-iters"} <= set(notes)
    assert "may be empty" in command.stderr  # --load is --save: a first run begins anew
