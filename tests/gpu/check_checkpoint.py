"""A checkpoint of an actor on a GPU: an actor that loads it goes on bit for bit as the one that saved it.

    python tests/gpu/check_checkpoint.py [--transformer-impl transformer_engine] [--fp8-recipe delayed]

With delayed scaling the scales and their histories are part of it. Kernels are asked to sum in one order: the update
afterwards repeats bit for bit only where they do.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from check_actor import SIZES, build, fields_of, join, step
from checking import add_paths, arguments, repeatable_updates, require, require_modules, run_check

add_paths("tests", "tests/distributed")


def check(options: argparse.Namespace, device: torch.device) -> str:
    require_modules("transformers", "megatron.core")
    if options.transformer_impl == "transformer_engine":
        require_modules("transformer_engine")
    from tiny_models import make_model, make_sequences

    fields = fields_of(options, device)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory, "model")
        make_model("qwen2", tied=True, **SIZES).save_pretrained(model)
        layout, groups = join([], device)
        from megatron_fipo.actor.checkpoint import load_checkpoint, save_checkpoint

        saves, loads = (build(str(model), layout, groups, device, options, fields) for _ in range(2))
        sequences = make_sequences(12)
        old, _ = saves.old_logprobs([sequences])
        step(saves, sequences, old, layout)
        save_checkpoint(saves, str(Path(directory, "checkpoints")), 1, {})
        require(
            load_checkpoint(loads, Path(directory, "checkpoints", "step_0000001")), "it is taken for another layout"
        )
        passes = [actor.old_logprobs([sequences])[0] for actor in (saves, loads)]
        require(all(torch.equal(a, b) for a, b in zip(*passes)), "log-probs differ after loading")
        for actor in (saves, loads):
            step(actor, sequences, passes[0], layout)
        pairs = [(p, q) for a, b in zip(saves.chunks, loads.chunks) for p, q in zip(a.parameters(), b.parameters())]
        different = sum(not torch.equal(p, q) for p, q in pairs)
        require(different == 0, f"{different} of {len(pairs)} parameters differ after one more update")
        scales = 0 if saves.scaling is None else len(saves.scaling.state())
        return f"{len(pairs)} parameters bit for bit" + (f", {scales} tensors of scaling" if scales else "")


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--transformer-impl", choices=("local", "transformer_engine"), default="local")
    parser.add_argument("--fp8-recipe", choices=("delayed", "tensorwise", "blockwise", "mxfp8"))
    parser.set_defaults(bf16=True)
    repeatable_updates(os.environ)
    sys.exit(run_check(check, parser.parse_args()))
