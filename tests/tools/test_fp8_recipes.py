"""FP8 flags reach megatron-core's configuration, and what delayed scaling asks of an actor is done, on two ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from tiny_models import make_sequences, save_model

from megatron_fipo.arguments import parse_arguments
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.weights.architecture import read_architecture


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, "qwen2", tied=True)
    return directory


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--fp8-format", "hybrid"], {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 1}),
        (
            [
                *(
                    "--fp8-format",
                    "e4m3",
                    "--fp8-recipe",
                    "delayed",
                    "--fp8-margin",
                    "1",
                    "--fp8-amax-history-len",
                    "64",
                ),
                *("--fp8-amax-compute-algo", "max", "--no-fp8-wgrad"),
            ],
            {
                **{"fp8": "e4m3", "fp8_margin": 1, "fp8_amax_history_len": 64, "fp8_amax_compute_algo": "max"},
                **{"fp8_wgrad": False},
            },
        ),
        (["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"], {"fp8": "hybrid", "fp8_recipe": "tensorwise"}),
        (
            [
                *("--fp8-format", "e4m3", "--fp8-recipe", "blockwise", "--first-last-layers-bf16"),
                *("--num-layers-at-start-in-bf16", "1", "--num-layers-at-end-in-bf16", "2"),
            ],
            {
                **{"fp8_recipe": "blockwise", "first_last_layers_bf16": True},
                **{"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 2},
            },
        ),
        (["--fp8-format", "e4m3", "--fp8-recipe", "mxfp8"], {"fp8": "e4m3", "fp8_recipe": "mxfp8"}),
        (["--fp4-format", "e2m1"], {"fp4": "e2m1", "fp4_recipe": "nvfp4"}),
    ],
)
def test_flags_reach_megatrons_configuration(flags: list[str], wanted: dict[str, Any], model_dir: Path) -> None:
    from megatron_fipo.actor.model import transformer_config
    from megatron_fipo.gpu_packages import check_quantised_training

    common = ["--hf-checkpoint", str(model_dir), "--task", "chain_sum", "--output-dir", "none"]
    fields = parse_arguments([*common, *flags]).megatron.transformer
    check_quantised_training(fields)
    config = transformer_config(
        read_architecture(model_dir),
        ParallelLayout(),
        params_dtype=torch.bfloat16,
        device=torch.device("cuda"),
        overrides=fields,
    )
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert config.gradient_accumulation_fusion


def test_a_pickled_extra_state_goes_into_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.models.gpt import GPTModel

    from megatron_fipo.actor.model import PolicyModel

    state = {
        "a._extra_state": ShardedObject("a._extra_state", torch.ones(4, dtype=torch.uint8), (1,), (0,)),
        "b._extra_state": ShardedObject("b._extra_state", None, (1,), (0,)),
        "c": ShardedObject("c", torch.ones(4), (1,), (0,)),
    }
    monkeypatch.setattr(GPTModel, "sharded_state_dict", lambda self: state)
    found = PolicyModel.__new__(PolicyModel).sharded_state_dict()
    assert found["a._extra_state"].data.numel() == 0
    assert found["b._extra_state"].data is None
    assert found["c"].data.numel() == 4


def test_the_scales_go_through_a_checkpoint_as_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_fipo.actor import checkpoint
    from megatron_fipo.actor.checkpoint_files import CheckpointError
    from megatron_fipo.actor.fp8_scaling import DelayedScaling

    def scaling(value: float | None) -> DelayedScaling:
        layer = torch.nn.Linear(1, 1)
        if value is not None:
            state = SimpleNamespace(scale=torch.full((3,), value), amax_history=torch.full((4, 3), value))
            layer.fp8_meta = {"scaling_fwd": state, "scaling_bwd": state}
        return DelayedScaling([torch.nn.Sequential(layer)])

    monkeypatch.setattr(checkpoint, "_rng_state", dict)
    path, full, empty = tmp_path / "rng_0.pt", scaling(2.5), scaling(None)
    path.write_bytes(checkpoint.saved(checkpoint._state_of_layout(SimpleNamespace(scaling=full))))
    monkeypatch.setattr(checkpoint, "_set_rng_state", lambda path: None)
    checkpoint._set_state_of_layout(SimpleNamespace(scaling=empty), path)
    assert empty.saved.keys() == full.state().keys() == empty.state().keys()
    assert len(empty.saved) == 4
    assert all(torch.equal(empty.saved[name], tensor) for name, tensor in full.state().items())
    path.write_bytes(checkpoint.saved(checkpoint._state_of_layout(SimpleNamespace(scaling=None))))
    checkpoint._set_state_of_layout(SimpleNamespace(scaling=None), path)
    with pytest.raises(CheckpointError, match="holds no 'fp8_scaling': it was saved without --fp8-recipe delayed"):
        checkpoint._set_state_of_layout(SimpleNamespace(scaling=scaling(None)), path)


def test_data_parallel_ranks_with_delayed_scaling_run_the_same_passes(tmp_path: Path, model_dir: Path) -> None:
    first, second = run_ranks(tmp_path, 2, passes_of_delayed_scaling, {"model_dir": str(model_dir)})
    assert first["alone"] != second["alone"]  # one rank's sequences fit fewer packs
    assert first["even"] == second["even"] == [max(first["alone"][0], second["alone"][0])]
    for found in (first, second):
        assert found["scales made"] == found["even"][0] + 1  # the first pass of all learns them from one micro-batch
        assert found["logprobs differ by"] < 1e-6


def passes_of_delayed_scaling(model_dir: str) -> dict[str, Any]:
    """The number of micro-batches without and with the obligation to run as many as the other rank, and how often
    scales were made in a pass of an actor with (an imitation of) delayed scaling."""
    from actor_on_ranks import make_actor, make_groups

    from megatron_fipo.actor.fp8_scaling import DelayedScaling

    layout, groups = make_groups()
    actor = make_actor(model_dir, layout, groups, budget=40)
    sequences = make_sequences(12)
    mine = sequences if dist.get_rank() == 0 else sequences[:4]
    made: list[int] = []
    even = replace(actor, even_micro_batches=True, scaling=DelayedScaling(actor.chunks, lambda: made.append(1)))
    plain, _ = actor.old_logprobs([mine])
    scaled, _ = even.old_logprobs([mine])
    return {
        "alone": [len(actor._micro_batches(mine))],
        "even": [len(even._micro_batches(mine))],
        "scales made": len(made),
        "logprobs differ by": max(float((a - b).abs().max()) for a, b in zip(plain, scaled)),
    }
