"""The checksum of a bucket sees whatever may happen to bytes, names and places, and depends on nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_fipo.rollout.weight_loader import load_bucket
from megatron_fipo.weights.bucket import WeightBucket, make_buckets, received_bucket
from megatron_fipo.weights.checksum import ROW_WORDS, RunningChecksum, _add_whole, checksum

SIZES = [8, 64, 8 * ROW_WORDS, 8 * ROW_WORDS + 8, 17 * 8 * ROW_WORDS, 150 * 8 * ROW_WORDS + 4096]


def noise(size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def reference(flat: Tensor) -> tuple[list[int], list[int]]:
    """Row and column sums modulo 2**64, in Python's integers."""
    words = flat.view(torch.int64).tolist()
    rows = [0] * -(-len(words) // ROW_WORDS)
    columns = [0] * ROW_WORDS
    for index, word in enumerate(words):
        rows[index // ROW_WORDS] += word
        columns[index % ROW_WORDS] += word
    wrap = 1 << 64
    return [row % wrap for row in rows], [column % wrap for column in columns]


def test_the_sums_are_those_of_the_definition() -> None:
    flat = noise(3 * 8 * ROW_WORDS + 800)
    running = RunningChecksum(flat)
    running.finish(b"")
    rows, columns = reference(flat)
    assert [int(row) % (1 << 64) for row in running._rows] == rows
    assert [int(column) % (1 << 64) for column in running._columns] == columns


def test_the_compiled_sums_are_those_of_the_tensor_operations_which_a_gpu_makes() -> None:
    for size in SIZES:
        words = noise(size).view(torch.int64)
        rows, columns = torch.zeros(-(-words.numel() // ROW_WORDS), dtype=torch.int64), torch.zeros(ROW_WORDS).long()
        _add_whole(words, rows, columns)
        running = RunningChecksum(words.view(torch.uint8))
        running.finish(b"")
        assert torch.equal(running._rows, rows)
        assert torch.equal(running._columns, columns)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda noise: noise, id="whole words"),
        pytest.param(lambda noise: noise.view(torch.bfloat16).view(-1, 64).T, id="transposed"),
        pytest.param(lambda noise: noise[:-2].view(torch.bfloat16), id="not whole words"),
        pytest.param(lambda noise: noise[2:-6].view(torch.bfloat16), id="not from a word on"),
        pytest.param(lambda noise: noise[:800].view(torch.bfloat16), id="small"),
    ],
)
@pytest.mark.parametrize("start", [0, 64, 8 * ROW_WORDS + 192, 4])
def test_copying_gives_the_bytes_and_their_checksum(source: Callable[[Tensor], Tensor], start: int) -> None:
    tensor = source(noise((1 << 19) + 128))
    flat = noise(1 << 20, seed=1)
    expected = flat.clone()
    expected[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
    running = RunningChecksum(flat)
    running.copy(tensor, start)
    found = running.finish(b"label")
    assert torch.equal(flat, expected)
    assert found == checksum(expected, b"label")


@pytest.mark.parametrize("size", SIZES)
def test_it_does_not_depend_on_the_steps_it_was_made_in(size: int) -> None:
    flat = noise(size)
    wanted = checksum(flat, b"label")
    for steps in ([], [size // 3, size // 2], list(range(0, size, size // 7 + 1))):
        for advance in (RunningChecksum.advance, RunningChecksum.advance_past):
            running = RunningChecksum(flat)
            for end in steps:
                advance(running, end // 8 * 8)
            assert running.finish(b"label") == wanted
    assert 0 <= wanted < 1 << 63


@pytest.mark.parametrize("size", SIZES)
def test_every_flipped_bit_is_seen(size: int) -> None:
    flat = noise(size)
    wanted = checksum(flat, b"")
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        place, bit = (
            int(torch.randint(size, (1,), generator=generator)),
            int(torch.randint(8, (1,), generator=generator)),
        )
        flat[place] ^= 1 << bit
        assert checksum(flat, b"") != wanted
        flat[place] ^= 1 << bit
    assert checksum(flat, b"") == wanted


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda words: words[[1, 0]], id="two words of a row swapped"),
        pytest.param(lambda words: words.roll(1), id="moved by a word"),
        pytest.param(lambda words: words.roll(ROW_WORDS), id="moved by a row"),
        pytest.param(lambda words: words.view(2, -1).flip(0).flatten(), id="halves swapped"),
        pytest.param(lambda words: words.flip(0), id="reversed"),
        pytest.param(torch.zeros_like, id="zeros"),
        pytest.param(lambda words: words ^ (1 << 62), id="one bit of every word"),
        pytest.param(lambda words: torch.cat([words[:-1], words[-1:] * 0]), id="the end cut off and filled with zeros"),
        pytest.param(lambda words: words[:-1], id="the end cut off"),
        pytest.param(lambda words: torch.cat([words, words[:1] * 0]), id="a zero more"),
    ],
)
def test_harm_to_many_words_is_seen(harm: Callable[[Tensor], Tensor]) -> None:
    words = noise(4 * 8 * ROW_WORDS).view(torch.int64)
    changed = words.clone()
    found = harm(words)
    if found.numel() == 2:
        changed[:2] = found
    else:
        changed = found
    assert checksum(changed.view(torch.uint8), b"") != checksum(words.view(torch.uint8), b"")


def a_bucket() -> WeightBucket:
    tensors = [(f"w{index}", torch.randn(300, 7, generator=torch.Generator().manual_seed(index))) for index in range(3)]
    (bucket,) = make_buckets(tensors, 1 << 20)
    return bucket


class Model:
    """Takes weights as SGLang's models do: one by one, by name."""

    def __init__(self, *, stops_after: int | None = None) -> None:
        self.weights: dict[str, Tensor] = {}
        self.stops_after = stops_after

    def load_weights(self, weights) -> None:
        for name, tensor in weights:
            self.weights[name] = tensor.clone()
            if len(self.weights) == self.stops_after:
                break


def test_the_loader_loads_what_was_sent() -> None:
    bucket, model = a_bucket(), Model()
    load_bucket(model, [(bucket.header(), bucket.flat)])
    assert list(model.weights) == ["w0", "w1", "w2"]
    for name, tensor in bucket.tensors():
        assert torch.equal(model.weights[name], tensor)


def test_the_loader_refuses_a_changed_byte() -> None:
    bucket = a_bucket()
    bucket.flat[-100] ^= 1
    with pytest.raises(ValueError, match=r"weight bucket refused: its checksum is \w{16}, not \w{16} \(w0 .. w2\)"):
        load_bucket(Model(), [(bucket.header(), bucket.flat)])


def test_the_loader_refuses_swapped_names() -> None:
    bucket = a_bucket()
    first, second, third = bucket.entries
    swapped = (dataclasses.replace(first, name="w1"), dataclasses.replace(second, name="w0"), third)
    with pytest.raises(ValueError, match="weight bucket refused: its checksum"):
        load_bucket(Model(), [(dataclasses.replace(bucket, entries=swapped).header(), bucket.flat)])


def test_the_loader_refuses_a_bucket_that_is_cut_short() -> None:
    bucket = a_bucket()
    with pytest.raises(ValueError, match=r"weight bucket refused: .*name='w2'.* does not lie in its \d+ bytes"):
        load_bucket(Model(), [(bucket.header(), bucket.flat[:-4096])])


def test_the_loader_refuses_a_header_that_is_none() -> None:
    with pytest.raises(ValueError, match="weight bucket refused: its header is not one"):
        received_bucket('{"entries": [["w", [1], "complex64", 0, 8]], "checksum": "0", "is_reused": false}', noise(64))


def test_the_loader_refuses_a_model_that_does_not_take_everything() -> None:
    bucket = a_bucket()
    with pytest.raises(ValueError, match="weight bucket refused: SGLang's Model did not take w2"):
        load_bucket(Model(stops_after=2), [(bucket.header(), bucket.flat)])
