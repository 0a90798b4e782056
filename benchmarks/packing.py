"""How evenly sequences are spread over data-parallel ranks: the heaviest rank's FLOPs over the mean.

8192 log-normal lengths of about 4000 tokens, capped at 20480, of a model of hidden size 5120; balanced by FLOPs as we
do, and the ways one meets elsewhere. Every step waits for its heaviest rank, so max / mean is the time lost.

    python benchmarks/packing.py
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence

from megatron_fipo.ops.balance import balanced_partition, sequence_flops

RANKS, SIGMAS = (8, 16, 64), (0.3, 0.6, 1.0, 1.5)
MEAN_LEN, MAX_LEN = 4000, 20480
GOAL, GOAL_S = 1.02, 1.0

Partition = Callable[[Sequence[int], int], list[list[int]]]


def main() -> None:
    """Print one table."""
    options = _parse()
    others: dict[str, Partition] = {
        "round robin": round_robin,
        "equal counts": equal_counts,
        "sorted, snake": snake,
        "by tokens": balanced_partition,
    }
    print(
        f"{options.num_sequences} sequences, hidden size {options.hidden_size}; heaviest rank / mean in "
        f"12 h s + 2 s^2 (goal <= {GOAL} in {GOAL_S:g} s); seconds: median of {options.repeats}\n"
    )
    print("| ranks | sigma | mean tokens | by FLOPs (ours) | " + " | ".join(others) + " | seconds |")
    print("|---" * (5 + len(others)) + "|")
    for num_ranks in RANKS:
        for sigma in SIGMAS:
            lengths = make_lengths(options.num_sequences, sigma)
            costs = [sequence_flops(length, options.hidden_size) for length in lengths]
            seconds = []
            for _ in range(options.repeats):
                start = time.perf_counter()
                ours = balanced_partition(costs, num_ranks)
                seconds.append(time.perf_counter() - start)
            ratios = [heaviest_over_mean(partition(lengths, num_ranks), costs) for partition in others.values()]
            print(
                f"| {num_ranks} | {sigma} | {statistics.mean(lengths):.0f} | {heaviest_over_mean(ours, costs):.5f} | "
                + " | ".join(f"{ratio:.3f}" for ratio in ratios)
                + f" | {statistics.median(seconds):.3f} |"
            )


def make_lengths(num_sequences: int, sigma: float) -> list[int]:
    """Log-normal lengths whose mean, before the cap, is MEAN_LEN."""
    rng = random.Random(0)
    mu = math.log(MEAN_LEN) - sigma**2 / 2
    return [max(1, min(MAX_LEN, round(rng.lognormvariate(mu, sigma)))) for _ in range(num_sequences)]


def heaviest_over_mean(shares: list[list[int]], costs: Sequence[int]) -> float:
    """Largest total over the mean total."""
    totals = [sum(costs[item] for item in share) for share in shares]
    return max(totals) * len(totals) / sum(totals)


def round_robin(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Every num_shares-th sequence in the order they came."""
    return [list(range(first, len(lengths), num_shares)) for first in range(num_shares)]


def equal_counts(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Consecutive slices of equal size."""
    size = -(-len(lengths) // num_shares)
    return [list(range(first, min(first + size, len(lengths)))) for first in range(0, len(lengths), size)]


def snake(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Sorted by length and dealt out forwards and backwards in turn."""
    order = sorted(range(len(lengths)), key=lambda item: (-lengths[item], item))
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for place, item in enumerate(order):
        turn, offset = divmod(place, num_shares)
        shares[offset if turn % 2 == 0 else num_shares - 1 - offset].append(item)
    return shares


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-sequences", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=5120)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
