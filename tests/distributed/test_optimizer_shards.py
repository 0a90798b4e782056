"""A rank's share of the optimizer's state as boxes of the saved tensors, and masters of which it keeps 16 bits."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_fipo.actor.optimizer_shards import boxes_of_run, remainders_of, use_own_shards, whole_masters


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 5), (5, 1), (2, 3, 4)])
def test_boxes_of_every_run_hold_its_elements_in_order(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(prod(shape)).view(shape)
    for start in range(tensor.numel()):
        for end in range(start + 1, tensor.numel() + 1):
            boxes = list(boxes_of_run(shape, start, end))
            slices = [tuple(slice(a, a + n) for a, n in zip(*box, strict=True)) for box in boxes]
            assert torch.cat([tensor[part].reshape(-1) for part in slices]).tolist() == list(range(start, end))
            assert len(boxes) <= 2 * len(shape) - 1


def rounded_half_away(masters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 and remainder as Transformer Engine's kernel makes them: cut the bits in two; a negative rest rounds up."""
    low = masters.view(torch.int16)[1::2]
    remainder, rounded = masters.view(torch.int16)[0::2], low.clone()
    rounded[remainder < 0] += 1
    return rounded.view(torch.bfloat16), remainder


def test_masters_and_remainders_are_each_other_s_inverse_to_the_last_bit() -> None:
    torch.manual_seed(0)
    masters = torch.cat([torch.randn(1000), -torch.rand(1000) * 1e-30, torch.tensor([0.0, -0.0, 1.0, 2.0**-126])])
    masters = torch.cat([masters, torch.tensor([0x3F808000, 0x3F818000]).to(torch.int32).view(torch.float32)])  # halves
    rounded, remainder = rounded_half_away(masters)
    assert (rounded.float() - masters).abs().max() <= masters.abs().max() * 2**-8
    assert whole_masters(rounded, remainder).view(torch.int32).equal(masters.view(torch.int32))
    assert remainders_of(masters, rounded).equal(remainder)


def test_a_half_that_torch_rounded_down_comes_back_one_bit_lower() -> None:
    master = torch.tensor([0x3F808000], dtype=torch.int32).view(torch.float32)
    rounded = master.bfloat16()
    assert rounded.item() == 1.0
    back = whole_masters(rounded, remainders_of(master, rounded))
    assert back.view(torch.int32).item() == 0x3F807FFF


def test_masters_kept_as_remainders_are_saved_whole_and_loaded_as_remainders() -> None:
    """What Transformer Engine's Adam holds for --use-precision-aware-optimizer, in the middle of a parameter."""
    torch.manual_seed(1)
    masters, parameter = torch.randn(7), torch.nn.Parameter(torch.zeros(3, 4))
    rounded, remainder = rounded_half_away(masters)
    part = part_of(parameter, rounded, {"param": remainder, "exp_avg": masters.bfloat16(), "exp_avg_sq": masters * 2})
    use_own_shards(part)
    named = ShardedTensor.from_rank_offsets("w", parameter, (0, 1, 5), replica_id=(0, 0, 1), prepend_axis_num=1)
    (described,) = part.sharded_param_state_fully_reshardable({"w": named}).values()
    found = {
        name: [(box.key, box.global_offset, box.local_shape) for box in boxes] for name, boxes in described.items()
    }
    assert found["param"] == [
        ("optimizer.state.param.w", (1, 0, 2), (1, 1, 2)),
        ("optimizer.state.param.w", (1, 1, 0), (1, 1, 4)),
        ("optimizer.state.param.w", (1, 2, 0), (1, 1, 1)),
    ]
    assert all(box.replica_id == (0, 0, 0) for boxes in described.values() for box in boxes)
    saved = {name: torch.cat([box.data.reshape(-1) for box in boxes]) for name, boxes in described.items()}
    assert saved["param"].equal(masters)
    assert saved["exp_avg"].equal(masters.bfloat16().float())
    part.load_parameter_state_from_fully_reshardable({0: {name: [tensor] for name, tensor in saved.items()}})
    assert part.taken["param"].dtype == torch.int16
    assert part.taken["param"].equal(remainder)
    assert part.taken["exp_avg_sq"].equal(masters * 2)


def part_of(parameter: torch.nn.Parameter, rounded: torch.Tensor, held: dict[str, torch.Tensor]) -> Any:
    """As much of an optimizer that holds elements 2..9 of one parameter as describing and loading ask for."""
    places = {"param": SimpleNamespace(start=2, end=9)}
    part = SimpleNamespace(
        gbuf_ranges=[{torch.bfloat16: [{"param_map": {parameter: places}}]}],
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=True),
        model_param_group_index_map={parameter: (0, 0)},
        optimizer=SimpleNamespace(param_groups=[{"params": [rounded]}]),
        distributed_optimizer_instance_id=0,
        taken={},
    )
    part._get_main_param_and_optimizer_states = lambda _: held
    part._set_main_param_and_optimizer_states = lambda _, tensors: part.taken.update(tensors)
    return part
