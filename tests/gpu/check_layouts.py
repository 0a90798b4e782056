"""The actor over several ranks: every layout gives the log-probs of Hugging Face transformers, over NCCL.

    python tests/gpu/check_layouts.py [--num-ranks N]

Starts torchrun for each layout, with check_actor.py on every rank. Without --num-ranks as many ranks as there are GPUs,
at most 4; with --device cpu 2, over gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from checking import ROOT, CheckFailed, Skip, arguments, require_gpus, require_modules, run_check

LAYOUTS: dict[int, tuple[list[str], ...]] = {
    1: ([],),
    2: (["tp=2", "sp=1"], ["pp=2"], ["pp=2", "vpp=2"], ["cp=2"], []),
    4: (["tp=2", "pp=2"], ["cp=2", "tp=2", "sp=1"], ["pp=4"], ["pp=2", "vpp=2"], ["tp=2", "sp=1"], []),
}
OF_EXPERTS: dict[int, tuple[list[str], ...]] = {
    1: ([],),
    2: (["ep=2"], ["tp=2", "sp=1"]),
    4: (["ep=4"], ["ep=2", "tp=2", "sp=1"], ["ep=2", "pp=2"]),
}


def check(options: argparse.Namespace, device: torch.device) -> str:
    require_modules("transformers", "megatron.core")
    require_gpus(device, options.num_ranks or 2)
    available = torch.cuda.device_count() if device.type == "cuda" else 2
    num_ranks = options.num_ranks or (4 if available >= 4 else 2)
    table = OF_EXPERTS if options.family == "qwen3_moe" else LAYOUTS
    norms = {}
    for layout in table[num_ranks]:
        name = " ".join(layout) or f"dp={num_ranks}"
        norms[name] = run_ranks(layout, num_ranks, options)
    reference = next(iter(norms.values()))
    tolerance = 0.03 if in_bf16(options) else 1e-3
    if any(abs(norm - reference) > tolerance * reference for norm in norms.values()):
        raise CheckFailed(f"gradient norms differ between layouts: {norms}")
    return f"{', '.join(norms)}: gradient norm {reference:.5f}"


def in_bf16(options: argparse.Namespace) -> bool:
    """Transformer Engine's context-parallel attention wants it; experts are chosen otherwise after rounding."""
    return options.transformer_impl == "transformer_engine" and options.family != "qwen3_moe"


def run_ranks(layout: list[str], num_ranks: int, options: argparse.Namespace) -> float:
    """The gradient norm that rank 0 found. Raises CheckFailed with the last words of a rank that failed, Skip where all
    of them lack something."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    launch += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        str(Path(__file__).with_name("check_actor.py")),
    ]
    flags = ["--device", options.device, "--transformer-impl", options.transformer_impl]
    flags += ["--family", options.family, *(["--bf16"] if in_bf16(options) else []), "--layout", *layout]
    done = subprocess.run(
        [*launch, *flags], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False, timeout=900
    )
    print(done.stderr[-4000:], file=sys.stderr)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"result"')]
    norms = [
        float(each["reason"].rpartition("gradient norm ")[2]) for each in found if "gradient norm" in each["reason"]
    ]
    if done.returncode or len(norms) != 1:
        if found and all(each["result"] == "skipped" for each in found):
            raise Skip(found[0]["reason"])
        words = [each["reason"] for each in found if each["result"] == "failed"] or [done.stderr[-300:]]
        raise CheckFailed(f"{' '.join(layout) or 'dp'}: {words[0]}")
    return norms[0]


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--num-ranks", type=int, choices=tuple(LAYOUTS))
    parser.add_argument("--transformer-impl", choices=("local", "transformer_engine"), default="local")
    parser.add_argument("--family", default="qwen2", choices=("qwen2", "qwen3", "llama", "qwen3_moe"))
    sys.exit(run_check(check, parser.parse_args()))
