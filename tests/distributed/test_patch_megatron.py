"""Every patch of megatron-core is needed: an upstream operation breaks without it alone and works with it.

All of it happens in one fresh process, since patches cannot be taken back; each test looks at its own patch's findings.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks

# Where each patch writes: module, then the attribute, dotted inside a class. `torch_on_cpu` is tried before it is
# applied, as it writes to every module of megatron.core.
TARGETS: dict[str, tuple[tuple[str, str], ...]] = {
    "rng_on_cpu": (
        ("megatron.core.tensor_parallel.random", "_get_cuda_rng_state"),
        ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state"),
    ),
    "tensor_type_names": (
        ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer._build_model_and_main_param_groups"),
        ("megatron.core.optimizer.optimizer", "Float16OptimizerWithFloat16Params.__init__"),
        ("megatron.core.optimizer.optimizer", "clip_grad_by_total_norm_fp32"),
        ("megatron.core.optimizer.clip_grads", "clip_grad_by_total_norm_fp32"),
    ),
    "embedding_stays_on_cpu": (
        (
            "megatron.core.models.common.language_module.language_module",
            "LanguageModule.setup_embeddings_and_output_layer",
        ),
    ),
    "p2p_directions": (("megatron.core.pipeline_parallel.p2p_communication", "P2PCommunicator._communicate"),),
    "group_of_one": (
        ("megatron.core.distributed.param_and_grad_buffer", "dist_reduce_scatter_func"),
        ("megatron.core.distributed.param_and_grad_buffer", "dist_all_gather_func"),
    ),
}


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("patches")
    kwargs = {"model_dir": str(directory / "model")}
    return run_ranks(directory, 1, try_every_patch, kwargs, fresh=True)[0]


def test_torch_on_cpu_is_needed(findings: dict[str, Any]) -> None:
    assert "NVIDIA" in findings["torch_on_cpu"]["without"] or "CUDA" in findings["torch_on_cpu"]["without"]
    assert findings["torch_on_cpu"]["with"] == ""


def test_rng_on_cpu_is_needed(findings: dict[str, Any]) -> None:
    found = findings["rng_on_cpu"]
    assert "NVIDIA" in found["without"] or "CUDA" in found["without"] or "IndexError" in found["without"]
    assert found["with"] == ""
    # the fork draws from a state of its own and puts the generator's back
    assert found["inside"] != found["outside"]
    assert found["outside"] == found["expected_outside"]


def test_tensor_type_names_is_needed(findings: dict[str, Any]) -> None:
    found = findings["tensor_type_names"]
    assert "torch.FloatTensor" in found["distributed"]["without"]
    assert "torch.BFloat16Tensor" in found["half"]["without"]
    assert found["clip"]["without"].startswith("AssertionError")
    assert [found[name]["with"] for name in ("distributed", "half", "clip")] == ["", "", ""]
    assert found["clipped"] == pytest.approx([0.6, 0.8], abs=1e-5)
    assert found["type_name_afterwards"] == "torch.FloatTensor"


def test_embedding_stays_on_cpu_is_needed(findings: dict[str, Any]) -> None:
    found = findings["embedding_stays_on_cpu"]
    assert "NVIDIA" in found["without"] or "CUDA" in found["without"]
    assert found["with"] == ""
    assert found["cuda_afterwards"] == found["cuda_before"]


def test_group_of_one_is_needed(findings: dict[str, Any]) -> None:
    found = findings["group_of_one"]
    assert min(found["copies_without"]) >= 1
    assert found["copies_with"] == [0, 0]
    assert found["elsewhere"] == [0.0, 1.0, 2.0, 3.0]  # into a tensor of its own it still copies


def test_p2p_directions_is_needed(tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(tmp_path, 2, try_p2p_directions, fresh=True)):
        other = 1 - rank
        up, down = [2 + other, 1, 1], [5 + other, 1, 1]
        assert found["without"] == [down, up]  # what goes up is taken for what comes down
        assert found["with"] == [up, down]
        assert found["values"] == [10.0 + other, 20.0 + other]


def test_applying_the_patches_twice_changes_nothing(findings: dict[str, Any]) -> None:
    assert findings["twice"] == {"same_names": True, "same_functions": True, "names": list(findings["patches"])}


def test_every_patch_has_its_test(repo_root: Path, findings: dict[str, Any]) -> None:
    tested = set()
    for path in (repo_root / "patches" / "megatron_cpu").glob("*.py"):
        named = re.search(r"^Test: (tests/distributed/\w+\.py)::(test_\w+_is_needed)$", path.read_text(), re.MULTILINE)
        if named and named[2] == f"test_{path.stem}_is_needed":
            assert f"def {named[2]}(" in (repo_root / named[1]).read_text(), named[0]
            tested.add(path.stem)
    assert tested == set(findings["patches"])


def test_another_megatron_is_refused(findings: dict[str, Any]) -> None:
    assert findings["other_version"] == (
        "RuntimeError: megatron-core is 0.19.2, but its CPU patches are written for 0.16.x"
    )


def test_a_machine_with_cuda_is_refused(findings: dict[str, Any]) -> None:
    assert findings["with_cuda"].startswith("RuntimeError: the CPU patches for megatron-core must not be applied")


# ---- in the fresh process


def error_of(function: Callable[[], Any]) -> str:
    """What `function` raises, as text; empty when it works."""
    try:
        function()
    except Exception as error:  # whatever upstream breaks with is the finding
        return f"{type(error).__name__}: {error}; {error!r}"
    return ""


def owner_of(module: str, dotted: str) -> tuple[Any, str]:
    *path, name = dotted.split(".")
    owner = import_module(module)
    for part in path:
        owner = getattr(owner, part)
    return owner, name


def current(targets: tuple[tuple[str, str], ...]) -> list[Any]:
    return [vars(owner)[name] for owner, name in (owner_of(*target) for target in targets)]


@contextlib.contextmanager
def put_back(targets: tuple[tuple[str, str], ...], values: list[Any]) -> Iterator[None]:
    """Upstream's own functions for a while."""
    patched = current(targets)
    for target, value in zip(targets, values):
        setattr(*owner_of(*target), value)
    try:
        yield
    finally:
        for target, value in zip(targets, patched):
            setattr(*owner_of(*target), value)


def try_every_patch(model_dir: str) -> dict[str, Any]:
    from importlib import metadata

    from actor_on_ranks import make_actor
    from megatron.core import parallel_state
    from tiny_models import save_model

    from megatron_fipo.actor.setup import initialize_model_parallel
    from megatron_fipo.parallel import ParallelLayout
    from megatron_fipo.patches.megatron_cpu import PATCHES, apply, apply_patches

    findings: dict[str, Any] = {"patches": list(PATCHES)}
    with replaced(apply, "version", lambda _: "0.19.2"):
        findings["other_version"] = error_of(apply_patches).split(";")[0]
    with replaced(torch.cuda, "is_available", lambda: True):
        findings["with_cuda"] = error_of(apply_patches)
    assert metadata.version("megatron-core").startswith("0.16.")

    save_model(Path(model_dir), "qwen2", tied=True)
    originals = {name: current(targets) for name, targets in TARGETS.items()}
    for name in TARGETS:
        PATCHES[name]()
    layout = ParallelLayout()
    without = error_of(lambda: initialize_model_parallel(layout, seed=1, timeout_minutes=1))
    parallel_state.destroy_model_parallel()
    PATCHES["torch_on_cpu"]()
    groups = initialize_model_parallel(layout, seed=1, timeout_minutes=1)

    def build(**options: Any) -> Any:
        return make_actor(model_dir, layout, groups, **options)

    findings["torch_on_cpu"] = {"without": without, "with": error_of(build)}
    findings["rng_on_cpu"] = try_rng(originals["rng_on_cpu"])
    findings["tensor_type_names"] = try_type_names(originals["tensor_type_names"], build)
    findings["embedding_stays_on_cpu"] = try_embedding(originals["embedding_stays_on_cpu"], build())
    findings["group_of_one"] = try_group_of_one(originals["group_of_one"])

    first = apply_patches()
    before = {name: current(targets) for name, targets in TARGETS.items()}
    second = apply_patches()
    after = {name: current(targets) for name, targets in TARGETS.items()}
    findings["twice"] = {
        "same_names": first == second,
        "same_functions": before == after,
        "names": list(second),
    }
    return findings


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


def try_rng(originals: list[Any]) -> dict[str, Any]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()

    def draw() -> float:
        with tracker.fork():
            return float(torch.rand(()))

    with put_back(TARGETS["rng_on_cpu"], originals):
        found: dict[str, Any] = {"without": error_of(draw)}
    found["with"] = error_of(draw)
    torch.manual_seed(5)
    found["expected_outside"] = float(torch.rand(()))
    torch.manual_seed(5)
    found["inside"] = draw()
    found["outside"] = float(torch.rand(()))
    return found


def try_type_names(originals: list[Any], build: Callable[..., Any]) -> dict[str, Any]:
    from megatron.core.optimizer import clip_grads

    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    operations: dict[str, Callable[[], Any]] = {
        "distributed": build,
        "half": lambda: build(bf16=True, distributed_optimizer=False),
        "clip": lambda: clip_grads.clip_grad_by_total_norm_fp32([parameter], 1.0, 5.0),
    }
    found: dict[str, Any] = {}
    for name, operation in operations.items():
        with put_back(TARGETS["tensor_type_names"], originals):
            without = error_of(operation)
        found[name] = {"without": without, "with": error_of(operation)}
    found["clipped"] = parameter.grad.tolist()
    found["type_name_afterwards"] = torch.zeros(1).type()
    return found


def try_embedding(originals: list[Any], actor: Any) -> dict[str, Any]:
    """The one rank plays a pipeline of two stages: it reaches the move and the all-reduce over the embedding group."""
    from megatron_fipo.actor.model import unwrapped

    policy = unwrapped(actor.chunks[0])
    before = repr(torch.Tensor.cuda)
    with replaced(policy.config, "pipeline_model_parallel_size", 2):
        with put_back(TARGETS["embedding_stays_on_cpu"], originals):
            without = error_of(policy.setup_embeddings_and_output_layer)
        found = {"without": without, "with": error_of(policy.setup_embeddings_and_output_layer)}
    return {**found, "cuda_before": before, "cuda_afterwards": repr(torch.Tensor.cuda)}


def try_group_of_one(originals: list[Any]) -> dict[str, Any]:
    """Both collectives over this one rank, on a buffer that is its own shard, as the distributed optimizer has it."""
    from megatron.core.distributed import param_and_grad_buffer

    group = torch.distributed.group.WORLD

    def copies() -> list[int]:
        counts = []
        for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
            buffer = torch.arange(4.0)
            with torch.profiler.profile() as profile:
                getattr(param_and_grad_buffer, name)(buffer.view(-1), buffer, group=group)
            assert buffer.tolist() == [0.0, 1.0, 2.0, 3.0]
            counts.append(sum(event.count for event in profile.key_averages() if event.key == "aten::copy_"))
        return counts

    found: dict[str, Any] = {"copies_with": copies()}
    with put_back(TARGETS["group_of_one"], originals):
        found["copies_without"] = copies()
    elsewhere = torch.zeros(4)
    param_and_grad_buffer.dist_all_gather_func(elsewhere, torch.arange(4.0), group=group)
    found["elsewhere"] = elsewhere.tolist()
    return found


def try_p2p_directions() -> dict[str, Any]:
    """Each of two ranks sends the other one something up and something down the pipeline, of different shapes."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from megatron_fipo.patches.megatron_cpu import apply_patches

    apply_patches()
    rank = torch.distributed.get_rank()
    config = ModelParallelConfig(batch_p2p_comm=False, variable_seq_lengths=True, pipeline_dtype=torch.float32)
    communicator = P2PCommunicator(torch.distributed.group.WORLD, config)
    sent: dict[str, Any] = {
        "tensor_send_next": torch.full((2 + rank, 1, 1), 10.0 + rank),
        "tensor_send_prev": torch.full((5 + rank, 1, 1), 20.0 + rank),
        "recv_prev": True,
        "recv_next": True,
    }
    without = communicator._communicate_shapes(**sent)
    from_prev, from_next, _ = communicator._communicate(**sent, tensor_shape=None)
    torch.distributed.barrier()
    return {
        "without": [list(shape) for shape in without],
        "with": [list(from_prev.shape), list(from_next.shape)],
        "values": [float(from_prev.mean()), float(from_next.mean())],
    }
