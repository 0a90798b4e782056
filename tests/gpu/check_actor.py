"""The Megatron actor on a device against Hugging Face transformers, and an update of it.

    python tests/gpu/check_actor.py --transformer-impl local|transformer_engine [--fp8-recipe NAME] [--layout tp=2]

Log-probs, in fp32 unless --bf16 or a recipe is given, against transformers' in fp32 of the same weights; then an update
from the actor's own old log-probs, where the ratio must be 1 everywhere, and another one; the log-probs move, and stay
finite. With a layout it is one rank of several (torchrun).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checking import Skip, add_paths, arguments, exact_fp32, require, require_close, require_modules, run_check

add_paths("tests", "tests/distributed")
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
OF_FAMILY: dict[str, dict[str, int]] = {  # what packed attention and grouped kernels take
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {"head_dim": 64, "moe_intermediate_size": 128},
}
NUM_SEQUENCES = 16
TOLERANCE = {"fp32": 2e-5, "bf16": 0.01, "fp8": 0.12, "fp4": 0.6}  # fp32: of the largest log-prob; else on average


def check(options: argparse.Namespace, device: torch.device) -> str:
    require_modules("transformers", "megatron.core", "safetensors")
    if options.transformer_impl == "transformer_engine":
        require_modules("transformer_engine")
    from tiny_models import hf_logprobs, make_model, make_sequences

    transformer = fields_of(options, device)
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(options.family, tied=options.family == "qwen2", **SIZES, **OF_FAMILY.get(options.family, {}))
        model.save_pretrained(directory)  # before the process group is there: after it, only its first rank would save
        layout, groups = join(options.layout, device)
        actor = build(directory, layout, groups, device, options, transformer)
        sequences = make_sequences(NUM_SEQUENCES)
        mine = [sequences[i] for i in range(layout.dp_rank, NUM_SEQUENCES, layout.dp)]
        old, _ = actor.old_logprobs([mine])
        kind = "fp4" if "fp4" in transformer else "fp8" if options.fp8_recipe else "bf16" if options.bf16 else "fp32"
        worst = 0.0
        if layout.is_last_stage:
            wanted = torch.cat([hf_logprobs(model, sequence).detach() for sequence in mine])
            worst = compare(torch.cat(old).cpu(), wanted, kind)
        again, _ = actor.old_logprobs([mine])
        require(all(torch.equal(a, b) for a, b in zip(old, again)), "the same pass twice gives other log-probs")
        metrics = [step(actor, mine, old, layout) for _ in range(2)]
        found = metrics[0] or {}
        if layout.rank == 0:
            spread = found["future_kl_std"]  # the noise gauge
            require(
                spread == 0.0, f"Future-KL spreads by {spread} in the first update: its forward is not the old pass's"
            )
        after, _ = actor.old_logprobs([mine])
        if layout.is_last_stage:
            require(bool(torch.isfinite(torch.cat(after)).all()), "a log-prob is not finite after an update")
            moved = float((torch.cat(after) - torch.cat(old)).abs().max())
            require(moved > 1e-4, f"two updates moved the log-probs by {moved} at most")
        norm = f", gradient norm {found['grad_norm']:.5f}" if found else ""
        return f"log-probs off by {worst:.1e}, first update at ratio 1{norm}"


def compare(found: torch.Tensor, wanted: torch.Tensor, kind: str) -> float:
    """How far log-probs are off; in low precision on average, as a single token may be off by a lot."""
    if kind == "fp32":
        return require_close(found, wanted, TOLERANCE[kind], "log-probs")
    off = float((found - wanted).abs().mean() / wanted.abs().mean())
    require(off <= TOLERANCE[kind], f"log-probs are off by {off:.3f} on average, at most {TOLERANCE[kind]} is right")
    return off


def fields_of(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """TransformerConfig's fields. Raises Skip where the machine cannot follow, by the product's own checks."""
    from megatron_fipo.gpu_packages import RECIPES, find_packages

    fields: dict[str, Any] = {
        name: json.loads(value) for name, _, value in (each.partition("=") for each in getattr(options, "field", []))
    }
    if options.transformer_impl == "local":
        fields["gradient_accumulation_fusion"] = False
    if options.fp8_recipe:
        fields |= {"fp8": "hybrid" if options.fp8_recipe in ("delayed", "tensorwise") else "e4m3"}
        fields["fp8_recipe"] = options.fp8_recipe
        if device.type == "cuda":
            capability, needs = torch.cuda.get_device_capability(device), RECIPES[options.fp8_recipe]
            if capability < needs.least or (needs.below is not None and capability >= needs.below):
                raise Skip(f"{options.fp8_recipe} needs {needs.gpus}, this is {torch.cuda.get_device_name(device)}")
            machine = find_packages(capability, torch.version.cuda)
            if needs.cuda is not None and (machine.cuda is None or machine.cuda < needs.cuda):
                raise Skip(f"{options.fp8_recipe} needs CUDA {needs.cuda[0]}.{needs.cuda[1]}, torch has {machine.cuda}")
    return fields


def join(sizes: list[str], device: torch.device) -> tuple[Any, Any]:
    """The process group (of one, unless torchrun started several), and Megatron's."""
    from megatron_fipo.actor.setup import initialize_distributed, initialize_model_parallel
    from megatron_fipo.parallel import ParallelLayout

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if "MASTER_ADDR" not in os.environ:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    values = {name: int(size) for name, _, size in (each.partition("=") for each in sizes)}
    layout = ParallelLayout.for_world(world, rank, sequence_parallel=bool(values.pop("sp", 0)), **values)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        from megatron_fipo.patches.megatron_cpu import apply_patches

        apply_patches()
    if world == 1:
        store = dist.HashStore()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    else:
        initialize_distributed(layout, device, timeout_minutes=5)
    return layout, initialize_model_parallel(layout, seed=1, timeout_minutes=5)


def build(
    directory: str, layout: Any, groups: Any, device: torch.device, options: argparse.Namespace, fields: dict[str, Any]
) -> Any:
    from megatron_fipo.actor.actor import build_actor
    from megatron_fipo.weights.architecture import read_architecture
    from megatron_fipo.weights.hf_files import HFWeights

    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        torch.backends.cuda.matmul.allow_tf32 = False
    return build_actor(
        read_architecture(Path(directory)),
        HFWeights(directory),
        layout,
        groups,
        params_dtype=torch.bfloat16 if options.bf16 or options.fp8_recipe else torch.float32,
        device=device,
        transformer_impl=options.transformer_impl,
        transformer=fields,
        ddp={},
        optimizer={"lr": 1e-3, "weight_decay": 0.0, "clip_grad": 1.0},
        lr_warmup_iters=0,
        max_tokens_per_micro_batch=256,
        max_response_len=32,
    )


def step(actor: Any, sequences: list[Any], old: list[torch.Tensor], layout: Any) -> dict[str, Any] | None:
    """One update; its metrics on rank 0."""
    from megatron_fipo.config import FIPOSettings

    metrics = actor.update(sequences, old, algorithm="fipo", settings=FIPOSettings())
    require(layout.rank != 0 or metrics["skipped"] == 0.0, f"the update was skipped: {metrics}")
    return metrics


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--transformer-impl", choices=("local", "transformer_engine"), default="local")
    parser.add_argument("--fp8-recipe", choices=("delayed", "tensorwise", "blockwise", "mxfp8"))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--family", default="qwen2", choices=("qwen2", "qwen3", "llama", "qwen3_moe"))
    parser.add_argument("--field", nargs="*", default=[], help="of TransformerConfig: moe_grouped_gemm=true")
    parser.add_argument("--layout", nargs="*", default=[], help="such as tp=2 sp=1; the rest of the ranks is dp")
    chosen = parser.parse_args()
    if not (chosen.bf16 or chosen.fp8_recipe):
        exact_fp32(os.environ)
    sys.exit(run_check(check, chosen))
