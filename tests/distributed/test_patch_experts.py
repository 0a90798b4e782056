"""The patches of megatron-core that a mixture of experts needs, each without and with, on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory: Path = tmp_path_factory.mktemp("expert-patches")
    return run_ranks(directory, 2, try_expert_patches, fresh=True)


def test_router_without_te_is_needed(findings: list[dict[str, Any]]) -> None:
    for found in findings:
        assert found["router"]["without"] == "NameError: name 'te_general_gemm' is not defined"
        assert found["router"]["with"] == [[11.0, 5.0]]


def test_splits_as_numpy_is_needed(findings: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(findings):
        assert found["splits"]["without"].startswith("TypeError: all_to_all_single")
        # each rank sends its first number to rank 0 and the other two to rank 1
        assert found["splits"]["with"] == ([0.0, 10.0] if rank == 0 else [1.0, 2.0, 11.0, 12.0])
        assert found["still tensors"]


def test_uneven_gather_is_needed(findings: list[dict[str, Any]]) -> None:
    for found in findings:
        assert "invalid tensor size" in found["gather"]["without"]
        assert found["gather"]["with"] == [[0.0], [10.0], [11.0], [12.0]]
        assert found["even"] == [[0.0], [1.0]]


# ---- on the ranks


def outcome(function: Callable[[], torch.Tensor]) -> Any:
    """What `function` gives, as a list, or what it raises, as text."""
    try:
        return function().tolist()
    except Exception as error:  # whatever upstream breaks with is the finding
        return f"{type(error).__name__}: {error}"


def try_expert_patches() -> dict[str, Any]:
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    from megatron_fipo.patches.megatron_cpu import router_without_te, splits_as_numpy, torch_on_cpu, uneven_gather

    torch_on_cpu.apply()
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()

    def route() -> torch.Tensor:
        weight = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
        return moe_utils.router_gating_linear(torch.tensor([[3.0, 4.0]]), weight, None, torch.float32)

    def exchange() -> torch.Tensor:
        sent = torch.tensor([1, 2])
        received = torch.full((2,), 1 + rank)
        to_numpy = token_dispatcher.maybe_move_tensor_to_cpu
        splits = [to_numpy(counts, as_numpy=True) for counts in (received, sent)]
        return mappings.all_to_all(group, torch.arange(3.0) + 10 * rank, *splits)

    def gather() -> torch.Tensor:
        mine = torch.arange(1.0 + 2 * rank)[:, None] + 10 * rank
        return mappings.gather_from_sequence_parallel_region(mine, group=group, output_split_sizes=[1, 3])

    operations = {"router": route, "splits": exchange, "gather": gather}
    found: dict[str, Any] = {name: {"without": outcome(operation)} for name, operation in operations.items()}
    for patch in (router_without_te, splits_as_numpy, uneven_gather):
        patch.apply()
    for name, operation in operations.items():
        found[name]["with"] = outcome(operation)
    found["still tensors"] = torch.is_tensor(token_dispatcher.maybe_move_tensor_to_cpu(torch.ones(1)))
    even = torch.tensor([[float(rank)]])
    found["even"] = mappings.gather_from_sequence_parallel_region(even, group=group).tolist()
    return found
