"""tools/plan.py as it is started, and its cache of keys and values against SGLang's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sglang_cache
from sglang_cache import NUM_TOKENS

from megatron_fipo.planning.engines import Engine, token_bytes
from megatron_fipo.weights.architecture import read_architecture

MODELS = Path(__file__).resolve().parents[1] / "unit/recipe_models"
LAYOUT = (
    "--tensor-model-parallel-size",
    "4",
    "--sequence-parallel",
    "--max-tokens-per-micro-batch",
    "12288",
    "--sglang-mem-fraction-static",
    "0.7",
)
SEVEN_B = ("--hf-checkpoint", str(MODELS / "Qwen2.5-Math-7B-32k"), "--bf16", "--rollout-max-response-len", "10240")


def run_tool(repo_root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo_root / "tools/plan.py"), *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def test_the_cache_takes_what_sglangs_pool_takes() -> None:
    wanted = [("Qwen2.5-32B", 4), ("Qwen2.5-32B", 16), ("Qwen3-30B-A3B", 2), ("SmolLM2-135M-Instruct", 1)]
    told = json.dumps([(str(MODELS / model), tp) for model, tp in wanted])
    printed = subprocess.run(
        [sys.executable, str(sglang_cache.__file__), told], capture_output=True, text=True, timeout=300, check=True
    )
    for (model, tp), size_bytes in zip(wanted, json.loads(printed.stdout.splitlines()[-1]), strict=True):
        engine = Engine(
            arch=read_architecture(MODELS / model),
            tp=tp,
            dtype_bytes=2,
            is_fp8=False,
            cache_bytes=2.0,
            fraction=None,
            max_total_tokens=None,
            longest=1,
        )
        assert token_bytes(engine) * (NUM_TOKENS + 1) == size_bytes  # a slot is for padding


def test_a_layout_that_fits_ends_well_and_in_json_says_the_same(repo_root: Path) -> None:
    shown = run_tool(repo_root, *SEVEN_B, *LAYOUT)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.splitlines()[-1] == "fits"
    values = json.loads(run_tool(repo_root, *SEVEN_B, *LAYOUT, "--json").stdout)
    assert values["fits"]
    assert values["layout"]["tp"] == 4
    assert f"{values['turns']['training']['all'] / 2**30:.2f}" in shown.stdout


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ((*LAYOUT, "--gpu-memory-gib", "40"), 1, "does not fit: training takes"),
        (("--num-gpus", "1", "--gpu-memory-gib", "24"), 1, "0 layouts fit"),
    ],
)
def test_what_does_not_fit_is_status_1(repo_root: Path, words: tuple[str, ...], status: int, said: str) -> None:
    shown = run_tool(repo_root, *SEVEN_B, *words)
    assert shown.returncode == status
    assert said in shown.stdout


def test_wrong_flags_are_one_line_and_status_2(repo_root: Path) -> None:
    shown = run_tool(repo_root, *SEVEN_B, "--tensor-model-parallel-size", "3")
    assert shown.returncode == 2
    assert shown.stdout == ""
    (line,) = shown.stderr.splitlines()
    assert line.startswith("error: --tensor-model-parallel-size")
