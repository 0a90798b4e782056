"""Log-probs of logits sharded over two ranks equal those of the whole logits, whatever the vocabulary divides by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo.ops.logprobs import vocab_parallel_logprobs

NUM = 11
# vocabulary and columns per rank: even, padded, padded so far that the second rank has no column of its own
CASES = {"even": (36, 18), "odd": (37, 19), "one column on rank 1": (20, 19), "no column on rank 1": (19, 19)}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def make_inputs(case: str, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Whole logits [N, 2 * columns] with padding that would win, labels [N] on both ranks, an upstream gradient."""
    vocab, columns = CASES[case]
    generator = torch.Generator().manual_seed(columns)
    logits = 4 * torch.randn(NUM, 2 * columns, generator=generator, dtype=torch.float64)
    logits[:, vocab:] = 60.0
    labels = torch.randint(0, vocab, (NUM,), generator=generator)
    labels[0], labels[1] = 0, vocab - 1
    return logits.to(DTYPES[dtype]), labels, torch.randn(NUM, generator=generator, dtype=torch.float64)


def score(logits: Tensor, labels: Tensor, grad: Tensor, vocab: int, group: Any) -> dict[str, Tensor]:
    logits = logits.clone().requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(logits, labels, vocab_size=vocab, group=group)
    (logprobs * grad.to(logprobs.dtype)).sum().backward()
    assert logits.grad is not None
    return {"logprobs": logprobs.detach(), "entropy": entropy, "grad": logits.grad}


def score_shards() -> dict[str, Any]:
    """Every case and dtype with this rank's columns."""
    found = {}
    for case, (vocab, columns) in CASES.items():
        for dtype in DTYPES:
            logits, labels, grad = make_inputs(case, dtype)
            first = torch.distributed.get_rank() * columns
            group = torch.distributed.group.WORLD
            found[f"{case}/{dtype}"] = score(logits[:, first : first + columns], labels, grad, vocab, group)
    return found


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    from processes import run_ranks

    return run_ranks(tmp_path_factory.mktemp("shards"), 2, score_shards, {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_find_what_one_finds(case: str, dtype: str, shards: list[dict[str, Any]]) -> None:
    logits, labels, grad = make_inputs(case, dtype)
    wanted = score(logits, labels, grad, CASES[case][0], None)
    found = [rank[f"{case}/{dtype}"] for rank in shards]
    # summation order differs; a gradient in bf16 is rounded once more (2^-9 of values up to 3)
    tolerance = 1e-13 if dtype == "float64" else 2e-6
    for name in ("logprobs", "entropy"):
        assert torch.equal(found[0][name], found[1][name])
        assert (found[0][name] - wanted[name]).abs().max() <= tolerance, name
    whole = torch.cat([rank["grad"] for rank in found], dim=1)
    assert whole.dtype == DTYPES[dtype]
    assert (whole - wanted["grad"]).abs().max() <= (8e-3 if dtype == "bfloat16" else tolerance)
    assert not whole[:, CASES[case][0] :].any()
