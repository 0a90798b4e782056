"""Log-probs and entropy of whole logits equal torch's log_softmax: values, gradients, padding, dtypes.

Sharded over ranks: tests/distributed/test_logprobs_sharded.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_fipo.ops.linear_logprobs import linear_logprobs
from megatron_fipo.ops.logprobs import vocab_parallel_logprobs

NUM, VOCAB, PADDED = 9, 37, 48


def make_inputs(dtype: torch.dtype, *, width: int = PADDED) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N, width] whose padding would win every softmax, labels [N] with both ends, an upstream gradient [N]."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(NUM, width, generator=generator, dtype=torch.float64)
    logits[:, VOCAB:] = 50.0
    labels = torch.randint(0, VOCAB, (NUM,), generator=generator)
    labels[0], labels[1] = 0, VOCAB - 1
    return logits.to(dtype).requires_grad_(), labels, torch.randn(NUM, generator=generator, dtype=torch.float64)


def reference(logits: Tensor, labels: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float64: log-probs, entropy, and the gradient of (log-probs * grad).sum() by logits."""
    x = logits.detach().double().requires_grad_()
    rows = x[:, :VOCAB].log_softmax(-1)
    logprobs = rows.gather(1, labels[:, None])[:, 0]
    (logprobs * grad).sum().backward()
    assert x.grad is not None
    return logprobs.detach(), -(rows.exp() * rows).sum(-1).detach(), x.grad


@pytest.mark.parametrize(
    ("dtype", "tolerance", "grad_tolerance"),
    # the inputs are rounded before the comparison, so that only bf16's gradient carries a rounding of bf16 (2^-9)
    [(torch.float64, 1e-12, 1e-12), (torch.float32, 3e-6, 3e-6), (torch.bfloat16, 3e-6, 8e-3)],
)
@pytest.mark.parametrize("width", [VOCAB, PADDED])
def test_values_and_gradients_are_log_softmaxs(
    dtype: torch.dtype, tolerance: float, grad_tolerance: float, width: int
) -> None:
    logits, labels, grad = make_inputs(dtype, width=width)
    logprobs, entropy = vocab_parallel_logprobs(logits, labels, vocab_size=VOCAB)
    wanted, wanted_entropy, wanted_grad = reference(logits, labels, grad)
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    assert (logprobs.dtype, entropy.dtype) == (computed_in, computed_in)
    assert (logprobs.double() - wanted).abs().max() <= tolerance
    assert (entropy.double() - wanted_entropy).abs().max() <= tolerance
    (logprobs * grad.to(computed_in)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    assert (logits.grad.double() - wanted_grad).abs().max() <= grad_tolerance
    assert not logits.grad[:, VOCAB:].any()


def test_gradcheck_in_float64() -> None:
    logits, labels, _ = make_inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_logprobs(x, labels, vocab_size=VOCAB)[0], (logits,))


def test_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e4, -3e4, -3e4]])
    logprobs, entropy = vocab_parallel_logprobs(logits, torch.tensor([1, 2]), vocab_size=3)
    assert logprobs.tolist() == pytest.approx([-6e4, -1.0986123])
    assert entropy.tolist() == pytest.approx([0.0, 1.0986123])


def test_the_entropy_carries_no_gradient_and_the_logits_are_left_alone() -> None:
    logits, labels, _ = make_inputs(torch.float32)
    before = logits.detach().clone()
    _, entropy = vocab_parallel_logprobs(logits, labels, vocab_size=VOCAB)
    assert not entropy.requires_grad
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_temperature_divides_the_logits(dtype: torch.dtype) -> None:
    logits, labels, grad = make_inputs(dtype)
    logprobs, entropy = vocab_parallel_logprobs(logits, labels, vocab_size=VOCAB, temperature=0.6)
    (logprobs * grad.to(dtype)).sum().backward()
    wanted, wanted_entropy, wanted_grad = reference(logits.detach().double() / 0.6, labels, grad)
    tolerance = 1e-12 if dtype == torch.float64 else 6e-6  # one more rounding, of values up to 30
    assert (logprobs - wanted).abs().max() <= tolerance
    assert (entropy - wanted_entropy).abs().max() <= tolerance
    assert logits.grad is not None
    assert (logits.grad - wanted_grad / 0.6).abs().max() <= tolerance


def test_rows_do_not_depend_on_how_many_share_a_tile() -> None:
    """152064 columns leave one row to a tile, 37 put all rows into one."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 152064, generator=generator, dtype=torch.float64)
    labels = torch.tensor([5, 70000, 152063])
    logprobs, entropy = vocab_parallel_logprobs(logits, labels, vocab_size=152064)
    rows = logits.log_softmax(-1)
    assert (logprobs - rows[range(3), labels]).abs().max() <= 1e-12
    assert (entropy + (rows.exp() * rows).sum(-1)).abs().max() <= 1e-11


def test_no_position_at_all_is_fine() -> None:
    logits = torch.zeros(0, VOCAB, requires_grad=True)
    logprobs, entropy = vocab_parallel_logprobs(logits, torch.zeros(0, dtype=torch.int64), vocab_size=VOCAB)
    assert (logprobs.shape, entropy.shape) == ((0,), (0,))
    logprobs.sum().backward()
    assert logits.grad is not None


def test_shapes_that_do_not_belong_together_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"logits must be \[N, V\] and labels \[N\], but are \[2, 3\] and \[3\]"):
        vocab_parallel_logprobs(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), vocab_size=3)
    with pytest.raises(ValueError, match=r"temperature is -1.0, but must be a number > 0"):
        vocab_parallel_logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), vocab_size=3, temperature=-1.0)


@pytest.mark.parametrize("labels", [[0, -100], [3, 0]])
def test_labels_outside_the_vocabulary_are_an_error(labels: list[int]) -> None:
    message = rf"labels go from {min(labels)} to {max(labels)}, but must be in \[0, 3\)"
    logits = torch.zeros(2, 5)  # of which two columns are padding
    with pytest.raises(ValueError, match=message):
        vocab_parallel_logprobs(logits, torch.tensor(labels), vocab_size=3)
    with pytest.raises(ValueError, match=message):
        linear_logprobs(logits, torch.zeros(5, 5), torch.tensor(labels), vocab_size=3, chunk_size=1)


def test_a_vocabulary_larger_than_the_columns_is_an_error() -> None:
    with pytest.raises(ValueError, match="vocab_size is 6, but must be from 1 to the 5 columns"):
        vocab_parallel_logprobs(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), vocab_size=6)
