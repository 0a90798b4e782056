"""Which node starts which engines, and how rank 0 reaches all of them.

A node's engines are started and given their weights by its first rank, through memory that both can see. Rank 0 sends
requests to the engines of every node.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_fipo.arguments import Settings
from megatron_fipo.config import require
from megatron_fipo.rollout.engine import EngineError
from megatron_fipo.rollout.interface import address_towards, interface_name
from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.rollout.server_process import start_engines
from megatron_fipo.rollout.sglang_engine import connect_engine
from megatron_fipo.run_config import EngineSettings

# Set to the node's number by torchrun, or by srun.
_NODE_VARIABLES = ("GROUP_RANK", "SLURM_NODEID")


@dataclass(frozen=True)
class Nodes:
    """The machines of the job, in the order of their first ranks."""

    first_ranks: tuple[int, ...]
    num_ranks: tuple[int, ...]  # on each
    num_engines: tuple[int, ...]  # that each starts

    @property
    def receivers(self) -> tuple[int, ...]:
        """The ranks that start engines and hand them weights: the first of every node that has any."""
        return tuple(rank for rank, count in zip(self.first_ranks, self.num_engines) if count)


@dataclass(frozen=True)
class RunEngines:
    """What a rank knows of the engines."""

    nodes: Nodes
    everywhere: EnginePool | None  # rank 0: all engines
    here: EnginePool | None  # the first rank of a node: that node's


def find_nodes(engine: EngineSettings, environment: Mapping[str, str]) -> Nodes:
    """Which ranks share a machine, and how many engines each machine starts. Collective over the default group.

    Raises ValueError on every rank naming the flag for engines that do not fit the nodes.
    """
    mine = next((environment[name] for name in _NODE_VARIABLES if name in environment), socket.gethostname())
    keys: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(keys, mine)
    first_ranks = [keys.index(key) for key in dict.fromkeys(keys)]
    num_ranks = [keys.count(keys[first]) for first in first_ranks]
    return Nodes(tuple(first_ranks), tuple(num_ranks), tuple(engines_of_nodes(engine, num_ranks)))


def engines_of_nodes(engine: EngineSettings, num_ranks: Sequence[int]) -> list[int]:
    """How many engines each node starts, from the number of its ranks; the first nodes have one more where they cannot
    all have the same. Raises ValueError for engines that do not fit."""
    num_nodes = len(num_ranks)
    flag = "--rollout-num-gpus-per-engine"
    if engine.num_engines is None:
        require(
            engine.placement == "colocated",
            "--rollout-num-engines",
            None,
            "given with --rollout-placement disaggregated: engines then have GPUs that no rank has",
        )
        if num_nodes == 1:
            return [max(1, num_ranks[0] // engine.tp_size)]
        for count in num_ranks:
            require(count % engine.tp_size == 0, flag, engine.tp_size, f"a divisor of the {count} ranks of each node")
        return [count // engine.tp_size for count in num_ranks]
    each, more = divmod(engine.num_engines, num_nodes)
    counts = [each + (node < more) for node in range(num_nodes)]
    if engine.placement == "colocated" and num_nodes > 1:
        for count, ranks in zip(counts, num_ranks):
            require(
                count * engine.tp_size <= ranks,
                "--rollout-num-engines",
                engine.num_engines,
                f"at most the ranks of the nodes / {flag} ({engine.tp_size}): a node of {ranks} would have {count}",
            )
    return counts


def start_own_engines(
    settings: Settings, nodes: Nodes, rank: int, device: torch.device, say: Callable[[str], None]
) -> EnginePool | None:
    """Start this node's engines, on its first rank, and return at once; None elsewhere. `say` hears of failures."""
    if rank not in nodes.receivers:
        return None
    node = nodes.first_ranks.index(rank)
    engine, rollout = settings.engine, settings.rollout
    if engine.interface is None and len(nodes.first_ranks) > 1:
        engine = replace(engine, interface=interface_name(address_towards(_master_address())))
    longest = rollout.rollout_max_prompt_len + max(rollout.rollout_max_response_len, settings.eval_max_response_len)
    return start_engines(
        settings.run.hf_checkpoint,
        engine,
        num_engines=nodes.num_engines[node],
        dtype="bfloat16" if settings.megatron.bf16 else "float32",
        longest=longest,
        random_seed=settings.run.seed,
        log_dir=settings.run.output_dir,
        use_cpu=device.type == "cpu",
        first_gpu=nodes.num_ranks[node] if engine.placement == "disaggregated" else 0,
        first_index=sum(nodes.num_engines[:node]),
        say=say,
    )


def await_engines(
    own: EnginePool | None,
    nodes: Nodes,
    engine: EngineSettings,
    control: dist.ProcessGroup,
    stack: ExitStack,
    say: Callable[[str], None],
    *,
    then_release: bool = False,
) -> RunEngines:
    """Wait for the engines of every node, and connect rank 0 to those of the others. Collective over `control`.

    `then_release`: they have given up their memory when this returns, which the first sync gives them back. Raises
    EngineError on every rank when a node has none that starts. `stack` ends the connections.
    """
    failure: str | None = None
    if own is not None:
        try:
            own.wait_ready()
            if then_release:
                own.release_memory(("kv_cache", "weights"))
        except EngineError as error:
            failure = str(error)
    addresses = [member.address for member in own.engines] if own is not None else []
    reports: list[Any] = [None] * control.size()
    dist.all_gather_object(reports, (failure, addresses), group=control)
    for found, _ in reports:
        if found is not None:
            raise EngineError(found)
    if control.rank() != 0 or len(nodes.receivers) == 1:
        return RunEngines(nodes, own if control.rank() == 0 else None, own)
    assert own is not None
    host = address_towards(_master_address())
    far = [connect_engine(address, own_host=host) for _, others in reports[1:] for address in others]
    everywhere = EnginePool(
        [*own.engines, *far],
        max_retries=engine.max_retries,
        max_restarts=engine.max_restarts,
        health_check_interval_s=engine.health_check_interval_s,
        say=say,
    )
    return RunEngines(nodes, stack.enter_context(everywhere), own)


def _master_address() -> str:
    """Where rank 0 is, as this job's launcher says."""
    return os.environ["MASTER_ADDR"]
