"""Log-probs and entropy from hidden states, forward and backward: time and peak memory beside other ways.

Every measurement is a process of its own, pinned to its cores, in turns; medians over the rounds. Memory is the peak
above what the process held with the inputs in place: resident size on a CPU, allocated memory on CUDA. It includes
the gradients of hidden states and weight. TRL's way needs TRL, here or in an interpreter of its own:

    python benchmarks/logprob_head.py [--trl-python DIR/bin/python] [--shape 4096,512,32768] [--dtype bf16]

On CUDA the default shapes reach 131072 tokens of a vocabulary of 152064; what does not fit says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from peaks import now, peak, start_peak
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = {  # tokens, hidden size, vocabulary
    "cpu": ((4096, 512, 32768), (1024, 256, 152064)),
    "cuda": ((8192, 4096, 152064), (131072, 4096, 152064)),
}
CHUNK_SIZES = {"cpu": (128, 256, 512, 1024), "cuda": (512, 1024, 2048, 4096)}
GOAL_MEMORY, GOAL_TIME = {"cpu": 1 / 5, "cuda": 1 / 5}, {"cpu": 1.1, "cuda": 1.4}
TRL_SEQUENCE_LEN = 1024  # TRL's function takes [B, L, V] and loops over B
OUT_OF_MEMORY, ABSENT = "out of memory", "TRL is not installed"
MIB = 2**20

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def main() -> None:
    """Measure every contestant at every shape and print a table for each."""
    options = _parse()
    if options.child:
        print(json.dumps(run_child(options)))
        return
    contestants = ["eager", "log_softmax", "trl", *(str(size) for size in options.chunk_sizes)]
    threads = f", {options.threads} thread(s)" if options.device == "cpu" else f", {torch.cuda.get_device_name()}"
    print(f"{options.device}{threads}, {options.dtype}, torch {torch.__version__}, medians of {options.rounds} rounds")
    for shape in options.shape:
        results: dict[str, list[dict[str, float | str]]] = {name: [] for name in contestants}
        for _ in range(options.rounds):
            for name in contestants:
                if not (results[name] and "failed" in results[name][0]):
                    results[name].append(start_child(options, name, shape))
        gradients = (shape[0] + shape[2]) * shape[1] * DTYPES[options.dtype].itemsize / MIB
        title = f"{shape[0]} tokens, hidden size {shape[1]}, vocabulary {shape[2]}"
        print(f"\n{title}; the gradients alone are {gradients:.0f} MiB\n")
        print_table(results, options.device)


def print_table(results: dict[str, list[dict[str, float | str]]], device: str) -> None:
    """One row per contestant; ratios (of wall time, of extra memory) to the eager form."""
    print("| | forward s | backward s | both s | CPU s | of eager | extra MiB | of eager | within the goals |")
    print("|---" * 9 + "|")
    eager: dict[str, float] | None = None
    for name, runs in results.items():
        title = {"eager": "F.linear + vocab_parallel_logprobs", "trl": "F.linear + TRL selective_log_softmax"}.get(name)
        title = title or ("F.linear + log_softmax" if name == "log_softmax" else f"linear_logprobs, chunks of {name}")
        if "failed" in runs[0]:
            print(f"| {title} | {runs[0]['failed']} |")
            continue
        median = {key: statistics.median(float(run[key]) for run in runs) for key in ("forward", "both", "cpu", "mib")}
        eager = median if name == "eager" else eager
        line = f"| {title} | {median['forward']:.2f} | {median['both'] - median['forward']:.2f} | {median['both']:.2f} "
        line += f"| {median['cpu']:.2f} "
        if eager is None:
            print(f"{line}| | {median['mib']:.0f} | | |")
            continue
        time_ratio, memory_ratio = median["both"] / eager["both"], median["mib"] / eager["mib"]
        is_within = time_ratio <= GOAL_TIME[device] and memory_ratio <= GOAL_MEMORY[device]
        verdict = ("yes" if is_within else "no") if name.isdecimal() else ""
        print(f"{line}| {time_ratio:.2f} | {median['mib']:.0f} | {memory_ratio:.2f} | {verdict} |")


def start_child(options: argparse.Namespace, name: str, shape: tuple[int, int, int]) -> dict[str, float | str]:
    """Measure one contestant in a process of its own."""
    arguments = ["--child", name, "--shape", ",".join(map(str, shape)), "--dtype", options.dtype]
    arguments += ["--device", options.device, "--threads", str(options.threads), "--repeats", str(options.repeats)]
    finished = subprocess.run(
        [options.trl_python if name == "trl" else sys.executable, str(Path(__file__).resolve()), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return json.loads(finished.stdout.splitlines()[-1])


def run_child(options: argparse.Namespace) -> dict[str, float | str]:
    """Seconds forward and both ways (the fastest of the repeats) and the peak in MiB; or why there are none."""
    if options.child == "trl" and importlib.util.find_spec("trl") is None:
        return {"failed": ABSENT}
    (num_tokens, hidden_size, vocab_size), device = options.shape[0], torch.device(options.device)
    torch.set_num_threads(options.threads)
    if device.type == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[options.dtype]
    hidden = torch.randn(num_tokens, hidden_size, generator=generator, device=device, dtype=dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, device=device, dtype=dtype)
    weight *= 2 * hidden_size**-0.5
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator, device=device)
    upstream = torch.randn(num_tokens, generator=generator, device=device)
    hidden.requires_grad_()
    weight.requires_grad_()
    head = make_head(options.child, vocab_size)
    torch.mm(hidden[:8].detach(), weight[:8].detach().t())  # what the matrix library sets up once is not the head's
    before = start_peak(device)
    runs = []
    try:
        for _ in range(options.repeats):
            hidden.grad = weight.grad = None
            start, start_cpu = now(device), time.process_time()
            logprobs, _ = head(hidden, weight, labels)
            between = now(device)
            (logprobs * upstream).sum().backward()
            runs.append((now(device) - start, between - start, time.process_time() - start_cpu))
            del logprobs
    except torch.OutOfMemoryError:
        return {"failed": OUT_OF_MEMORY}
    both, forward, cpu = min(runs)
    return {"both": both, "forward": forward, "cpu": cpu, "mib": (peak(device) - before) / MIB}


def make_head(name: str, vocab_size: int) -> Head:
    """(hidden [N, h], weight [V, h], labels [N]) -> (log-probs, entropy), one way or another."""
    if name == "eager":
        from megatron_fipo.ops.logprobs import vocab_parallel_logprobs

        return lambda hidden, weight, labels: vocab_parallel_logprobs(
            F.linear(hidden, weight), labels, vocab_size=vocab_size
        )
    if name == "log_softmax":
        return _log_softmax_head
    if name == "trl":
        from trl.trainer.utils import selective_log_softmax_and_entropy

        def trl_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            length = TRL_SEQUENCE_LEN if len(labels) % TRL_SEQUENCE_LEN == 0 else len(labels)
            logits = F.linear(hidden, weight).view(-1, length, vocab_size)
            logprobs, entropy = selective_log_softmax_and_entropy(
                logits, labels.view(-1, length), entropy_requires_grad=False
            )
            return logprobs.flatten(), entropy.flatten()

        return trl_head
    from megatron_fipo.ops.linear_logprobs import linear_logprobs

    return lambda hidden, weight, labels: linear_logprobs(
        hidden, weight, labels, vocab_size=vocab_size, chunk_size=int(name)
    )


def _log_softmax_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    rows = F.linear(hidden, weight).float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(rows.exp() * rows).sum(-1)
    return rows.gather(1, labels[:, None])[:, 0], entropy


def _shape(text: str) -> tuple[int, int, int]:
    tokens, hidden, vocab = (int(part) for part in text.split(","))
    return tokens, hidden, vocab


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", type=_shape, action="append", help="tokens,hidden,vocabulary; may be repeated")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: fp32 on a CPU, bf16 on CUDA")
    parser.add_argument("--chunk-sizes", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="processes per contestant, in turns")
    parser.add_argument("--repeats", type=int, default=2, help="runs in each process, of which the fastest counts")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of an environment with TRL")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.shape = options.shape or list(SHAPES[options.device])
    options.dtype = options.dtype or ("fp32" if options.device == "cpu" else "bf16")
    options.chunk_sizes = options.chunk_sizes or CHUNK_SIZES[options.device]
    return options


if __name__ == "__main__":
    main()
