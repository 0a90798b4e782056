"""A trainer's weights reach a real SGLang engine: over CUDA IPC on a GPU, through shared memory on a CPU.

    python tests/gpu/check_weight_sync.py [--fp8]

The engine's own checksums are compared with those foretold from what was sent, and the log-probs of what it then
generates with transformers'. With --fp8 it holds block-quantised weights (--rollout-fp8): on a GPU it
also generates.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checking import add_paths, arguments, require, require_modules, run_check

add_paths("tests", "tests/e2e")
SIZES: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 256},
    **{"bos_token_id": 1, "eos_token_id": 7, "tie_word_embeddings": False, "initializer_range": 0.1},
}
PROMPTS = ([5, 9, 200, 31], [11, 12, 13, 14, 15, 16, 17])
NEW_TOKENS = 8


def check(options: argparse.Namespace, device: torch.device) -> str:
    require_modules("transformers", "sglang")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megatron_fipo.rollout.server_process import start_engine
    from megatron_fipo.weights import fp8
    from megatron_fipo.weights.architecture import read_architecture

    is_cpu = device.type == "cpu"
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval().to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(f"{directory}/model")
        arch = read_architecture(f"{directory}/model")
        held = {**({"max_total_tokens": 2048} if is_cpu else {"mem_fraction_static": 0.3})}
        engine = start_engine(
            f"{directory}/model",
            name="check",
            dtype="bfloat16",
            tp_size=1,
            context_length=128,
            random_seed=0,
            log_path=f"{directory}/engine.log",
            start_timeout_s=600,
            request_timeout_s=300,
            server_args={**held, **(fp8.engine_arguments() if options.fp8 else {})},
            use_cpu=is_cpu,
            fp8=options.fp8 and not is_cpu,
        )
        try:
            engine.wait_ready()
            for version, scale in ((1, 1.0), (2, 1.25)):
                push(engine, arch, model.to(device), scale, version, options.fp8)
            worst = 0.0 if options.fp8 and is_cpu else compare_logprobs(engine, model, 1.25)
        except Exception:
            print(Path(directory, "engine.log").read_text()[-4000:], file=sys.stderr)
            raise
        finally:
            engine.shutdown()
    limit = 0.5 if options.fp8 else 0.1  # nats; bf16 and FP8 round
    require(worst <= limit, f"the engine's log-probs are {worst:.3f} off transformers', at most {limit} is right")
    return f"two updates as foretold, log-probs {worst:.3f} off transformers'"


def push(engine: Any, arch: Any, model: Any, scale: float, version: int, is_fp8: bool) -> None:
    """One update; raises CheckFailed where the engine then holds something else."""
    from megatron_fipo.hybrid.node_engines import first_difference
    from megatron_fipo.weights import fp8
    from megatron_fipo.weights.bucket import make_buckets
    from megatron_fipo.weights.engine_layout import expected_checksums

    def tensors() -> Any:
        for name, parameter in model.named_parameters():
            tensor = parameter.detach() * scale
            if is_fp8 and fp8.is_quantised(name):
                yield from zip((name, f"{name}_scale_inv"), fp8.quantise(tensor), strict=True)
            else:
                yield name, tensor

    def sent() -> Any:
        for bucket in make_buckets(tensors(), 400_000):
            engine.push_bucket(bucket)
            yield bucket

    engine.begin_weight_update()
    device_type = "cuda" if next(model.parameters()).is_cuda else "cpu"
    expected = expected_checksums(arch, sent(), tp_size=1, fp8=is_fp8, device_type=device_type)
    engine.end_weight_update(version)
    # in FP8 its kernels' own bytes may be listed as well
    difference = first_difference(expected, engine.weight_checksums(), expected_alone=is_fp8)
    require(difference is None, f"after update {version} {difference}")


def compare_logprobs(engine: Any, model: Any, scale: float) -> float:
    """The largest difference between log-probs of greedily drawn tokens, the engine's and transformers'."""
    from megatron_fipo.types import GenerateRequest, SamplingSettings

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    sampling = SamplingSettings(max_response_len=NEW_TOKENS)
    requests = [GenerateRequest(f"check/{i}", np.array(prompt), sampling, seed=i) for i, prompt in enumerate(PROMPTS)]
    completions = engine.generate(requests)
    worst = 0.0
    for prompt, completion in zip(PROMPTS, completions):
        tokens = torch.tensor([*prompt, *completion.token_ids], device=next(model.parameters()).device)
        with torch.no_grad():
            rows = model(tokens[None]).logits[0].float().log_softmax(-1)[len(prompt) - 1 : -1]
        wanted = rows.gather(1, tokens[len(prompt) :, None])[:, 0].cpu()
        worst = max(worst, float((wanted - torch.tensor(completion.logprobs)).abs().max()))
    return worst


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--fp8", action="store_true")
    sys.exit(run_check(check, parser.parse_args()))
