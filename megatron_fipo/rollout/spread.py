"""Which engine gets which requests."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fipo.types import GenerateRequest


def spread_requests(requests: Sequence[GenerateRequest], num_engines: int) -> list[list[int]]:
    """Indices of the requests each engine gets, ascending: whole groups of equal prompts, the costliest group first to
    the engine with the least to do. A function of the requests alone, so that a repeated run spreads them alike."""
    groups: dict[bytes, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.prompt_ids.tobytes(), []).append(index)
    costs = {
        key: len(requests[members[0]].prompt_ids) + sum(requests[index].sampling.max_response_len for index in members)
        for key, members in groups.items()
    }
    shares: list[list[int]] = [[] for _ in range(num_engines)]
    load = [0] * num_engines
    for key in sorted(groups, key=lambda key: (-costs[key], groups[key][0])):
        target = min(range(num_engines), key=lambda engine: load[engine])
        shares[target].extend(groups[key])
        load[target] += costs[key]
    return [sorted(share) for share in shares]
