"""The optimizer's state in a checkpoint: every data-parallel rank saves and loads what it holds, in parameters' shapes.

Megatron's own way to the same tensors gathers the state of a whole data-parallel group, on loading on each of its
ranks: 12 bytes of main memory a parameter and rank. What a rank holds of a parameter is a run of its elements in
memory's order, and a checkpoint is made of boxes: a run is cut into boxes here, of which none is copied.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

STATES = ("param", "exp_avg", "exp_avg_sq")


def use_own_shards(part: DistributedOptimizer) -> None:
    """From now on `part.sharded_state_dict` of "fully_reshardable" names this rank's share alone, and so does what
    `part.load_state_dict` then takes. Neither talks to another rank."""
    part.sharded_param_state_fully_reshardable = functools.partial(_described, part)
    part.load_parameter_state_from_fully_reshardable = functools.partial(_load, part)


def boxes_of_run(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements `start`..`end` of a contiguous tensor of `shape` as boxes, in order: offsets and sizes of each.

    At most 2 * dimensions - 1: what is left of a row, whole rows, what begins of a row.
    """
    row = prod(shape[1:])
    while start < end:
        index, within = divmod(start, row)
        num_rows = (end - start) // row
        if within or not num_rows:
            stop = min(end, (index + 1) * row)
            for offsets, sizes in boxes_of_run(shape[1:], within, stop - index * row):
                yield (index, *offsets), (1, *sizes)
        else:
            stop = start + num_rows * row
            yield (index, *(0 for _ in shape[1:])), (num_rows, *shape[1:])
        start = stop


def whole_masters(rounded: Tensor, remainders: Tensor) -> Tensor:
    """Fp32 masters of bf16 parameters and the int16 that Transformer Engine's Adam keeps beside them: what rounding to
    nearest, halves away from zero, took off the fp32 number's bits."""
    bits = rounded.detach().view(torch.int16).to(torch.int32) * 65536 + remainders
    return bits.view(torch.float32)


def remainders_of(masters: Tensor, rounded: Tensor) -> Tensor:
    """The int16 that make `masters` (fp32) of `rounded` (bf16). A half that was rounded down, as torch rounds every
    other, is one bit of fp32 more than fits: it comes back lower by that bit."""
    bits = masters.view(torch.int32).to(torch.int64)
    difference = bits - rounded.detach().view(torch.int16).to(torch.int64) * 65536
    return difference.clamp(-(2**15), 2**15 - 1).to(torch.int16)


def _described(
    part: DistributedOptimizer, model_state: dict[str, Any], is_loading: bool = False, metadata: Any = None
) -> dict[int, dict[str, list[ShardedTensor]]]:
    """What this rank holds, by number of its parameter and by state: boxes under the names that Megatron gives them."""
    named, _ = extract_sharded_tensors_and_factories(model_state)
    by_parameter = {id(found.data): found for found in nested_values(named)}
    return {
        index: {
            name: _boxes(part, by_parameter[id(parameter)], name, tensor, start)
            for name, tensor in _own_states(part, parameter).items()
        }
        for index, (parameter, start) in enumerate(_own_parameters(part))
    }


@torch.no_grad()
def _load(part: DistributedOptimizer, state: dict[int, dict[str, list[Tensor]]]) -> None:
    """Take over what was loaded for `_described`'s boxes.

    Where Adam is torch's it counts steps by parameter: megatron-core's loading wants to be given these counters, and
    has by then made one tensor of all of them, which Adam would advance once for every parameter.
    """
    for index, (parameter, _) in enumerate(_own_parameters(part)):
        tensors = {name: torch.cat([box.reshape(-1) for box in boxes]) for name, boxes in state[index].items()}
        held, own = part._get_main_param_and_optimizer_states(parameter), _optimizer_parameter(part, parameter)
        if held["param"].dtype == torch.int16:
            tensors["param"] = remainders_of(tensors["param"].to(own.device), own)
        if "step" in held:
            tensors["step"] = part.optimizer.state[own]["step"] = held["step"].clone()
        part._set_main_param_and_optimizer_states(parameter, tensors)
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        part.optimizer._sync_hdo_state_to_sub_optimizers()


def _own_parameters(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int]]:
    """The parameters that this rank holds the state of, wholly or in part, and the element where its run begins."""
    for ranges in part.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, places in bucket["param_map"].items():
                    yield parameter, places["param"].start


def _own_states(part: DistributedOptimizer, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    """[elements of the run] fp32 each: the optimizer's own memory, or, where it keeps fewer bits, copies in main
    memory."""
    held = part._get_main_param_and_optimizer_states(parameter)
    states = {name: held[name].detach() for name in STATES}
    if not part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        assert all(tensor.dtype == torch.float32 for tensor in states.values()), states
        return states
    if states["param"].dtype == torch.int16:
        states["param"] = whole_masters(_optimizer_parameter(part, parameter), states["param"])
    return {name: tensor.to("cpu", torch.float32) for name, tensor in states.items()}


def _optimizer_parameter(part: DistributedOptimizer, parameter: torch.nn.Parameter) -> Tensor:
    group, order = part.model_param_group_index_map[parameter]
    return part.optimizer.param_groups[group]["params"][order]


def _boxes(
    part: DistributedOptimizer,
    described: ShardedTensor | ShardedTensorFactory,
    name: str,
    run: Tensor,
    start: int,
) -> list[ShardedTensor]:
    """A state of the elements `start`.. of a parameter, as boxes of the tensors that the parameter is saved as."""
    key = f"optimizer.state.{name}.{described.key}"
    # the last number counts data-parallel ranks, of which each has other elements
    replica = (*described.replica_id[:2], part.distributed_optimizer_instance_id)
    shape = torch.empty(described.data.shape, dtype=run.dtype, device="meta")
    if isinstance(described, ShardedTensorFactory):
        saved = list(nested_values(described.build_fn(key, shape, replica, None)))
    else:
        saved = [replace(described, key=key, data=shape, dtype=run.dtype, replica_id=replica)]
    boxes: list[ShardedTensor] = []
    for tensor in saved:
        assert tensor.data.is_contiguous(), f"{key} is saved in another order than it has in memory"
        first = tensor.data.storage_offset()
        low, high = max(start, first), min(start + len(run), first + tensor.data.numel())
        num_lead = tensor.prepend_axis_num  # layers and experts, which the tensor in memory does not have
        lead, origin = tensor.global_offset[:num_lead], tensor.global_offset[num_lead:]
        for offsets, sizes in boxes_of_run(tuple(tensor.local_shape), low - first, high - first):
            box = run[low - start : low - start + prod(sizes)].view((1,) * num_lead + sizes)
            low += prod(sizes)
            boxes.append(
                replace(
                    tensor,
                    data=box,
                    local_shape=tuple(box.shape),
                    global_offset=(*lead, *(a + b for a, b in zip(origin, offsets, strict=True))),
                    axis_fragmentations=None,
                    prepend_axis_num=0,
                )
            )
    return boxes
