"""Log-probs over a vocabulary sharded over two ranks equal the whole vocabulary's, whatever it divides by.

From logits, and from hidden states chunk by chunk.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo.ops.linear_logprobs import linear_logprobs
from megatron_fipo.ops.logprobs import vocab_parallel_logprobs

NUM, HIDDEN, CHUNK_SIZE, TEMPERATURE = 11, 8, 4, 0.8
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


def make_linear_inputs(case: str, dtype: str) -> tuple[Tensor, Tensor]:
    """hidden [N, h] and the whole weight [2 * columns, h]."""
    vocab, columns = CASES[case]
    generator = torch.Generator().manual_seed(columns + 1)
    hidden = torch.randn(NUM, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(2 * columns, HIDDEN, generator=generator, dtype=torch.float64)
    weight[vocab:] *= 30
    return hidden.to(DTYPES[dtype]), weight.to(DTYPES[dtype])


def score_linear(
    hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor, vocab: int, group: Any
) -> dict[str, Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropy = linear_logprobs(
        hidden, weight, labels, vocab_size=vocab, group=group, temperature=TEMPERATURE, chunk_size=CHUNK_SIZE
    )
    (logprobs * grad.to(logprobs.dtype)).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {"logprobs": logprobs.detach(), "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad}


def score_shards() -> dict[str, Any]:
    """Every case and dtype with this rank's columns."""
    found: dict[str, Any] = {}
    for case, (vocab, columns) in CASES.items():
        for dtype in DTYPES:
            logits, labels, grad = make_inputs(case, dtype)
            first = torch.distributed.get_rank() * columns
            group = torch.distributed.group.WORLD
            found[f"{case}/{dtype}"] = score(logits[:, first : first + columns], labels, grad, vocab, group)
            hidden, weight = make_linear_inputs(case, dtype)
            found[f"linear/{case}/{dtype}"] = score_linear(
                hidden, weight[first : first + columns], labels, grad, vocab, group
            )
    nothing = [x[:0] for x in (hidden, labels, grad)]
    found["linear/no position"] = score_linear(nothing[0], weight[:columns], *nothing[1:], vocab, group)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_with_half_the_weight_find_what_one_finds(
    case: str, dtype: str, shards: list[dict[str, Any]]
) -> None:
    vocab = CASES[case][0]
    _, labels, grad = make_inputs(case, dtype)
    wanted = score_linear(*make_linear_inputs(case, dtype), labels, grad, vocab, None)
    found = [rank[f"linear/{case}/{dtype}"] for rank in shards]
    tolerance = 1e-13 if dtype == "float64" else 4e-6
    for name in ("logprobs", "entropy"):
        assert torch.equal(found[0][name], found[1][name])
        assert (found[0][name] - wanted[name]).abs().max() <= tolerance, name
    weight = torch.cat([rank["weight"] for rank in found])
    hidden = sum(rank["hidden"] for rank in found)  # each rank's is the share of its columns
    grad_tolerance = 6e-2 if dtype == "bfloat16" else 10 * tolerance  # bf16: 2^-8 of values up to 10
    assert (weight - wanted["weight"]).abs().max() <= grad_tolerance
    assert (hidden - wanted["hidden"]).abs().max() <= grad_tolerance
    assert not weight[vocab:].any()


def test_a_micro_batch_without_a_response_token_passes_the_collectives(shards: list[dict[str, Any]]) -> None:
    for rank in shards:
        found = rank["linear/no position"]
        assert found["logprobs"].shape == found["entropy"].shape == (0,)
        assert found["hidden"].shape == (0, HIDDEN)
        assert not found["weight"].any()
