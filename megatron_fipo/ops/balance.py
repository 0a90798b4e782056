"""Shares of sequences with nearly equal work. Pure Python on integers: the same costs give the same shares anywhere."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from typing import NamedTuple

GOOD_ENOUGH = 1000  # the heaviest share is lightened until it is within mean / 1000 of the mean


def sequence_flops(length: int, hidden_size: int) -> int:
    """Relative training cost of one sequence in one layer: 12 h s + 2 s^2 for s tokens and hidden size h.

    Times 2 h these are a forward pass's FLOPs: 12 h^2 weights in a layer (4 h^2 in attention, 8 h^2 in the MLP) that
    every token is multiplied with, 24 h^2 s; and the two products of attention, scores and values, over all s^2 pairs,
    4 h s^2. Backward takes twice as much, so the ratio of two sequences is the same in training. Attention overtakes
    the weights at s = 6 h. A balance by tokens alone leaves the ranks with the longest sequences behind.
    """
    return 12 * hidden_size * length + 2 * length * length


def balanced_partition(costs: Sequence[int], num_shares: int) -> list[list[int]]:
    """Split the items 0 .. len(costs) - 1 into `num_shares` lists of indices with nearly equal total cost.

    Largest first, each to the lightest share so far (Graham's LPT rule); then the heaviest share gives or swaps items
    until that no longer helps. Every item is in one list, no list is empty, each is in ascending order, and the
    heaviest total is at most the mean plus the largest cost. The same input gives the same lists, anywhere.
    Raises ValueError with fewer items than shares, or a negative cost.
    """
    if num_shares < 1:
        raise ValueError(f"num_shares is {num_shares}, but must be >= 1")
    if len(costs) < num_shares:
        raise ValueError(f"{len(costs)} sequences cannot be shared by {num_shares} ranks: every rank needs one")
    if min(costs) < 0:
        raise ValueError(f"the cost of item {costs.index(min(costs))} is {min(costs)}, but must be >= 0")
    shares = _largest_first(costs, num_shares)
    _refine(shares, costs)
    return [sorted(share) for share in shares]


def _largest_first(costs: Sequence[int], num_shares: int) -> list[list[int]]:
    order = sorted(range(len(costs)), key=lambda item: (-costs[item], item))
    shares = [[item] for item in order[:num_shares]]  # none stays empty, even when costs are zero
    lightest = [(costs[share[0]], index) for index, share in enumerate(shares)]
    heapq.heapify(lightest)
    for item in order[num_shares:]:
        total, index = lightest[0]
        shares[index].append(item)
        heapq.heapreplace(lightest, (total + costs[item], index))
    return shares


def _refine(shares: list[list[int]], costs: Sequence[int]) -> None:
    """Lighten the heaviest share, in place, while it is above the mean and another share can take something off it.

    A transfer leaves both shares below the old maximum. At most one transfer per item, to bound the time.
    """
    totals = [sum(costs[item] for item in share) for share in shares]
    limit = sum(totals) * (GOOD_ENOUGH + 1)  # over GOOD_ENOUGH * num_shares
    for _ in costs:
        heavy = max(range(len(shares)), key=lambda index: (totals[index], -index))
        if totals[heavy] * len(shares) * GOOD_ENOUGH <= limit:
            return
        for light in sorted(range(len(shares)), key=lambda index: (totals[index], index)):
            transfer = _best_transfer(shares[heavy], shares[light], costs, totals[heavy] - totals[light])
            if transfer is not None:
                break
        else:
            return
        for source, target, item in ((heavy, light, transfer.given), (light, heavy, transfer.taken)):
            if item is not None:
                shares[source].remove(item)
                shares[target].append(item)
                totals[source] -= costs[item]
                totals[target] += costs[item]


class _Transfer(NamedTuple):
    """One item to the lighter share, and one or none back."""

    given: int
    taken: int | None


def _best_transfer(heavy: list[int], light: list[int], costs: Sequence[int], gap: int) -> _Transfer | None:
    """What moves nearest to half the gap of the two totals; None if nothing moves more than 0 and less than the gap."""
    takeable = sorted(light, key=lambda item: (costs[item], item))
    values = [costs[item] for item in takeable]
    best: _Transfer | None = None
    distance = gap  # of twice what is moved from the gap
    for given in sorted(heavy):
        nearest = bisect.bisect_left(values, costs[given] - gap // 2)
        partners: list[int | None] = [*takeable[max(0, nearest - 1) : nearest + 1]]
        if len(heavy) > 1:
            partners.append(None)
        for taken in partners:
            moved = costs[given] - (0 if taken is None else costs[taken])
            if abs(2 * moved - gap) < distance:
                best, distance = _Transfer(given, taken), abs(2 * moved - gap)
    return best
