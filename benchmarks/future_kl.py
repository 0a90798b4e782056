"""Future-KL beside other ways to compute it: the authors' matrix of decays, a loop over tokens, scipy; and a copy.

    python benchmarks/future_kl.py [--device cuda] [--half-life 32] [--rounds 9]

One process, one thread pinned to one core; every round runs each contestant once, in turn, and medians are printed.
Slow contestants run in fewer rounds. On CUDA it needs torch, triton and numpy only; each round reads other buffers, so
that the L2 cache does not serve, and the share of the copy bandwidth that is reached is printed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.ops.future_kl import future_kl, influence_weights

CHUNK = 128  # rows of the authors' decay matrix that exist at a time
SLOW_S = 0.2  # a contestant whose first run took longer runs in SLOW_ROUNDS rounds
SLOW_ROUNDS = 2
MAX_MATRIX_WORK = {"cpu": 5e10, "cuda": 2e12}  # rows x tokens^2 above which the decay matrix is not tried
ROTATED_BYTES = 512 << 20  # several times the L2 cache of an H200
BYTES_PER_TOKEN = 8  # a shift read and an F written, fp32
INFLUENCE = {"dual_clip": 10.0, "influence_low": 1.0, "influence_high": 1.2, "safety_threshold": 10.0}


@dataclass(frozen=True)
class Shape:
    """Sequences of these lengths: rows of a matrix, or packed end to end."""

    name: str
    lengths: tuple[int, ...]
    is_packed: bool = False


@dataclass(frozen=True)
class Case:
    """fp32 shifts ~ N(0, 0.1) of one shape, and a mask that leaves out every tenth token."""

    shifts: Tensor  # [B, L], or packed [T]
    mask: Tensor
    advantages: Tensor
    cu_seqlens: Tensor | None
    dense: Tensor  # [B, L]: the masked shifts, for who knows neither masks nor packed sequences


@dataclass(frozen=True)
class Contestant:
    """`run` returns F as `shifts` or as `dense` lie, or something else altogether (is_future False)."""

    name: str
    run: Callable[[Case], Tensor]
    is_future: bool = True
    skipped: str = ""


def main() -> None:
    """Measure every shape and print one table."""
    options = _parse()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    if device.type == "cpu":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    bandwidth = _copy_bandwidth(device)
    print(f"{_machine(device)}; copy bandwidth {bandwidth / 1e9:.0f} GB/s; half-life {options.half_life}, fp32")
    floor = f" {'% of bandwidth':>14}" if device.type == "cuda" else ""
    print(f"{'shape':<26} {'contestant':<28} {'ms':>10} {'x ours':>9} {'error':>9}{floor}")
    for shape in _shapes(device, options.seed):
        cases = _cases(shape, device, options.seed)
        contestants = _contestants(shape, options.half_life, device)
        times = _measure(contestants, cases, device, options.rounds)
        exact = future_kl(cases[0].dense.double(), torch.ones_like(cases[0].dense, dtype=torch.bool), options.half_life)
        for contestant in contestants:
            text = f"{shape.name:<26} {contestant.name:<28} "
            if contestant.skipped:
                print(text + contestant.skipped)
                continue
            seconds, error = times[contestant.name], "-"
            if contestant.is_future:
                error = f"{float((_as_rows(contestant.run(cases[0]), shape) - exact).abs().max()):.0e}"
            text += f"{seconds * 1e3:>10.3f} {seconds / times[OURS]:>9.2f} {error:>9}"
            if device.type == "cuda":
                text += f" {100 * BYTES_PER_TOKEN * sum(shape.lengths) / bandwidth / seconds:>14.0f}"
            print(text, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--half-life", type=float, default=32.0, help="tokens")
    parser.add_argument("--rounds", type=int, default=9, help="rounds to take the median of")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _shapes(device: torch.device, seed: int) -> list[Shape]:
    shapes = [Shape(f"{b}x{length}", (length,) * b) for b, length in ((32, 2048), (64, 20480), (8, 131072))]
    if device.type == "cuda":
        shapes.append(Shape("1024x20480", (20480,) * 1024))
    generator = np.random.default_rng(seed)
    for num_sequences, median in ((64, 4000), (512, 200)):
        drawn = np.minimum(generator.lognormal(math.log(median), 1.0, num_sequences), 20480).astype(int)
        shapes.append(Shape(f"packed {num_sequences}, {drawn.sum()} tokens", tuple(drawn.tolist()), is_packed=True))
    return shapes


def _cases(shape: Shape, device: torch.device, seed: int) -> list[Case]:
    """One set of buffers on a CPU, on CUDA as many as the L2 cache cannot hold."""
    num_tokens = sum(shape.lengths)
    num_cases = 1 if device.type == "cpu" else 1 + ROTATED_BYTES // (BYTES_PER_TOKEN * num_tokens)
    generator = torch.Generator().manual_seed(seed)
    full = (num_tokens,) if shape.is_packed else (len(shape.lengths), shape.lengths[0])
    shifts = 0.1 * torch.randn(full, generator=generator)
    mask = torch.rand(full, generator=generator) < 0.9
    advantages = torch.randn(full, generator=generator)
    offsets = torch.tensor([0, *shape.lengths]).cumsum(0).int() if shape.is_packed else None
    tensors = (shifts, mask, advantages, offsets, _as_rows(torch.where(mask, shifts, 0), shape))
    return [
        Case(*(tensor if tensor is None else tensor.to(device, copy=True) for tensor in tensors))
        for _ in range(num_cases)
    ]


def _as_rows(values: Tensor, shape: Shape) -> Tensor:
    """Packed [T] as [B, L] with zeros behind; what has rows already, as it is."""
    if values.dim() == 2:
        return values
    return torch.nn.utils.rnn.pad_sequence(list(values.split(list(shape.lengths))), batch_first=True)


OURS = "future_kl"


def _contestants(shape: Shape, half_life: float, device: torch.device) -> list[Contestant]:
    gamma = 2.0 ** (-1.0 / half_life)
    work = len(shape.lengths) * max(shape.lengths) ** 2
    too_much = (
        f"skipped: {work:.0e} products, about {work / 3e9 / 60:.0f} min" if work > MAX_MATRIX_WORK[device.type] else ""
    )
    on_padded = " on padded rows" if shape.is_packed else ""
    found = [
        Contestant(OURS, lambda case: future_kl(case.shifts, case.mask, half_life, cu_seqlens=case.cu_seqlens)),
        Contestant("influence_weights (all of it)", lambda case: _weights(case, half_life), is_future=False),
        Contestant(f"matrix{on_padded}", lambda case: _matrix(case.dense, gamma), skipped=too_much),
        Contestant(f"token loop{on_padded}", lambda case: _token_loop(case.dense, gamma)),
    ]
    if device.type == "cpu":
        found.append(Contestant("scipy lfilter", lambda case: _lfilter(case, gamma)))
    return [*found, Contestant("copy", lambda case: case.shifts.clone(), is_future=False)]


def _weights(case: Case, half_life: float) -> Tensor:
    return influence_weights(
        case.shifts,
        case.advantages,
        case.mask,
        half_life=half_life,
        semantics="released",
        cu_seqlens=case.cu_seqlens,
        **INFLUENCE,
    )[0]


def _matrix(values: Tensor, gamma: float) -> Tensor:
    """As the paper's authors evaluate it: F = values D, D_jt = gamma^(j-t) where j >= t, in chunks of t."""
    place = torch.arange(values.shape[1], device=values.device)
    found = torch.empty_like(values)
    for start in range(0, values.shape[1], CHUNK):
        distance = place[None, :] - place[start : start + CHUNK, None]
        decay = torch.where(distance >= 0, torch.pow(gamma, distance.clamp(min=0).to(values)), 0)
        found[:, start : start + CHUNK] = values @ decay.T
    return found


def _token_loop(values: Tensor, gamma: float) -> Tensor:
    found = torch.empty_like(values)
    carry = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        carry = values[:, t] + gamma * carry
        found[:, t] = carry
    return found


def _lfilter(case: Case, gamma: float) -> Tensor:
    from scipy.signal import lfilter

    one, feedback = np.ones(1, np.float32), np.array([1.0, -gamma], np.float32)
    values = torch.where(case.mask, case.shifts, 0).numpy()
    if case.cu_seqlens is None:
        return torch.from_numpy(lfilter(one, feedback, values[:, ::-1], axis=1)[:, ::-1].copy())
    found = np.empty_like(values)
    for start, end in itertools.pairwise(case.cu_seqlens.tolist()):
        found[start:end] = lfilter(one, feedback, values[start:end][::-1])[::-1]
    return torch.from_numpy(found)


def _measure(
    contestants: list[Contestant], cases: list[Case], device: torch.device, num_rounds: int
) -> dict[str, float]:
    """The median seconds of each contestant that is not skipped, one run a round; warm-up runs do not count."""
    running = [contestant for contestant in contestants if not contestant.skipped]
    first = {contestant.name: _seconds(contestant, cases[0], device) for contestant in running}
    second = {
        name: _seconds(contestant, cases[-1], device) if first[name] < SLOW_S else first[name]
        for name, contestant in ((contestant.name, contestant) for contestant in running)
    }
    times: dict[str, list[float]] = {name: [] for name in first}
    for i in range(num_rounds):
        for contestant in running:
            if second[contestant.name] < SLOW_S or i < SLOW_ROUNDS:
                times[contestant.name].append(_seconds(contestant, cases[i % len(cases)], device))
    return {name: statistics.median(found) for name, found in times.items()}


def _seconds(contestant: Contestant, case: Case, device: torch.device) -> float:
    if device.type == "cuda":
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        before.record()
        contestant.run(case)
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after) / 1e3
    started = time.perf_counter()
    contestant.run(case)
    return time.perf_counter() - started


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    source = torch.ones(ROTATED_BYTES // 4, device=device)
    copy = Contestant("copy", lambda _: target.copy_(source))
    target = torch.empty_like(source)
    seconds = [_seconds(copy, None, device) for _ in range(5)]  # type: ignore[arg-type]
    return 2 * ROTATED_BYTES / statistics.median(seconds[1:])


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown CPU")
    return f"{model}, one thread, torch {torch.__version__}"


if __name__ == "__main__":
    main()
