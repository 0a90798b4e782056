"""Actor and engines take turns on the same devices, or work beside each other on their own: training, syncing,
generating. states.py has the table of turns, docs/hybrid-engine.md the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch.distributed as dist

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.offload import Offloader, Part
from megatron_fipo.hybrid.memory import GIB, memory_of_both
from megatron_fipo.hybrid.node_engines import NodeEngines, NodeReport
from megatron_fipo.hybrid.states import State, next_state
from megatron_fipo.rollout.engine import EngineError, MemoryTag, NoEngineLeft
from megatron_fipo.rollout.pool import EnginePool, say_on_stderr
from megatron_fipo.run_config import EnginePlacement
from megatron_fipo.types import Completion, GenerateRequest

T = TypeVar("T")

_ALL_TAGS: tuple[MemoryTag, ...] = ("kv_cache", "weights")


class AnotherRankFailed(RuntimeError):
    """What the other ranks raise when one could not move its tensors; that one raises the real error."""


class HybridEngine:
    """Whose turn it is, the weights' way from the actor to the engines, and where the actor's tensors are.

    No request is served while weights change, and every completion carries the version of the weights that made it.
    All methods but `generate` are collective over all ranks. What fails between a rank and its engines is told to all
    ranks and returned; after it, as after any other error in a turn, the state is "failed" and nothing more is done.
    """

    def __init__(
        self,
        actor: Actor,
        pool: EnginePool | None,
        *,
        bucket_bytes: int,
        local_pool: EnginePool | None = None,
        receivers: Sequence[int] = (0,),
        placement: EnginePlacement = "colocated",
        offload_trainer: bool = False,
        check_weights_interval: int = 0,
        tp_size: int = 1,
        ep_size: int = 1,
        fp8: bool = False,
        call_everyone: Callable[[], None] | None = None,
        say: Callable[[str], None] = say_on_stderr,
    ) -> None:
        """`pool`: all engines, on rank 0 and None elsewhere. On several nodes, `receivers` are the ranks that hand
        weights to their node's engines, and `local_pool` is the pool over those, on each of them; else it is `pool`.

        `offload_trainer` moves the actor's tensors to main memory while colocated engines generate. Weights are
        compared with what was sent in the first sync, after an engine was started again, and, where
        `check_weights_interval` is positive, in every such sync; never where it is -1. `tp_size`, `ep_size`, `fp8`: of
        engines. `call_everyone`, called on rank 0 inside `generate` when no engine is left, must have all ranks call
        `resync` and return after it; a single rank needs none.

        Raises ValueError where the actor's memory cannot leave the device.
        """
        rank = actor.layout.rank
        assert (pool is not None) == (rank == 0), "rank 0, and it alone, drives the engines"
        assert receivers[0] == 0, "rank 0 is the first receiver"
        local_pool = pool if local_pool is None else local_pool
        assert (local_pool is not None) == (rank in receivers), f"receivers are {receivers}, this is rank {rank}"
        assert not (offload_trainer and placement == "disaggregated"), "engines beside the trainer need no room"
        self.state: State = "training"
        self.weight_version = -1  # nothing pushed yet
        self._actor = actor
        self._pool = pool
        self._node: NodeEngines | None = None
        if local_pool is not None:
            device_type: Literal["cpu", "cuda"] = "cuda" if actor.device.type == "cuda" else "cpu"
            self._node = NodeEngines(local_pool, tp_size=tp_size, ep_size=ep_size, fp8=fp8, device_type=device_type)
        self._receivers = tuple(receivers)
        self._bucket_bytes = bucket_bytes
        self._fp8 = fp8
        self._takes_turns = placement == "colocated"
        self._offloader = Offloader(actor.chunks, actor.optimizer, actor.device) if offload_trainer else None
        self._check_interval = check_weights_interval
        self._num_syncs = 0
        self._call_everyone = call_everyone
        self._say = say
        self._reason = ""  # of the failure
        self._memory: dict[str, float] = {}
        if pool is not None and (call_everyone is not None or actor.layout.world_size == 1):
            pool.revive = self._revive

    def sync_weights(self, version: int) -> EngineError | None:
        """Push the actor's weights as `version` to every engine.

        Consumes: the actor's parameters after its last update. Waits for: engines that were started again, and every
        rank's part of the weights. Unblocked by: the end of the last update, or of an evaluation. Produces: engines
        that serve `version` and nothing else. On a GPU gradients and optimizer make room for the engines' weights, and
        parameters for their KV cache. An engine that fails is set aside and started again before the next sync;
        returns an error, on every rank, when none can be had.
        """
        self._turn("syncing")
        with self._failing():
            failure = self._push_until_served(version)
        if failure is not None:
            self._fail(str(failure))
            return failure
        self._num_syncs += 1
        self.weight_version = version
        self._turn("generating")
        self._look_at_memory()
        return None

    def resync(self) -> EngineError | None:
        """Start failed engines again and push the current weights to all, as the version that they had.

        As `sync_weights`, out of the middle of generating: what engines have answered stays, the rest is asked anew.
        """
        assert self.weight_version >= 0, "no weights were ever sent"
        return self.sync_weights(self.weight_version)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Answer requests with the weights of the last sync. Rank 0 only; may be called any number of times.

        Consumes: requests. Waits for: the engines, those started again among them. Unblocked by: a sync. Produces: one
        completion per request, in order, each of this version. NoEngineLeft when all engines have failed for good.
        """
        assert self._pool is not None, "only rank 0 generates"
        self._turn("generating")
        try:
            return self._pool.generate(requests)
        except NoEngineLeft as failure:
            self._fail(str(failure))
            raise

    def start_training(self) -> None:
        """The actor's turn: it may score and update.

        Consumes: nothing. Waits for: every node's engines to have given up their memory. Unblocked by: the last answer
        that the step needs. Produces: an actor with all its tensors on the device, its gradients zero. Engines that
        fail here are set aside; whether any is left shows in the next sync.
        """
        self._turn("training")
        with self._failing():
            if self._node is not None and self._takes_turns:
                pool = self._node.pool
                self._node.do(lambda: pool.release_memory(_ALL_TAGS))
                failure = self._node.clear()
                if failure is not None:
                    self._say(f"warning: {str(failure).splitlines()[0]}")
            self._wait_for_everyone()
            self._enter("parameters", "gradients", "optimizer")
        self._look_at_memory()

    @contextmanager
    def actor_at_work(self) -> Iterator[None]:
        """Inside, parameters and optimizer are on the device, whosever turn it is: to save or export. Engines can
        generate again after it, under the version they had. Gradients stay away.

        Consumes: no request in flight. Waits for: the engines to give up their KV cache. Unblocked by: the end of a
        step, or a signal. Produces: the state it found; "failed" where what is done inside fails on this rank, which
        then waits for no other.
        """
        assert self.state in ("training", "generating"), f"the hybrid engine is {self.state}: {self._reason}"
        if self._offloader is None or self.state == "training":
            yield
            return
        with self._failing():
            if self._node is not None:
                pool = self._node.pool
                self._node.do(lambda: pool.release_memory(("kv_cache",)))
            self._wait_for_everyone()
            self._enter("parameters", "optimizer")
            yield
            self._leave("optimizer", "parameters")
            if self._node is not None:
                self._node.do(lambda: pool.resume_memory(("kv_cache",)))
                failure = self._node.clear()
                if failure is not None:
                    self._say(f"warning: {str(failure).splitlines()[0]}")

    def memory(self) -> dict[str, float]:
        """GiB held by this rank's side and its node's engines at the beginning of the last turn of either kind, as
        `memory/TURN/trainer`, `.../trainer_peak`, `.../engines` (memory.py says what counts), TURN training or
        generating; and `memory/offloaded`, what of the actor is in main memory while engines generate."""
        return dict(self._memory)

    def _push_until_served(self, version: int) -> EngineError | None:
        """Push until at least one engine serves `version`, as long as engines may be started again."""
        while True:
            reports = self._push_once(version)
            failed = {name: reason for report in reports for name, reason in report.failed.items()}
            if any(report.served for report in reports):
                if self._pool is not None and self._has_nodes:
                    addresses = {name: address for report in reports for name, address in report.addresses.items()}
                    self._pool.adopt_update(version, failed, addresses)
                return None
            failures = [report.failure for report in reports if report.failure is not None]
            if all(report.is_final for report in reports):
                return NoEngineLeft("\n".join(failures))
            self._say(f"warning: no engine took weight version {version}; those that may be are started again")

    def _push_once(self, version: int) -> list[NodeReport]:
        """One export of the weights to all engines that can be had; every receiver's report, on every rank."""
        node = self._node
        self._leave("gradients", "optimizer")
        self._restart_failed()
        if node is not None and self._offloader is not None:
            node.do(lambda: node.pool.release_memory(_ALL_TAGS))  # what was just started holds all of it
        self._wait_for_everyone()
        self._enter("parameters")
        if node is not None:
            if self._takes_turns:
                node.do(lambda: node.pool.resume_memory(("weights",)))
            node.do(node.pool.begin_weight_update)
        buckets = self._actor.export_buckets(self._bucket_bytes, receivers=self._receivers, fp8=self._fp8)
        expected = None
        if node is None:
            for _ in buckets:
                raise AssertionError("only receivers get weights")
        else:
            expected = node.push(buckets, self._actor.arch, with_checksums=self._is_check_due(node))
        self._leave("parameters")
        if node is not None:
            if self._takes_turns:
                node.do(lambda: node.pool.resume_memory(("kv_cache",)))
            node.do(lambda: node.pool.end_weight_update(version))
            if expected is not None:
                node.do(lambda: node.check(expected))
        reports = self._everyones(None if node is None else node.report(with_addresses=self._has_nodes))
        if node is not None:
            node.clear()
        return [report for report in reports if report is not None]

    def _restart_failed(self) -> None:
        """Start engines again that have failed. On a GPU an engine needs the device to itself for that."""
        failed = self._everyones(self._pool.failed if self._pool is not None else None, only_if=self._has_nodes)[0]
        node = self._node
        started: list[str] | None = None
        if node is not None:
            for name in node.pool.names:
                if self._has_nodes and failed is not None and name in failed and name not in node.pool.failed:
                    node.pool.mark_failed(name, failed[name])
            started = node.do(node.pool.restart_failed)
        while self._offloader is not None and any(self._everyones(bool(started))):
            self._leave("parameters")
            started = None
            if node is not None:
                node.do(node.pool.await_restarted)
                if node.pool.num_alive == 0:  # once more, while it has the device to itself
                    started = node.do(node.pool.restart_failed)

    def _is_check_due(self, node: NodeEngines) -> bool:
        interval = self._check_interval
        return interval >= 0 and (node.holds_unchecked or (interval > 0 and self._num_syncs % interval == 0))

    def _revive(self) -> None:
        """What the pool calls inside `generate` when no engine is left."""
        if self._call_everyone is not None:
            self._call_everyone()
        else:
            self.resync()
        if self.state == "failed":
            raise NoEngineLeft(self._reason)

    @property
    def _has_nodes(self) -> bool:
        return len(self._receivers) > 1

    def _leave(self, *parts: Part) -> None:
        """Return once these parts have left on every rank: what an engine then takes lies on several ranks' devices."""
        offloader = self._offloader
        if offloader is not None:
            self._together(lambda: offloader.leave(*parts))

    def _enter(self, *parts: Part) -> None:
        """Return once these parts are back on every rank."""
        offloader = self._offloader
        if offloader is not None:
            self._together(lambda: offloader.enter(*parts))

    def _wait_for_everyone(self) -> None:
        """Return once the engines of every rank have done what they were asked."""
        if self._offloader is not None and self._actor.layout.world_size > 1:
            dist.barrier(group=self._actor.groups.control)

    def _together(self, move: Callable[[], object]) -> None:
        """Make this rank's part of a move and wait for all others'. What one rank has no memory for is raised there,
        and as AnotherRankFailed everywhere else: nobody goes on into a collective that this rank will never enter."""
        error: Exception | None = None
        try:
            move()
        except Exception as raised:
            error = raised
        told = None if error is None else f"{type(error).__name__}: {error}"
        everyones = self._everyones(told)
        if error is not None:
            raise error
        failures = [f"rank {rank} failed: {reason}" for rank, reason in enumerate(everyones) if reason is not None]
        if failures:
            raise AnotherRankFailed("; ".join(failures))

    def _everyones(self, mine: T, *, only_if: bool = True) -> list[T]:
        """Every rank's value, on every rank; just this rank's where it is alone or not `only_if`."""
        size = self._actor.layout.world_size
        if size == 1 or not only_if:
            return [mine]
        values: list[Any] = [None] * size
        dist.all_gather_object(values, mine, group=self._actor.groups.control)
        return values

    def _look_at_memory(self) -> None:
        groups: set[int] = set()
        if self._node is not None:
            groups = {engine.process_id for engine in self._node.pool.engines if engine.is_own}
        figures = memory_of_both(self._actor.device, groups)
        self._memory |= {f"memory/{self.state}/{name}": value for name, value in figures.items()}
        if self.state == "generating":
            away = 0 if self._offloader is None else self._offloader.bytes_away
            self._memory["memory/offloaded"] = away / GIB

    def _turn(self, state: State) -> None:
        self.state = next_state(self.state, state, self._reason)

    def _fail(self, reason: str) -> None:
        if self.state != "failed":
            self._turn("failed")
            self._reason = reason

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """A turn broken off half way leaves nobody knows what on devices and engines."""
        try:
            yield
        except BaseException as error:
            self._fail(f"{type(error).__name__}: {error}")
            raise
