"""The FIPO loss forward and backward, fused, from tensor operations, and those under torch.compile: time and memory.

Times are medians of runs in turns in one process, on a CPU pinned to its cores. Memory is the peak of a second run,
above what a process of its own held with the inputs in place: resident size on a CPU, allocated memory on CUDA. It
includes the gradient and what the loss hands on: Future-KL, influence weights, token statistics.

    python benchmarks/fused_loss.py [--shape 64,20480] [--device cuda]

The floor is the time the inputs and outputs take at the bandwidth of a large copy. On CUDA several sets of inputs take
turns, so that the cache serves none of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peaks import now, peak, start_peak
from torch import Tensor

from megatron_fipo.config import FIPOSettings
from megatron_fipo.losses import eager, fipo_loss

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "cpu": ((32, 2048), (64, 20480), (8, 131072)),
    "cuda": ((32, 2048), (64, 20480), (8, 131072), (1024, 20480)),
}
CONTESTANTS = ("fused", "eager", "compiled")
# bytes a token: fp32 new, old, A and the mask in; F, f, statistics (four fp32, two bool), gradient out, twice written
# and once read again where the backward pass scales it
FLOOR_BYTES = 3 * 4 + 1 + 2 * 4 + 4 * 4 + 2 + 3 * 4
CACHE_BYTES = 256 * 2**20  # what the inputs of all sets must exceed on CUDA
PROMPT_LEN = 128
SETTINGS = FIPOSettings(semantics="released")
MIB = 2**20

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # log-probs, old ones, advantages, mask: [T]; cu_seqlens


def main() -> None:
    """Measure every contestant at every shape and print one table."""
    options = _parse()
    device = torch.device(options.device)
    if device.type == "cpu":  # torch.compile for CUDA has its workers on every core
        torch.set_num_threads(options.threads)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    if options.child:
        print(json.dumps(extra_memory(make_loss(options.child), options.shape[0], device)))
        return
    losses = {name: make_loss(name) for name in options.contestants}
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{options.threads} thread(s)"
    print(f"{device.type}, {machine}, fp32, torch {torch.__version__}, medians of {options.rounds} rounds\n")
    print("| sequences x length | form | forward ms | both ms | of eager | floor / time | extra MiB | of eager |")
    print("|---|---|---|---|---|---|---|---|")
    bandwidth = copy_bandwidth(device)
    for shape in options.shape:
        forward, both = times(losses, shape, device, options.rounds)
        mib = {name: start_child(options, name, shape) / MIB for name in losses}
        floor_s = FLOOR_BYTES * shape[0] * shape[1] / bandwidth
        for name in losses:
            to_eager = [f"{x[name] / x['eager']:.2f}" if x.get("eager") else "" for x in (both, mib)]
            print(
                f"| {shape[0]}x{shape[1]} | {name} | {1e3 * forward[name]:.2f} | {1e3 * both[name]:.2f} | {to_eager[0]}"
                f" | {floor_s / both[name]:.2f} | {mib[name]:.0f} | {to_eager[1]} |",
                flush=True,
            )


@dataclass(frozen=True)
class Contestant:
    """One way to compute the loss; `kept` keeps the last call's info alive until the gradient is there, as training."""

    form: Callable[..., tuple[Tensor, dict[str, Any]]]
    fused: bool
    kept: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, inputs: Inputs) -> Tensor:
        self.kept.clear()
        *tensors, cu_seqlens = inputs
        loss, info = self.form(*tensors, SETTINGS, cu_seqlens=cu_seqlens, with_metrics=False, fused=self.fused)
        self.kept.append(info)
        return loss


def make_loss(name: str) -> Contestant:
    """The contestant of this name."""
    if name != "compiled":
        return Contestant(fipo_loss, name == "fused")
    assert os.environ.get("TORCHDYNAMO_DISABLE", "0") == "0", "TORCHDYNAMO_DISABLE is set: nothing would be compiled"
    torch._logging.set_logs(
        dynamo=logging.ERROR
    )  # the checks of the arguments break the graph, and are told one by one
    # the scan is compiled by numba or Triton already, and remains a call between two graphs
    eager.influence_weights = torch.compiler.disable(eager.influence_weights)
    return Contestant(torch.compile(fipo_loss, dynamic=False), False)


def times(
    losses: dict[str, Contestant], shape: tuple[int, int], device: torch.device, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of the forward pass, and of forward and backward, of each."""
    num_tokens = shape[0] * shape[1]
    num_sets = 1 if device.type == "cpu" else 2 + CACHE_BYTES // (13 * num_tokens)
    sets = [make_inputs(shape, device, seed) for seed in range(num_sets)]
    forward: dict[str, list[float]] = {name: [] for name in losses}
    both: dict[str, list[float]] = {name: [] for name in losses}
    turn = 0
    for number in range(rounds + 2):
        for name, loss_of in losses.items():
            inputs = sets[turn % num_sets]
            turn += 1
            inputs[0].grad = None
            start = now(device)
            loss = loss_of(inputs)
            between = now(device)
            loss.backward()
            end = now(device)
            if number >= 2:
                forward[name].append(between - start)
                both[name].append(end - start)
    return tuple({name: statistics.median(runs) for name, runs in x.items()} for x in (forward, both))  # type: ignore[return-value]


def make_inputs(shape: tuple[int, int], device: torch.device, seed: int = 0) -> Inputs:
    """Packed sequences of one length with a prompt each; shifts ~ N(0, 0.1), one advantage a sequence."""
    generator = torch.Generator(device).manual_seed(seed)
    num_tokens = shape[0] * shape[1]
    old = -torch.rand(num_tokens, generator=generator, device=device)
    new = old + 0.1 * torch.randn(num_tokens, generator=generator, device=device)
    advantages = torch.randn(shape[0], generator=generator, device=device).repeat_interleave(shape[1])
    mask = (torch.arange(shape[1], device=device) >= PROMPT_LEN).repeat(shape[0])
    cu_seqlens = torch.arange(shape[0] + 1, dtype=torch.int32) * shape[1]
    return new.requires_grad_(), old, advantages, mask, cu_seqlens.to(device)


def extra_memory(loss_of: Contestant, shape: tuple[int, int], device: torch.device) -> float:
    """Bytes of a second run above what was in use with the inputs in place."""
    inputs = make_inputs(shape, device)
    loss_of(inputs).backward()
    inputs[0].grad = None
    loss_of.kept.clear()
    before = start_peak(device)
    loss_of(inputs).backward()
    return peak(device) - before


def start_child(options: argparse.Namespace, name: str, shape: tuple[int, int]) -> float:
    """`extra_memory` in a process of its own."""
    arguments = ["--child", name, "--shape", f"{shape[0]},{shape[1]}", "--device", options.device]
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *arguments, "--threads", str(options.threads)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is then given back at once
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return float(json.loads(finished.stdout.splitlines()[-1]))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying 256 MiB over memory that is there already."""
    source = torch.zeros(64 * MIB, device=device)
    target = torch.zeros_like(source)
    runs = []
    for _ in range(5):
        start = now(device)
        target.copy_(source)
        runs.append(now(device) - start)
    return 2 * source.nbytes / min(runs)


def _shape(text: str) -> tuple[int, int]:
    num_sequences, length = (int(part) for part in text.split(","))
    return num_sequences, length


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", type=_shape, action="append", help="sequences,length; may be repeated")
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.shape = options.shape or list(SHAPES[options.device])
    return options


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="torch")
    main()
