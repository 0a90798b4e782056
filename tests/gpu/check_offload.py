"""The actor leaves the device while engines generate, and comes back bit for bit.

What the CPU cannot show: that device memory is given up, to the allocator's last block.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

import torch
from check_actor import SIZES, build, fields_of, join, step
from checking import add_paths, arguments, require, require_modules, run_check

add_paths("tests", "tests/distributed")


def check(options: argparse.Namespace, device: torch.device) -> str:
    require_modules("transformers", "megatron.core")
    from tiny_models import make_model, make_sequences

    from megatron_fipo.actor.offload import PARTS, Offloader

    layout, groups = join([], device)
    with tempfile.TemporaryDirectory() as directory:
        make_model("qwen2", tied=True, **SIZES).save_pretrained(directory)
        actor = build(directory, layout, groups, device, options, fields_of(options, device))
        sequences = make_sequences(12)
        old, _ = actor.old_logprobs([sequences])
        step(actor, sequences, old, layout)
        before, _ = actor.old_logprobs([sequences])
        held = allocated(device)
        offloader = Offloader(actor.chunks, actor.optimizer, actor.device)
        gone = offloader.leave(*PARTS)
        require(gone > 0, "nothing left the device")
        freed = held - allocated(device)
        require(device.type == "cpu" or freed >= 0.95 * gone, f"{gone} bytes left the device, which holds {freed} less")
        require(offloader.enter(*PARTS) == gone, "other tensors came back than left")
        after, _ = actor.old_logprobs([sequences])
        require(all(torch.equal(a, b) for a, b in zip(before, after)), "log-probs differ after the way to and fro")
        step(actor, sequences, after, layout)
        where = f", which holds {freed / 2**20:.1f} MiB less" if device.type == "cuda" else ""
        return f"{gone / 2**20:.1f} MiB left and came back{where}"


def allocated(device: torch.device) -> int:
    """Bytes of tensors on the device; cuBLAS's workspaces, which count as such, are let go of first."""
    if device.type == "cpu":
        return 0
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated(device)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.set_defaults(transformer_impl="local", fp8_recipe=None, bf16=True)
    sys.exit(run_check(check, parser.parse_args()))
