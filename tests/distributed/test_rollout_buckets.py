"""Flat weight buckets: what goes in comes out, in another process too, and nothing stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_fipo.weights.bucket import BucketWriter, WeightBucket, make_buckets
from megatron_fipo.weights.buffers import BucketBuffers

# A process that knows nothing of ours opens a handle, prints what it finds and writes nothing.
RECEIVER = """
import base64, json, pickle, sys
import torch
((header, flat),) = pickle.loads(base64.b64decode(sys.stdin.read()))
for name, shape, dtype, start, end in json.loads(header)["entries"]:
    tensor = flat[start:end].view(getattr(torch, dtype)).reshape(shape)
    print(name, tuple(tensor.shape), str(tensor.dtype), float(tensor.double().sum()), end - start)
del tensor, flat
"""


def some_tensors() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        ("odd.bf16", torch.randn(7, 3, generator=generator).to(torch.bfloat16)),
        ("fp32", torch.randn(5, 9, generator=generator)),
        ("transposed", torch.randn(6, 4, generator=generator).T),
        ("scalar", torch.tensor(2.5)),
        ("large", torch.randn(1000, generator=generator)),
        ("last", torch.arange(3.0)),
    ]


def contents(buckets: list[WeightBucket]) -> dict[str, Tensor]:
    return {name: tensor for bucket in buckets for name, tensor in bucket.tensors()}


@pytest.mark.parametrize("bucket_bytes", [1, 100, 256, 5000, 1 << 20])
def test_buckets_hold_every_tensor_unchanged_and_in_order(bucket_bytes: int) -> None:
    tensors = some_tensors()
    buckets = list(make_buckets(tensors, bucket_bytes))
    found = contents(buckets)
    assert list(found) == [name for name, _ in tensors]
    for name, tensor in tensors:
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    for bucket in buckets:
        assert bucket.size_bytes <= bucket_bytes or len(bucket.entries) == 1


def test_a_bucket_is_filled_only_when_asked_for() -> None:
    read = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for index in range(4):
            read.append(index)
            yield f"w{index}", torch.full((100,), float(index))

    buckets = make_buckets(stream(), 400)
    next(buckets)
    assert read == [0, 1]


def test_a_bucket_is_a_copy() -> None:
    weight = torch.ones(10)
    (bucket,) = make_buckets([("w", weight)], 1 << 20)
    weight.zero_()
    assert contents([bucket])["w"].sum() == 10


def test_a_repeated_or_empty_weight_is_an_error() -> None:
    with pytest.raises(ValueError, match="w was sent twice"):
        list(make_buckets([("w", torch.ones(1)), ("w", torch.ones(1))], 100))
    with pytest.raises(ValueError, match=r"w is empty: shape \(0, 3\)"):
        list(make_buckets([("w", torch.ones(0, 3))], 100))
    with pytest.raises(ValueError, match="bucket_bytes is 0"):
        list(make_buckets([("w", torch.ones(1))], 0))


def test_another_process_opens_every_handle_and_the_memory_is_freed() -> None:
    strategy = torch.multiprocessing.get_sharing_strategy()
    tensors = some_tensors()
    (bucket,) = make_buckets(tensors, 1 << 20)
    expected = [
        f"{name} {tuple(tensor.shape)} {tensor.dtype} {float(tensor.double().sum())} {tensor.nbytes}"
        for name, tensor in tensors
    ]
    for _ in range(2):  # two engines, or two tensor-parallel ranks
        answer = subprocess.run(
            [sys.executable, "-c", RECEIVER], input=bucket.handle(), capture_output=True, text=True, check=True
        )
        assert answer.stdout.splitlines() == expected
    assert torch.multiprocessing.get_sharing_strategy() == strategy
    del bucket
    deadline = time.monotonic() + 5
    while segments() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert segments() == []


def segments() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"torch_{os.getpid()}_")]


def test_memory_is_written_again_only_when_nothing_refers_to_it() -> None:
    buffers, cpu = BucketBuffers(), torch.device("cpu")

    def bucket(value: float) -> WeightBucket:
        writer = BucketWriter([("w", (50,), torch.float32)], cpu, buffers, capacity_bytes=1024)
        writer.write([torch.full((50,), value)])
        return writer.finish()

    first = bucket(1.0)
    address = first.flat.data_ptr()
    view = dict(first.tensors())["w"]
    del first
    second = bucket(2.0)
    assert second.flat.data_ptr() != address  # a view of the first is still about
    assert torch.equal(view, torch.ones(50))
    del view
    third = bucket(3.0)
    assert third.flat.data_ptr() == address
    for kept, value in ((second, 2.0), (third, 3.0)):
        kept.verify()
        assert torch.equal(dict(kept.tensors())["w"], torch.full((50,), value))


def test_a_handle_opens_the_window_of_a_larger_buffer() -> None:
    writer = BucketWriter([("w", (3,), torch.float32)], torch.device("cpu"), BucketBuffers(), capacity_bytes=1 << 16)
    writer.write([torch.tensor([1.0, 2.0, 4.0])])
    bucket = writer.finish()
    answer = subprocess.run(
        [sys.executable, "-c", RECEIVER], input=bucket.handle(), capture_output=True, text=True, check=True
    )
    assert answer.stdout.splitlines() == ["w (3,) torch.float32 7.0 12"]
