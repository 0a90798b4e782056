"""Log-probs and entropy from hidden states, chunk by chunk, equal those of the logits made at once.

Sharded over ranks: tests/distributed/test_logprobs_sharded.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fipo.ops.linear_logprobs import linear_logprobs
from megatron_fipo.ops.logprobs import vocab_parallel_logprobs

VOCAB, PADDED, HIDDEN = 37, 48, 16
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def make_inputs(
    num: int, dtype: torch.dtype, *, vocab: int = VOCAB, padded: int = PADDED, width: int = HIDDEN
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [num, width], weight [padded, width] whose padding would win, labels with both ends, a gradient [num]."""
    generator = torch.Generator().manual_seed(num)
    hidden = torch.randn(num, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(padded, width, generator=generator, dtype=torch.float64)
    weight[vocab:] *= 30
    labels = torch.randint(0, vocab, (num,), generator=generator)
    labels[:1], labels[1:2] = 0, vocab - 1
    grad = torch.randn(num, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, grad


def score(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], *, chunk_size: int | None, vocab: int = VOCAB, **kwargs: Any
) -> dict[str, Tensor]:
    """Values and gradients; without a chunk size from `vocab_parallel_logprobs` of the whole logits."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in inputs[:2])
    _, _, labels, grad = inputs
    if chunk_size is None:
        logprobs, entropy = vocab_parallel_logprobs(F.linear(hidden, weight), labels, vocab_size=vocab, **kwargs)
    else:
        logprobs, entropy = linear_logprobs(hidden, weight, labels, vocab_size=vocab, chunk_size=chunk_size, **kwargs)
    (logprobs * grad.to(logprobs.dtype)).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {"logprobs": logprobs.detach(), "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, want in wanted.items():
        assert found[name].dtype == want.dtype, name
        assert found[name].shape == want.shape, name
        error = (found[name] - want).abs()
        assert not want.numel() or error.max() <= tolerance * max(1.0, float(want.abs().max())), name


class Recorder(TorchDispatchMode):
    """Counts matrix products and remembers the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("padded", [VOCAB, PADDED])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_chunks_of_any_size_equal_the_whole(dtype: torch.dtype, padded: int, temperature: float) -> None:
    for num, chunk_size in ((0, 4), (1, 4), (3, 4), (4, 4), (5, 4), (8, 4), (9, 4), (9, 1), (9, 8), (9, 9), (9, 1000)):
        inputs = make_inputs(num, dtype, padded=padded)
        found = score(inputs, chunk_size=chunk_size, temperature=temperature)
        wanted = score(inputs, chunk_size=None, temperature=temperature)
        assert_close(found, wanted, TOLERANCE[dtype])
        assert not found["weight"][VOCAB:].any()


@pytest.mark.parametrize("vocab", [152064, 49152 + 3])
def test_real_vocabularies_need_not_divide(vocab: int) -> None:
    inputs = make_inputs(5, torch.float32, vocab=vocab, padded=vocab + 125, width=4)
    wanted = score(inputs, chunk_size=None, vocab=vocab)
    assert_close(score(inputs, chunk_size=2, vocab=vocab), wanted, 1e-6)
    hidden, weight, labels, _ = inputs
    rows = F.linear(hidden.double(), weight[:vocab].double()).log_softmax(-1)
    assert (wanted["logprobs"] - rows[range(5), labels]).abs().max() <= 1e-5
    assert (wanted["entropy"] + (rows.exp() * rows).sum(-1)).abs().max() <= 1e-5


def test_gradcheck_in_float64() -> None:
    hidden, weight, labels, _ = make_inputs(5, torch.float64, vocab=7, padded=9, width=3)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, labels, vocab_size=7, chunk_size=2, temperature=1.3)[0], (hidden, weight)
    )


def test_bf16_computes_its_softmax_in_fp32() -> None:
    inputs = make_inputs(9, torch.bfloat16)
    found, wanted = score(inputs, chunk_size=4), score(inputs, chunk_size=None)
    assert found["logprobs"].dtype == found["entropy"].dtype == torch.float32
    for name, tolerance in (("logprobs", 1e-6), ("entropy", 1e-6), ("hidden", 2**-7), ("weight", 2**-7)):
        assert_close({name: found[name]}, {name: wanted[name]}, tolerance)


def test_the_weights_gradient_in_bf16_does_not_decay_with_the_number_of_chunks() -> None:
    num = 1024  # equal tokens: in bf16 a running sum stops growing at 256 summands
    hidden, weight, labels, _ = make_inputs(1, torch.bfloat16)
    inputs = (hidden.expand(num, -1), weight, labels.expand(num), torch.ones(num))
    wanted = score(inputs, chunk_size=None)["weight"].double()
    found = score(inputs, chunk_size=1)["weight"].double()
    assert (found - wanted).abs().max() <= 2**-7 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_and_without_autograd_the_values_are_the_same_bits(dtype: torch.dtype) -> None:
    hidden, weight, labels, _ = make_inputs(50, dtype)
    with torch.no_grad():
        before = linear_logprobs(hidden, weight, labels, vocab_size=VOCAB, chunk_size=16)
    after = linear_logprobs(hidden, weight, labels, vocab_size=VOCAB, chunk_size=16)
    assert after[0].requires_grad
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_a_tokens_values_do_not_depend_on_its_neighbours() -> None:
    hidden, weight, labels, _ = make_inputs(50, torch.float32)
    other = torch.cat([-3 * hidden[:20], hidden[20:21], 7 * hidden[21:]])
    for chunk_size in (16, 50):
        first = linear_logprobs(hidden, weight, labels, vocab_size=VOCAB, chunk_size=chunk_size)
        second = linear_logprobs(other, weight, labels, vocab_size=VOCAB, chunk_size=chunk_size)
        assert first[0][20] == second[0][20]
        assert first[1][20] == second[1][20]
        assert first[0][19] != second[0][19]


def test_no_array_is_larger_than_a_chunk_or_the_weight() -> None:
    inputs = make_inputs(512, torch.float32, width=2)
    with Recorder() as chunked:
        score(inputs, chunk_size=32)
    assert chunked.largest <= 2 * 32 * VOCAB  # the tile and its exponentials, here as large as the chunk
    with Recorder() as whole:
        score(inputs, chunk_size=None)
    assert whole.largest >= 512 * PADDED


@pytest.mark.parametrize(("num", "recomputed"), [(4, 0), (8, 1), (9, 2)])
def test_only_the_last_chunks_logits_are_not_made_again(num: int, recomputed: int) -> None:
    num_chunks = -(-num // 4)
    with Recorder() as recorder:
        score(make_inputs(num, torch.float32), chunk_size=4)
    assert recorder.calls["mm"] == num_chunks + recomputed + num_chunks  # forward, again, the gradient of hidden
    assert recorder.calls["addmm_"] == num_chunks


def test_a_second_backward_finds_the_same_gradients() -> None:
    hidden, weight, labels, grad = make_inputs(9, torch.float64)
    logprobs, _ = linear_logprobs(hidden, weight, labels, vocab_size=VOCAB, chunk_size=4)
    first, second = (torch.autograd.grad(logprobs, (hidden, weight), grad, retain_graph=True) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_a_frozen_input_gets_no_gradient() -> None:
    inputs = make_inputs(9, torch.float64)
    wanted = score(inputs, chunk_size=4)
    for frozen in (0, 1):
        leaves = [x.detach().requires_grad_(i != frozen) for i, x in enumerate(inputs[:2])]
        logprobs, entropy = linear_logprobs(*leaves, inputs[2], vocab_size=VOCAB, chunk_size=4)
        assert not entropy.requires_grad
        (logprobs * inputs[3]).sum().backward()
        assert leaves[frozen].grad is None
        assert torch.equal(leaves[1 - frozen].grad, wanted[("weight", "hidden")[frozen]])


def test_inputs_that_do_not_belong_together_are_an_error() -> None:
    hidden, weight, labels, _ = make_inputs(3, torch.float32)
    arguments = {"vocab_size": VOCAB, "chunk_size": 4}
    with pytest.raises(ValueError, match=r"hidden must be \[N, h\].*\[3, 16\], \[48, 16\] and \[2\]"):
        linear_logprobs(hidden, weight, labels[:2], **arguments)
    with pytest.raises(ValueError, match=r"hidden is torch.float64, but must be torch.float32"):
        linear_logprobs(hidden.double(), weight, labels, **arguments)
    with pytest.raises(ValueError, match=r"chunk_size is 0, but must be >= 1"):
        linear_logprobs(hidden, weight, labels, vocab_size=VOCAB, chunk_size=0)
    with pytest.raises(ValueError, match=r"temperature is 0.0, but must be a number > 0"):
        linear_logprobs(hidden, weight, labels, temperature=0.0, **arguments)
