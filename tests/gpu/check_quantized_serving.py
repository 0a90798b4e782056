"""Quantised checkpoints served by SGLang on a GPU, against modelopt's simulation of them.

    python tests/gpu/check_quantized_serving.py [--hf-checkpoint DIR] [--format fp8 int4-awq nvfp4]

Each format is made by tools/quantize.py's own code, an engine serves it, and its greedy answers to 96 problems of small
arithmetic must be right as often as the simulated model's, within 0.1. A format that this GPU has no kernels for is
left out and named.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from checking import MODEL, Skip, add_paths, arguments, require, require_model, require_modules, run_check

add_paths()
LEAST_CAPABILITY = {"fp8": (8, 9), "int4-awq": (8, 0), "nvfp4": (10, 0)}
RESPONSE_LEN = 8
TOLERANCE = 0.1


def check(options: argparse.Namespace, device: torch.device) -> str:
    require_modules("transformers", "sglang", "modelopt")
    if device.type == "cpu":
        raise Skip("SGLang has no kernels for quantised layers on a CPU; tests/tools/test_quantize.py loads them there")
    require_model(options.hf_checkpoint)
    from megatron_fipo.quantization.checkpoint import quantize_checkpoint, shown_progress
    from megatron_fipo.quantization.request import parse_request

    told, capability = [], torch.cuda.get_device_capability(device)
    for quant_format in options.format:
        if capability < LEAST_CAPABILITY[quant_format]:
            told.append(f"{quant_format}: left out, needs compute capability {LEAST_CAPABILITY[quant_format]}")
            continue
        with tempfile.TemporaryDirectory() as directory:
            save = Path(directory, "quantised")
            words = ["--hf-checkpoint", str(options.hf_checkpoint), "--save", str(save), "--format", quant_format]
            words += [
                "--task",
                "small_arithmetic",
                "--num-calibration-samples",
                "128",
                "--calibration-seq-length",
                "64",
            ]
            words += ["--calibration-response-len", "8", "--eval-max-response-len", str(RESPONSE_LEN)]
            request = parse_request(words)
            print("\n".join(quantize_checkpoint(request, shown_progress)), flush=True)
            simulated = json.loads((save / "quantization_report.json").read_text())["accuracy_after"][
                "small_arithmetic"
            ]
            served = served_accuracy(request, save, Path(directory, "engine.log"))
        told.append(f"{quant_format}: {served:.3f} served, {simulated:.3f} simulated")
        require(abs(served - simulated) <= TOLERANCE, "; ".join(told))
    require(any("served" in line for line in told), "; ".join(told))
    return "; ".join(told)


def served_accuracy(request, save: Path, log: Path) -> float:
    """The share of right greedy answers of an engine that serves `save`."""
    from megatron_fipo.data.tokenizer import load_tokenizer
    from megatron_fipo.quantization.checkpoint import read_prompts
    from megatron_fipo.rewards import GraderPool, reward_name
    from megatron_fipo.rollout.server_process import start_engine
    from megatron_fipo.trainer.evaluation import answer_problems, evaluation_result
    from megatron_fipo.types import SamplingSettings
    from megatron_fipo.weights.architecture import read_architecture

    tokenizer = load_tokenizer(str(save))
    prompts = read_prompts(request, read_architecture(request.hf_checkpoint), tokenizer).evaluation["small_arithmetic"]
    engine = start_engine(
        str(save),
        name="quantised",
        dtype="bfloat16",
        tp_size=1,
        context_length=256,
        random_seed=0,
        log_path=str(log),
        start_timeout_s=1200,
        request_timeout_s=600,
        server_args={"mem_fraction_static": 0.5},
        use_cpu=False,
    )
    try:
        engine.wait_ready()
        with GraderPool(reward_name(request.data), timeout_s=10, memory_bytes=2**30) as graders:
            problems = answer_problems(
                prompts,
                engine.generate,
                tokenizer,
                graders.grade,
                sampling=SamplingSettings(RESPONSE_LEN, temperature=0.0),
                n_samples=1,
                seed=1,
                on_reward_error="fail",
            )
    except Exception:
        print(log.read_text(errors="replace")[-6000:], file=sys.stderr)
        raise
    finally:
        engine.shutdown()
    return evaluation_result("small_arithmetic", problems, 1).accuracy


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--hf-checkpoint", type=Path, default=MODEL)
    parser.add_argument("--format", nargs="+", choices=tuple(LEAST_CAPABILITY), default=tuple(LEAST_CAPABILITY))
    sys.exit(run_check(check, parser.parse_args()))
