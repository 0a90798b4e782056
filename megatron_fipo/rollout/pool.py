"""All engines of a run as one: requests spread by load, weight updates to every engine, failed engines set aside.

An engine that fails, in whatever it was asked, has its process ended and gets nothing more. What it had is asked again
of the others (failover.py). `restart_failed` starts it anew, and from the next weight update on it serves again.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np

from megatron_fipo.rollout.engine import Engine, EngineAddress, EngineError, MemoryTag, NoEngineLeft
from megatron_fipo.rollout.event_loop import Background, run
from megatron_fipo.rollout.failover import Ask, Spread, answer_all, together, watched
from megatron_fipo.rollout.spread import spread_requests
from megatron_fipo.run_config import EngineSettings
from megatron_fipo.types import Completion, GenerateRequest
from megatron_fipo.weights.bucket import WeightBucket

T = TypeVar("T")

_REASON_CHARS = 300


def say_on_stderr(line: str) -> None:
    """Where nobody else listens."""
    print(line, file=sys.stderr, flush=True)


@dataclass(eq=False)
class _Member:
    """An engine and how it stands. "starting": it was started again, and waits for an update to serve again."""

    engine: Engine
    state: Literal["up", "starting", "failed"] = "up"
    reason: str = ""  # why it failed
    num_restarts: int = 0  # in a row: since it last answered, or came through from one update to the next
    can_restart: bool = True
    released: frozenset[MemoryTag] = frozenset()

    @property
    def headline(self) -> str:
        """The reason as one line, without the tail of the engine's log."""
        return self.reason.partition("\nlast lines of ")[0].replace("\n", "; ")[:_REASON_CHARS]


class EnginePool:
    """One or more engines. A context manager: leaving it shuts all of them down.

    All methods raise NoEngineLeft when every engine has failed and none may be started again.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        max_retries: int = EngineSettings.max_retries,
        max_restarts: int = EngineSettings.max_restarts,
        health_check_interval_s: float = EngineSettings.health_check_interval_s,
        say: Callable[[str], None] = say_on_stderr,
    ) -> None:
        """`say` gets one line whenever an engine fails, is started again or serves again."""
        assert engines, "a pool needs at least one engine"
        names = [engine.name for engine in engines]
        assert len(set(names)) == len(names), f"engines share a name: {names}"
        self.engines = tuple(engines)
        self.weight_version = 0
        self.revive: Callable[[], None] | None = None
        """Called in the middle of `generate` and `score` when every engine has failed but some may be started again: it
        is to start them (`restart_failed`) and to send them the weights they had, as the same version."""
        self._members = [_Member(engine) for engine in engines]
        self._last_failed = self._members[0]
        self.num_restarts_in_all = 0  # of any engine; never counts down
        self._updating = False
        self._pushes = Background()
        self._max_retries = max_retries
        self._max_restarts = max_restarts
        self._interval_s = health_check_interval_s
        self._say = say

    @property
    def failed(self) -> dict[str, str]:
        """The engines that are set aside and not started again: name -> what it failed of."""
        return {member.engine.name: member.reason for member in self._members if member.state == "failed"}

    @property
    def names(self) -> tuple[str, ...]:
        """Of all engines, failed ones too."""
        return tuple(engine.name for engine in self.engines)

    @property
    def num_alive(self) -> int:
        """Engines that are not set aside; those that were started again and wait for an update count."""
        return len(self._in_state("up", "starting"))

    def mark_failed(self, name: str, reason: str) -> None:
        """Set an engine aside for what somebody else found out about it. Raises ValueError for no engine's name."""
        member = next((member for member in self._members if member.engine.name == name), None)
        if member is None:
            raise ValueError(f"{name!r} is no engine of this pool, which has {', '.join(self.names)}")
        if member.state != "failed":
            run(self._set_aside(member, EngineError(reason)))

    def adopt_update(self, version: int, failed: Mapping[str, str], addresses: Mapping[str, EngineAddress]) -> None:
        """The engines were given `version` by others: each node's first rank has a pool of its own engines.

        Those in `failed` are set aside, for these reasons; all others serve `version`, also those that were set aside
        here, for their owners have started them again. `addresses` says where they are reached now.
        """
        assert not self._updating, "an update of this pool's own is open"
        for member in self._members:
            engine, name = member.engine, member.engine.name
            if name in failed:
                self.mark_failed(name, failed[name])
                continue
            if not engine.is_own and (engine.address != addresses[name] or member.state == "failed"):
                engine.reconnect(addresses[name])
            if not engine.is_own:
                engine.weight_version = version
            assert engine.weight_version == version, f"engine {name} is at {engine.weight_version}, not at {version}"
            if member.state != "up":
                self._say(f"engine {name} serves again, with weight version {version}")
            member.state, member.reason = "up", ""
        self.weight_version = version

    def wait_ready(self) -> None:
        """Return once every engine answers. One that does not start is set aside; NoEngineLeft if none does."""
        run(self._each(self._in_state("up", "starting"), lambda engine: engine.await_ready(), watch=False))
        if not self._in_state("up", "starting"):
            raise self._none_left("starting up")

    def await_restarted(self) -> None:
        """Return once every engine that was started again answers. One that does not is set aside, as in `wait_ready`;
        NoEngineLeft only when none is left and none may be started once more."""
        run(self._each(self._in_state("starting"), lambda engine: engine.await_ready(), watch=False))
        self._require_one("starting again")

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """One completion per request, in their order, all of the pool's weight version.

        Requests with the same prompt go to one engine, which computes the prompt once. EngineError when a request fails
        every engine it is given to.
        """
        version = self.weight_version

        async def ask(engine: Engine, share: Sequence[int]) -> list[Completion]:
            asked = [requests[index] for index in share]
            completions = await engine.agenerate(asked)
            _check_completions(engine, asked, completions, version)
            return completions

        def spread(share: Sequence[int], num_engines: int) -> list[list[int]]:
            parts = spread_requests([requests[index] for index in share], num_engines)
            return [[share[index] for index in part] for part in parts]

        completions = self._answer(len(requests), ask, spread)
        assert [item.uid for item in completions] == [item.uid for item in requests], "completions lost or doubled"
        assert all(item.weight_version == version for item in completions), "completions of several weight versions"
        return completions

    def score(self, token_ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs of given tokens, as Engine.ascore, in their order."""

        async def ask(engine: Engine, share: Sequence[int]) -> list[np.ndarray]:
            asked = [token_ids[index] for index in share]
            scores = await engine.ascore(asked)
            if [score.shape for score in scores] != [ids.shape for ids in asked]:
                raise EngineError(
                    f"engine {engine.name} scored {[len(score) for score in scores]} tokens, "
                    f"not the {[len(ids) for ids in asked]} it was sent"
                )
            return scores

        def spread(share: Sequence[int], num_engines: int) -> list[list[int]]:
            return [list(share[first::num_engines]) for first in range(num_engines)]

        return self._answer(len(token_ids), ask, spread)

    def begin_weight_update(self) -> None:
        """Open an update on every engine, after waiting for those that were started again. When the last engine fails
        here, those that may be are started again."""
        assert not self._updating, "the last weight update was not ended"
        while True:
            self.await_restarted()
            run(self._each(self._in_state("up", "starting"), lambda engine: engine.abegin_weight_update()))
            if self._in_state("up", "starting"):
                break
            self._require_one("opening a weight update")
            self.restart_failed()
        self._updating = True
        for member in self._in_state("up"):
            member.num_restarts = 0

    def push_bucket(self, bucket: WeightBucket) -> None:
        """Begin to copy a bucket's tensors into every engine, once at most one is on its way. Later calls raise."""
        in_turn = any(engine.address.update_backend for engine in self.engines)  # as a group's broadcasts must come
        self._pushes.wait(most_left=0 if in_turn else 1)
        if not self.num_alive:
            self.await_pushed()  # which raises, but not before those that failed have ended
        assert self._updating, "no weight update has begun"
        self._pushes.start(self._each(self._in_state("up", "starting"), lambda engine: engine.apush_bucket(bucket)))

    def await_pushed(self) -> None:
        """Return once all buckets are in every engine. EngineError when none is left: that ends the update."""
        self._pushes.wait()
        self._pushes.close()
        self._require_one_in_update()

    def end_weight_update(self, version: int) -> None:
        """Close the update: all engines serve as `version`. EngineError when none is left: that ends the update too."""
        self.await_pushed()
        assert self._updating, "no weight update has begun"
        run(self._each(self._in_state("up", "starting"), lambda engine: engine.aend_weight_update(version)))
        self._require_one_in_update()
        self._updating = False
        self.weight_version = version
        for member in self._in_state("up", "starting"):
            found = member.engine.weight_version
            assert found == version, f"engine {member.engine.name} is at {found} after an update to {version}"
            if member.state == "starting":
                self._say(f"engine {member.engine.name} serves again, with weight version {version}")
                member.state = "up"

    def weight_checksums(self) -> dict[str, list[dict[str, str]]]:
        """Engine name -> Engine.aweight_checksums."""
        checksums = run(self._each(self._in_state("up"), lambda engine: engine.aweight_checksums()))
        self._require_one("asking for checksums")
        return checksums

    def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Engine.arelease_memory of what each engine still holds."""

        async def release(engine: Engine) -> None:
            member = self._member(engine)
            held = [tag for tag in tags if tag not in member.released]
            if held:
                await engine.arelease_memory(held)
                member.released |= frozenset(held)

        run(self._each(self._in_state("up", "starting"), release))
        self._require_one("releasing memory")

    def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Engine.aresume_memory of what each engine has released. One started again since then holds all of it.
        EngineError when none is left in an update: that ends the update."""

        async def resume(engine: Engine) -> None:
            member = self._member(engine)
            lacking = [tag for tag in tags if tag in member.released]
            if lacking:
                await engine.aresume_memory(lacking)
                member.released -= frozenset(lacking)

        self.await_pushed()
        run(self._each(self._in_state("up", "starting"), resume))
        self._require_one_in_update()
        self._require_one("resuming memory")

    def restart_failed(self) -> list[str]:
        """Start failed engines again, at most max_restarts times each in a row, and return their names. They are ready
        when `begin_weight_update` (or `wait_ready`) returns, and serve after that update."""
        assert not self._updating, "engines are started again before a weight update, not in one"
        started = []
        for member in self._members:
            if not self._may_restart(member):
                continue
            member.num_restarts += 1
            name, which = member.engine.name, f"{member.num_restarts} of {self._max_restarts}"
            try:
                member.engine.restart()
            except (EngineError, OSError) as failure:
                member.reason = f"engine {name} could not be started again: {failure}"
                self._say(f"warning: {member.headline} (attempt {which})")
                continue
            member.state, member.released = "starting", frozenset()
            self.num_restarts_in_all += 1
            self._say(f"engine {name} is started again ({which})")
            started.append(name)
        return started

    def check_alive(self) -> None:
        """Set engines aside whose process has ended."""

        async def check(engine: Engine) -> None:
            engine.check_alive()

        run(self._each(self._in_state("up", "starting"), check, watch=False))
        self._require_one("checking that they live")

    def shutdown(self) -> None:
        with ExitStack() as shutdowns:  # calls all of them, the last first, and raises what one raised afterwards
            for engine in self.engines:
                shutdowns.callback(engine.shutdown)
            shutdowns.callback(self._pushes.close)

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _answer(self, num_items: int, ask: Ask[T], spread: Spread) -> list[T]:
        """`ask` all items of the engines, reviving them when none is left; the answers in order."""
        assert not self._updating, "engines were asked in the middle of a weight update"
        version = self.weight_version
        answers: dict[int, T] = {}
        num_asked = dict.fromkeys(range(num_items), 0)

        async def ask_and_count(engine: Engine, share: Sequence[int]) -> Sequence[T]:
            answered = await ask(engine, share)
            self._member(engine).num_restarts = 0
            return answered

        async def set_aside(engine: Engine, failure: EngineError, num_lost: int) -> None:
            lost = f"; {num_lost} of its requests are asked again"
            await self._set_aside(self._member(engine), failure, lost)

        async def ask_all() -> dict[int, T]:
            engines = await self._serving()
            if not engines:
                return {}
            return await answer_all(
                engines,
                num_asked,
                ask=ask_and_count,
                spread=spread,
                set_aside=set_aside,
                max_retries=self._max_retries,
                health_check_interval_s=self._interval_s,
            )

        while num_asked:
            answers.update(run(ask_all()))
            num_asked = {item: count for item, count in num_asked.items() if item not in answers}
            if num_asked:
                self._revive(version)
        return [answers[item] for item in range(num_items)]

    async def _serving(self) -> list[Engine]:
        """The engines that may be asked. One that holds other weights than the run's is set aside."""
        for member in self._in_state("up"):
            found = member.engine.weight_version
            if found != self.weight_version:
                stale = EngineError(
                    f"engine {member.engine.name} holds weight version {found}; the run is at {self.weight_version}"
                )
                await self._set_aside(member, stale)
        return [member.engine for member in self._in_state("up")]

    def _revive(self, version: int) -> None:
        self._require_one("answering")
        if self.revive is None:
            raise self._none_left("answering")
        restarts = self.num_restarts_in_all
        self._say("no engine is left: those that may be are started again")
        try:
            self.revive()
        except NoEngineLeft:
            raise
        except EngineError as failure:
            self._say(f"warning: that failed: {str(failure).splitlines()[0]}")
        if not self._in_state("up") and self.num_restarts_in_all == restarts:
            raise self._none_left("trying to revive them")
        assert self.weight_version == version, f"revived with weight version {self.weight_version}, not {version}"

    def _require_one_in_update(self) -> None:
        if self._updating and not self.num_alive:
            self._updating = False
            self._require_one("a weight update")
            raise EngineError(f"every engine failed in a weight update\n{self._reasons()}")

    async def _each(
        self, members: Sequence[_Member], call: Callable[[Engine], Coroutine[Any, Any, T]], *, watch: bool = True
    ) -> dict[str, T]:
        """Call every member's engine at once; set aside those that fail. Engine name -> answer of the others."""
        answers: dict[str, T] = {}

        async def one(member: _Member) -> None:
            name = member.engine.name
            answer = call(member.engine)
            try:
                answers[name] = await (watched(member.engine, answer, self._interval_s) if watch else answer)
            except EngineError as failure:
                if member.state != "failed":  # of two buckets on their way both break off
                    await self._set_aside(member, failure)

        await together(*(one(member) for member in members))
        return answers

    async def _set_aside(self, member: _Member, failure: EngineError, consequence: str = "") -> None:
        """In a thread, because it may take seconds, and so that a signal cannot break it off half done."""
        member.state, member.reason = "failed", str(failure)
        self._last_failed = member
        self._say(f"warning: {member.headline}; it is set aside{consequence}")
        try:
            await asyncio.to_thread(member.engine.shutdown)
        except OSError as error:
            member.can_restart = False
            member.reason += f"\nIt could not be ended either, and is not started again: {error}"
            self._say(f"warning: engine {member.engine.name} could not be ended: {error}")

    def _member(self, engine: Engine) -> _Member:
        return next(member for member in self._members if member.engine is engine)

    def _in_state(self, *states: str) -> list[_Member]:
        return [member for member in self._members if member.state in states]

    def _may_restart(self, member: _Member) -> bool:
        return member.state == "failed" and member.can_restart and member.num_restarts < self._max_restarts

    def _require_one(self, when: str) -> None:
        if all(member.state == "failed" and not self._may_restart(member) for member in self._members):
            raise self._none_left(when)

    def _none_left(self, when: str) -> NoEngineLeft:
        return NoEngineLeft(f"no engine is left after {when}\n{self._reasons()}")

    def _reasons(self) -> str:
        """A line about every engine, then the tail of the log of the one that failed last."""
        lines = [
            f"    {member.headline}" + (f" (started again {member.num_restarts} times)" if member.num_restarts else "")
            for member in self._members
        ]
        tail = self._last_failed.reason.partition("\nlast lines of ")
        return "\n".join([*lines, *([(tail[1] + tail[2]).lstrip()] if tail[1] else [])])


def _check_completions(
    engine: Engine, requests: Sequence[GenerateRequest], completions: Sequence[Completion], version: int
) -> None:
    """EngineError unless these are the answers to the requests, under the version wanted."""
    found, wanted = [item.uid for item in completions], [item.uid for item in requests]
    if found != wanted:
        raise EngineError(f"engine {engine.name} answered {len(found)} requests {found[:4]}..., not {wanted[:4]}...")
    for item in completions:
        if item.weight_version != version:
            raise EngineError(
                f"engine {engine.name} answered request {item.uid} with weight version {item.weight_version}; "
                f"the run is at {version}"
            )
