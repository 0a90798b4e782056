"""Which address an engine listens on, and how its weights are packed for a broadcast."""

from __future__ import annotations

import pytest
import torch

from megatron_fipo.rollout.distributed_update import packed
from megatron_fipo.rollout.interface import address_towards, interface_name, listening_address
from megatron_fipo.weights.bucket import make_buckets


def test_an_engine_listens_on_loopback_unless_told_otherwise() -> None:
    assert listening_address(None) == "127.0.0.1"
    assert listening_address("lo") == "127.0.0.1"
    assert interface_name("127.0.0.1") == "lo"
    assert address_towards("127.0.0.1") == "127.0.0.1"


@pytest.mark.parametrize("interface", ["no-such0", "0.0.0.0", "", "203.0.113.9"])
def test_an_interface_that_this_machine_has_not_is_an_error(interface: str) -> None:
    with pytest.raises(ValueError, match=r"--rollout-interface is .*this machine's: .*lo \(127.0.0.1\)"):
        listening_address(interface)


def test_a_bucket_without_gaps_is_sent_as_it_lies() -> None:
    weights = [("a", torch.randn(4, 16)), ("b", torch.randn(8, 4).to(torch.bfloat16))]
    (bucket,) = make_buckets(weights, 1 << 20)
    flat, entries = packed(bucket)
    assert flat.data_ptr() == bucket.flat.data_ptr()
    assert [entry.name for entry in entries] == ["a", "b"]
    assert flat.numel() == 4 * 16 * 4 + 8 * 4 * 2


def test_a_bucket_with_gaps_is_packed_so_that_every_tensor_is_aligned() -> None:
    weights = [("half", torch.randn(3).to(torch.bfloat16)), ("full", torch.randn(5)), ("other", torch.randn(7))]
    (bucket,) = make_buckets(weights, 1 << 20)
    flat, entries = packed(bucket)
    assert [entry.name for entry in entries] == ["full", "other", "half"]
    start = 0
    for entry in entries:
        size = entry.end - entry.start
        assert start % entry.dtype.itemsize == 0
        assert torch.equal(flat[start : start + size].view(entry.dtype), dict(weights)[entry.name])
        start += size
    assert start == flat.numel()
