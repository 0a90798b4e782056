"""Weights into an engine: flat buckets beside an update of one tensor at a time, and beside the copy floor.

Two receivers, one run, everything on one thread, contestants by turns, medians after warm-up:

* a real SGLang engine on the given model, fed by our actor on one rank;
* a process that copies what it is sent into tensors of its own, fed the given model's tensors, and Qwen3-30B-A3B's
  (18,867 names), their sizes scaled down to memory.

One tensor at a time is measured on every k-th tensor, about 500 of them, and multiplied; into SGLang, on all. The
floor is one copy of every tensor into shared memory and one copy out of it, both into memory that has been written
before, in one process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing
from torch import Tensor

from megatron_fipo.actor.weight_stream import bucket_size
from megatron_fipo.rollout.weight_loader import load_bucket
from megatron_fipo.weights.architecture import Architecture, hf_shapes, read_architecture
from megatron_fipo.weights.bucket import WeightBucket, make_buckets
from megatron_fipo.weights.buffers import BucketBuffers
from megatron_fipo.weights.checksum import RunningChecksum
from megatron_fipo.weights.hf_files import HFWeights

Tensors = list[tuple[str, Tensor]]
CALLS_GOAL, FLOOR_GOAL, CHECKSUM_GOAL = 10, 3.0, 0.10
QWEN3_30B_A3B = Architecture(
    family="qwen3_moe",
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_attention_heads=32,
    num_query_groups=4,
    kv_channels=128,
    vocab_size=151936,
    norm_epsilon=1e-6,
    rope_theta=1e6,
    rope_scaling_factor=None,
    max_position_embeddings=40960,
    tied=False,
    qkv_bias=False,
    qk_layernorm=True,
    dtype=torch.bfloat16,
    num_moe_experts=128,
    moe_router_topk=8,
    moe_ffn_hidden_size=768,
    moe_router_pre_softmax=False,
)


def main() -> None:
    """Measure and print one table for each receiver."""
    options = _parse()
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")
    model = tensors_of(options.hf_checkpoint)
    print(f"one thread, medians of {options.repeats} after {options.warmup} warm-ups, seconds")
    into_process(f"{options.hf_checkpoint.name} into a copying process", model, options)
    into_process("Qwen3-30B-A3B's tensors, scaled, into a copying process", scaled_30b(options.scale), options)
    if not options.skip_engine:
        into_engine(model, options)


def tensors_of(model_dir: Path) -> Tensors:
    """The model's own tensors in bf16."""
    weights = HFWeights(model_dir)
    return [(name, weights.read(name).bfloat16().clone()) for name in hf_shapes(read_architecture(model_dir))]


def scaled_30b(scale: int) -> Tensors:
    """Random tensors under Qwen3-30B-A3B's names, every dimension divided by `scale` (the experts' number is kept)."""
    arch = QWEN3_30B_A3B
    assert arch.moe_ffn_hidden_size is not None
    small = replace(
        arch,
        hidden_size=arch.hidden_size // scale,
        kv_channels=arch.kv_channels // scale,
        vocab_size=arch.vocab_size // scale,
        moe_ffn_hidden_size=arch.moe_ffn_hidden_size // scale,
    )
    return [(name, torch.randn(shape).bfloat16()) for name, shape in hf_shapes(small).items()]


def into_process(title: str, tensors: Tensors, options: argparse.Namespace) -> None:
    """Buckets with and without checksums, and single tensors, into a process that copies them."""
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors]
    process = context.Process(target=receive, args=(theirs, shapes), daemon=True)
    process.start()
    buffers, of_single_tensors = BucketBuffers(), BucketBuffers()
    largest = max(tensor.nbytes for _, tensor in tensors)
    bucket_bytes = bucket_size(sum(tensor.nbytes for _, tensor in tensors), options.bucket_mb << 20)

    def send(tensors: Tensors, bytes_at_once: int, is_verified: bool) -> int:
        num_calls, sent = 0, None  # the bucket that the process copies while the next one is packed
        with checksums(is_verified):
            pool = buffers if bytes_at_once > 1 else of_single_tensors
            for bucket in make_buckets(tensors, bytes_at_once, pool, largest_bytes=largest):
                if sent is not None:
                    assert ours.recv() == len(sent.entries)
                memory = bucket.flat if bucket.home is None else bucket.home
                ours.send((bucket.header(), memory, is_verified))
                sent, num_calls = bucket, num_calls + 1
            assert sent is not None
            assert ours.recv() == len(sent.entries)
        return num_calls

    sample, whole = tensors[:: -(-len(tensors) // 500)], tensors
    contestants: dict[str, Callable[[], int]] = {
        "copy floor": copy_floor(tensors),
        "buckets": lambda: send(whole, bucket_bytes, True),
        "buckets, no checksum": lambda: send(whole, bucket_bytes, False),
        "one tensor at a time": lambda: send(sample, 1, True),
    }
    found = measure(contestants, options)
    seconds, num_calls = found["one tensor at a time"]
    found["one tensor at a time"] = (seconds * len(tensors) / num_calls, len(tensors))
    ours.send(None)
    process.join()
    print_table(title, tensors, found)


def receive(connection: Connection, shapes: list[tuple[str, tuple[int, ...]]]) -> None:
    """Copy every bucket's tensors into tensors of this process, as an engine's loader does, until told to stop."""
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")
    model = Copies(shapes)
    while (message := connection.recv()) is not None:
        header, flat, is_verified = message
        with checksums(is_verified):
            load_bucket(model, [(header, flat)])
        del message, flat
        connection.send(model.num_taken)


class Copies:
    """A model as the loader knows it."""

    def __init__(self, shapes: list[tuple[str, tuple[int, ...]]]) -> None:
        self.own = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes}
        self.num_taken = 0

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.num_taken = 0
        for name, tensor in tensors:
            self.own[name].copy_(tensor)
            self.num_taken += 1


def into_engine(tensors: Tensors, options: argparse.Namespace) -> None:
    """The actor's own export into a SGLang server, from the request to stop serving to the first that is let in."""
    from megatron_fipo.rollout.pool import EnginePool
    from megatron_fipo.rollout.server_process import start_engine

    with tempfile.TemporaryDirectory() as scratch:
        engine = start_engine(
            str(options.hf_checkpoint),
            name="engine",
            dtype="bfloat16",
            tp_size=1,
            context_length=512,
            random_seed=0,
            log_path=f"{scratch}/engine.log",
            start_timeout_s=600,
            request_timeout_s=600,
            server_args={"max_total_tokens": 2048},
            use_cpu=True,
        )
        try:
            actor = make_actor(options.hf_checkpoint)
            engine.wait_ready()
            versions = iter(range(1, 1 << 30))

            pool = EnginePool([engine])

            def sync(buckets: Callable[[], Iterator[WeightBucket]]) -> int:
                num_calls = 0
                pool.begin_weight_update()
                for bucket in buckets():
                    pool.push_bucket(bucket)
                    num_calls += 1
                pool.end_weight_update(next(versions))
                return num_calls

            def nothing_sent() -> int:
                for bucket in actor.export_buckets(options.bucket_mb << 20):
                    bucket.verify()  # what the engine does too, on a bucket that is out of the caches
                return 0

            contestants: dict[str, Callable[[], int]] = {
                "copy floor": copy_floor(tensors),
                "buckets": lambda: sync(lambda: actor.export_buckets(options.bucket_mb << 20)),
                "one tensor at a time": lambda: sync(lambda: make_buckets(actor.export_weights(), 1)),
                "packed and verified, not sent": nothing_sent,
            }
            print_table(f"{options.hf_checkpoint.name} into SGLang", tensors, measure(contestants, options))
        finally:
            engine.shutdown()
    torch.distributed.destroy_process_group()


def make_actor(model_dir: Path) -> Any:
    """Our actor on this one rank."""
    from megatron_fipo.actor.actor import build_actor
    from megatron_fipo.actor.setup import initialize_model_parallel
    from megatron_fipo.parallel import ParallelLayout
    from megatron_fipo.patches.megatron_cpu import apply_patches

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    apply_patches()
    layout = ParallelLayout.for_world(1, 0)
    return build_actor(
        read_architecture(model_dir),
        HFWeights(model_dir),
        layout,
        initialize_model_parallel(layout, seed=1, timeout_minutes=5),
        params_dtype=torch.bfloat16,
        device=torch.device("cpu"),
        transformer_impl="local",
        transformer={},
        ddp={},
        optimizer={"lr": 1e-6, "weight_decay": 0.0, "clip_grad": 1.0},
        lr_warmup_iters=0,
        max_tokens_per_micro_batch=512,
        max_response_len=256,
    )


def copy_floor(tensors: Tensors) -> Callable[[], int]:
    """All tensors into one shared buffer and out of it again."""
    size = sum(tensor.nbytes for _, tensor in tensors)
    flat, _ = BucketBuffers().take(size, size, torch.device("cpu"))
    copies = [torch.zeros_like(tensor) for _, tensor in tensors]

    def copy() -> int:
        views, start = [], 0
        for _, tensor in tensors:
            view = flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor)
            views.append(view)
            start += tensor.nbytes
        for target, view in zip(copies, views, strict=True):
            target.copy_(view)
        return 0

    return copy


@contextmanager
def checksums(are_made: bool) -> Iterator[None]:
    """Within it, where not wanted, checksums are not made: what is left is the rest of an update."""

    def copy(self: RunningChecksum, source: Tensor, start: int) -> None:
        target = self._words.view(torch.uint8)[start : start + source.nbytes]
        target.view(source.dtype).view(source.shape).copy_(source)

    with ExitStack() as replaced:
        if not are_made:
            for name, plain in (("copy", copy), ("advance", lambda self, end, lag=0: None), ("finish", lambda *_: 0)):
                replaced.enter_context(mock.patch.object(RunningChecksum, name, plain))
        yield


def measure(contestants: dict[str, Callable[[], int]], options: argparse.Namespace) -> dict[str, tuple[float, int]]:
    """Median seconds and the calls of each; the contestants take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    calls: dict[str, int] = {}
    for repeat in range(options.warmup + options.repeats):
        for name, run in contestants.items():
            start = time.perf_counter()
            calls[name] = run()
            if repeat >= options.warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(seconds[name]), calls[name]) for name in contestants}


def print_table(title: str, tensors: Tensors, found: dict[str, tuple[float, int]]) -> None:
    """One row per contestant, then the goals."""
    size_mb = sum(tensor.nbytes for _, tensor in tensors) / 2**20
    floor = found["copy floor"][0]
    print(f"\n{title}: {len(tensors)} tensors, {size_mb:.0f} MiB")
    for name, (seconds, calls) in found.items():
        print(f"{name:<32}{seconds:>9.3f} s {seconds / floor:>7.1f} x floor {calls:>7} calls")
    buckets, calls = found["buckets"]
    print(f"calls: {found['one tensor at a time'][1] / calls:.0f} times fewer (goal: {CALLS_GOAL})")
    print(f"over the floor: {buckets / floor:.2f} (goal for the 135M model: at most {FLOOR_GOAL})")
    if "buckets, no checksum" in found:
        plain = found["buckets, no checksum"][0]
        print(f"checksums take {buckets / plain - 1:.1%} (goal: at most {CHECKSUM_GOAL:.0%})")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-checkpoint", type=Path, required=True, help="directory of the model")
    parser.add_argument("--bucket-mb", type=int, default=256, help="MiB in a bucket")
    parser.add_argument("--scale", type=int, default=16, help="what the 30B model's dimensions are divided by")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--skip-engine", action="store_true", help="leave SGLang out")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
