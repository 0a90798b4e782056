"""Keep what goes up the pipeline apart from what goes down it when both go to the same rank.

Why: with two pipeline ranks the next rank is also the previous one. An interleaved schedule sends an activation and a
    gradient to it in one exchange, and gloo hands messages over in the order they were posted, so each is received as
    the other. Megatron-LM refuses two ranks without overlapping communication for that reason; here every message
    carries its direction as a tag, which gloo matches by (NCCL has no tags). And a gloo send ends only when the other
    side has asked for it, which it may do after it wants something else first: only receives are waited for at once.
Upstream: megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator._communicate.
Drop-when: it posts receives in the order in which the other side sends.
Test: tests/distributed/test_patch_megatron.py::test_p2p_directions_is_needed
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

REPLACES: Final = {
    "megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate": "ef4b39a1c0a97072",
}

FORWARD, BACKWARD = 1, 2
NUM_DIMS = 3  # activations are [sequence, batch, hidden]

_unfinished_sends: dict[str, deque[tuple[dist.Work, Tensor]]] = {}  # by process group


def apply() -> None:
    """Replace the exchange that all of the schedules' sends and receives go through."""
    communicator: Any = P2PCommunicator
    assert "wait_on_reqs" in communicator._communicate.__kwdefaults__, "P2PCommunicator._communicate has changed"
    communicator._communicate = _communicate


def _communicate(
    self: P2PCommunicator,
    *,
    tensor_send_next: Tensor | None,
    tensor_send_prev: Tensor | None,
    recv_prev: bool,
    recv_next: bool,
    tensor_shape: Any,
    wait_on_reqs: bool = True,
) -> tuple[Tensor | None, Tensor | None, None]:
    """Send to and receive from the neighbours; returns when everything is received."""
    if not wait_on_reqs:
        raise RuntimeError("pipeline communication cannot overlap with computation on gloo")
    shape_prev = shape_next = tensor_shape
    if self.config.variable_seq_lengths:
        shapes = [None if x is None else torch.tensor(x.shape) for x in (tensor_send_next, tensor_send_prev)]
        found_prev, found_next = (
            torch.empty(NUM_DIMS, dtype=torch.int64) if r else None for r in (recv_prev, recv_next)
        )
        _exchange(self, *shapes, found_prev, found_next)
        shape_prev, shape_next = (None if x is None else x.tolist() for x in (found_prev, found_next))
    dtype = self.config.pipeline_dtype
    from_prev = torch.empty(shape_prev, dtype=dtype, requires_grad=True) if recv_prev else None
    from_next = torch.empty(shape_next, dtype=dtype, requires_grad=True) if recv_next else None
    _exchange(self, tensor_send_next, tensor_send_prev, from_prev, from_next)
    return from_prev, from_next, None


def _exchange(
    communicator: P2PCommunicator,
    to_next: Tensor | None,
    to_prev: Tensor | None,
    from_prev: Tensor | None,
    from_next: Tensor | None,
) -> None:
    group, following, preceding = communicator.pp_group, communicator.next_rank, communicator.prev_rank
    sends = _unfinished_sends.setdefault(group.group_name, deque())
    for tensor, rank, tag in ((to_next, following, FORWARD), (to_prev, preceding, BACKWARD)):
        if tensor is not None:
            # held until it is sent: the schedule frees what it has handed over
            held = tensor.detach().contiguous()
            sends.append((dist.isend(held, rank, group=group, tag=tag), held))
    receives = [
        dist.irecv(tensor.detach(), rank, group=group, tag=tag)
        for tensor, rank, tag in ((from_prev, preceding, FORWARD), (from_next, following, BACKWARD))
        if tensor is not None
    ]
    for request in receives:
        request.wait()
    # no rank runs ahead of its neighbour by more than the schedule's warm-up; twice, as shapes are messages too
    most_ahead = 4 * group.size() * (communicator.virtual_pipeline_model_parallel_size or 1) + 4
    while len(sends) > most_ahead:
        sends.popleft()[0].wait()
