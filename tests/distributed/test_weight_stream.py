"""The actor's weights in buckets: the checkpoint's bits on every receiver, in every layout, with few transfers and no
more memory than told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from actor_on_ranks import make_actor, make_groups
from processes import run_ranks
from tiny_models import save_model

from megatron_fipo.actor import weight_stream
from megatron_fipo.weights import fp8
from megatron_fipo.weights.architecture import hf_shapes, read_architecture
from megatron_fipo.weights.hf_files import HFWeights

MODELS = {"llama": False, "qwen2": True, "qwen3": False, "qwen3_moe": False}  # family -> tied
BUCKET_BYTES = 30_000
EVERYTHING = 1 << 30
LAYOUTS: dict[str, tuple[int, str, dict[str, Any], list[int]]] = {  # ranks, model, layout, receivers
    "one process": (1, "qwen2", {}, [0]),
    "tp2": (2, "qwen2", {"tp": 2}, [0]),
    "tp2, both receive": (2, "llama", {"tp": 2}, [0, 1]),
    "pp2 tied": (2, "qwen2", {"pp": 2}, [0]),
    "pp2, the last receives": (2, "qwen3", {"pp": 2}, [1]),
    "pp2 vpp2, both receive": (2, "llama", {"pp": 2, "vpp": 2}, [0, 1]),
    "cp2": (2, "llama", {"cp": 2}, [0, 1]),
    "dp2": (2, "qwen3", {}, [0, 1]),
    "ep2": (2, "qwen3_moe", {"ep": 2}, [0, 1]),
    "tp2 sp ep2 etp1": (2, "qwen3_moe", {"tp": 2, "sp": True, "ep": 2, "etp": 1}, [0, 1]),
    "tp2 pp2": (4, "qwen2", {"tp": 2, "pp": 2}, [0, 3]),
    "tp2 dp2": (4, "llama", {"tp": 2}, [0, 2]),
    "tp2 sp ep2": (4, "qwen3_moe", {"tp": 2, "sp": True, "ep": 2}, [0, 1, 2]),
    "ep2 etp2": (4, "qwen3_moe", {"ep": 2, "etp": 2}, [0, 3]),
    "pp2 ep2": (4, "qwen3_moe", {"pp": 2, "ep": 2}, [1, 2]),
}


def test_a_small_model_is_cut_into_enough_buckets_to_overlap() -> None:
    mib = 1 << 20
    assert weight_stream.bucket_size(100 << 30, 256 * mib) == 256 * mib
    assert weight_stream.bucket_size(256 * mib, 256 * mib) == 68 * mib
    assert weight_stream.bucket_size(8 * mib, 256 * mib) == 16 * mib
    assert weight_stream.bucket_size(256 * mib, mib) == mib, "never more than was asked for"


def stream(directory: str, layouts: dict[str, tuple[int, str, dict[str, Any], list[int]]]) -> dict[str, dict[str, Any]]:
    """In each layout: what arrives here in small buckets, in large ones, and one tensor at a time."""
    from megatron.core import parallel_state

    found = {}
    for name, (_, model, sizes, receivers) in layouts.items():
        print("layout", name, flush=True)
        actor = make_actor(f"{directory}/{model}", *make_groups(**sizes), bf16=True)
        result: dict[str, Any] = {"sizes": [], "num_tensors": [], "buckets": {}, "whole": {}}
        for bucket in actor.export_buckets(BUCKET_BYTES, receivers=receivers):
            bucket.verify()
            result["sizes"].append(bucket.size_bytes)
            result["num_tensors"].append(len(bucket.entries))
            for tensor_name, tensor in bucket.tensors():
                assert tensor_name not in result["buckets"], tensor_name
                result["buckets"][tensor_name] = tensor.clone()
        calls = count_calls()
        for bucket in actor.export_buckets(EVERYTHING, receivers=receivers):
            result["whole"] |= dict(bucket.tensors())
        result["calls"] = dict(calls)
        calls.clear()
        result["tensors"] = {key: value.clone() for key, value in actor.export_weights()}
        result["calls_per_tensor"] = dict(calls)
        found[name] = result
        parallel_state.destroy_model_parallel()
    return found


def count_calls() -> dict[str, int]:
    """Calls of torch.distributed by name, from now on."""
    counted: dict[str, int] = {}

    def counting(name: str) -> Any:
        original = getattr(dist, name)
        original = getattr(original, "uncounted", original)

        def call(*args: Any, **kwargs: Any) -> Any:
            counted[name] = counted.get(name, 0) + 1
            return original(*args, **kwargs)

        call.uncounted = original  # type: ignore[attr-defined]
        return call

    for name in ("P2POp", "batch_isend_irecv", "send", "recv", "all_gather"):
        setattr(dist, name, counting(name))
    return counted


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for family, tied in MODELS.items():
        save_model(directory / family, family, tied=tied)
    return directory


@pytest.fixture(scope="module")
def streamed(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Per layout, what every rank found."""
    found: dict[str, list[dict[str, Any]]] = {}
    for num_ranks in (1, 2, 4):
        some = {name: layout for name, layout in LAYOUTS.items() if layout[0] == num_ranks}
        kwargs = {"directory": str(directory), "layouts": some}
        ranks = run_ranks(tmp_path_factory.mktemp("ranks"), num_ranks, stream, kwargs, timeout_s=240)
        found |= {name: [rank[name] for rank in ranks] for name in some}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_receiver_gets_the_checkpoint_bit_for_bit(
    layout: str, streamed: dict[str, list[dict[str, Any]]], directory: Path
) -> None:
    _, model, _, receivers = LAYOUTS[layout]
    weights = HFWeights(directory / model)
    wanted = {name: weights.read(name).bfloat16() for name in hf_shapes(read_architecture(directory / model))}
    assert ("lm_head.weight" in wanted) != MODELS[model]
    for rank, found in enumerate(streamed[layout]):
        if rank not in receivers:
            assert found["sizes"] == []
            assert found["whole"] == {}
            continue
        for kind in ("buckets", "whole"):
            assert found[kind].keys() == wanted.keys()
            for name, value in wanted.items():
                assert torch.equal(found[kind][name], value), (kind, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_buckets_and_single_tensors_are_the_same_bits_in_the_same_order(
    layout: str, streamed: dict[str, list[dict[str, Any]]]
) -> None:
    single = streamed[layout][0]["tensors"]
    for rank in LAYOUTS[layout][3]:
        found = streamed[layout][rank]["buckets"]
        assert list(found) == list(single)
        assert all(torch.equal(found[name], value) for name, value in single.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_bucket_is_larger_than_asked_unless_it_is_one_tensor(
    layout: str, streamed: dict[str, list[dict[str, Any]]]
) -> None:
    for rank in LAYOUTS[layout][3]:
        found = streamed[layout][rank]
        assert len(found["sizes"]) > 3
        assert all(
            size <= BUCKET_BYTES or count == 1 for size, count in zip(found["sizes"], found["num_tensors"], strict=True)
        )


@pytest.mark.parametrize("layout", ["tp2", "pp2 tied", "ep2", "tp2 pp2", "pp2 ep2"])
def test_a_bucket_takes_a_tenth_of_the_calls_of_single_tensors(
    layout: str, streamed: dict[str, list[dict[str, Any]]]
) -> None:
    in_buckets = sum(found["calls"]["P2POp"] for found in streamed[layout])
    single = sum(sum(found["calls_per_tensor"].values()) for found in streamed[layout])
    single *= len(LAYOUTS[layout][3])  # one receiver's
    assert 0 < 10 * in_buckets <= single, (in_buckets, single)


@pytest.mark.parametrize("layout", ["tp2, both receive", "pp2 tied", "tp2 pp2", "tp2 sp ep2"])
def test_all_transfers_of_a_piece_are_one_batch(layout: str, streamed: dict[str, list[dict[str, Any]]]) -> None:
    """Outside of one, NCCL makes a communicator for each pair of ranks, which stays."""
    num_pieces = LAYOUTS[layout][2].get("pp", 1)  # in one bucket that takes all
    for found in streamed[layout]:
        calls = found["calls"]
        assert 1 <= calls["batch_isend_irecv"] <= num_pieces
        assert calls.keys() == {"batch_isend_irecv", "P2POp"}


def in_fp8(directory: str) -> dict[str, torch.Tensor]:
    actor = make_actor(directory, *make_groups(tp=2), bf16=True)
    found = {}
    for bucket in actor.export_buckets(BUCKET_BYTES, receivers=[0], fp8=True):
        bucket.verify()
        found |= {name: tensor.clone() for name, tensor in bucket.tensors()}
    return found


def test_linear_weights_arrive_in_fp8_with_their_scales(directory: Path, tmp_path: Path) -> None:
    found, nothing = run_ranks(tmp_path, 2, in_fp8, {"directory": str(directory / "qwen2")})
    assert nothing == {}
    weights = HFWeights(directory / "qwen2")
    names = list(hf_shapes(read_architecture(directory / "qwen2")))
    for name in names:
        whole = weights.read(name).bfloat16()
        if fp8.is_quantised(name):
            quantised, scale_inv = fp8.quantise(whole)
            assert torch.equal(found.pop(name).view(torch.uint8), quantised.view(torch.uint8))
            assert torch.equal(found.pop(f"{name}_scale_inv"), scale_inv)
        else:
            assert torch.equal(found.pop(name), whole)
    assert found == {}


def in_flight(directory: str) -> int:
    """The most transfers that were posted and not finished at any one time, over buckets of a few tensors."""
    actor = make_actor(directory, *make_groups(pp=2), bf16=True)
    posted, most = 0, 0
    start, shards = weight_stream._start, weight_stream._shards

    def starting(*args: Any) -> Any:
        nonlocal posted, most
        posted += 1
        most = max(most, posted)
        return start(*args)

    def packing(*args: Any) -> Any:
        nonlocal posted
        posted -= 1
        return shards(*args)

    weight_stream._start, weight_stream._shards = starting, packing
    for _ in actor.export_buckets(BUCKET_BYTES, receivers=[0, 1]):
        pass
    return most


def test_no_more_than_the_next_piece_is_on_its_way(directory: Path, tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 2, in_flight, {"directory": str(directory / "llama")}) == [2, 2]
