"""Engines whose answers fail, on real engines behind a proxy: the others answer in their place, the same to the last
bit, and where all fail the error names each of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
from engines.answer_faults import KINDS, STRANGER_KINDS, Kind
from engines.bench import NUM_ENGINES, QUICK_HEALTH_S, REQUESTS, SEQUENCES, Bench, patience, update
from fault_table import FaultTable

from megatron_fipo.rollout.engine import NoEngineLeft
from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.types import Completion

DRIP_TIMEOUT_S = 5.0
SLACK_S = 15.0
Call = Literal["generate", "score"]
ALL = tuple(range(NUM_ENGINES))


@dataclass(frozen=True)
class Case:
    """One fault, and on which engines."""

    kind: Kind
    variant: str
    call: Call
    engines: tuple[int, ...]
    moment: float
    index: int  # of the request, for faults that may strike any

    @property
    def name(self) -> str:
        which = "all engines" if self.engines == ALL else f"engine {self.engines[0]} of {NUM_ENGINES}"
        when = f"at {self.moment:.2f}" if self.kind.on_answer else f"at request {self.index}"
        return f"{self.variant}, {self.call}, {which}, {when}"

    @property
    def patience_s(self) -> float:
        """How long it may take until everything is answered. A hang is noticed by two missed checks."""
        return patience((DRIP_TIMEOUT_S if self.kind.needs_timeout else 4 * QUICK_HEALTH_S) + SLACK_S)


def cases(kinds: Sequence[Kind], moments: Sequence[float], *, shift: int = 0) -> list[Case]:
    """Every variant on one engine and on all, in samples and in scores, at `moments`; the engine, the request and the
    place in the answer change from case to case."""
    found = []
    for kind in kinds:
        for variant in kind.variants:
            for moment in moments:
                for call in ("generate",) if variant in NOT_IN_SCORES else ("generate", "score"):
                    num_requests = 3 if call == "generate" else 2
                    for engines in ((len(found) // 2 % 2,), ALL):
                        index = (len(found) // 2 + shift) % num_requests
                        found.append(Case(kind, variant, call, engines, moment, index))
    return found


# of what is drawn, which a score has none of
NOT_IN_SCORES = (
    "aborted",
    "not finished",
    "stopped by NaN",
    "another length",
    "token beyond",
    "evenly a token less",
    "another prompt's",
)


def same_completions(found: Sequence[Completion], wanted: Sequence[Completion], version: int) -> bool:
    return len(found) == len(wanted) and all(
        a.uid == b.uid
        and a.weight_version == version
        and a.finish_reason == b.finish_reason
        and np.array_equal(a.token_ids, b.token_ids)
        and np.array_equal(a.logprobs, b.logprobs)
        for a, b in zip(found, wanted, strict=True)
    )


def is_answered(bench: Bench, pool: EnginePool, call: Call) -> bool:
    """Every sample or score once, of the run's weights, equal to what undisturbed engines answer."""
    if call == "generate":
        return same_completions(pool.generate(REQUESTS), bench.completions, bench.version)
    scores = pool.score(SEQUENCES)
    return len(scores) == len(SEQUENCES) and all(map(np.array_equal, scores, bench.scores))


def is_answered_by_one(bench: Bench, pool: EnginePool, call: Call) -> bool:
    """The same from one engine alone, whose batches are others: the last bits of the log-probs may differ."""
    if call == "score":
        return all(np.allclose(a, b, atol=1e-4) for a, b in zip(pool.score(SEQUENCES), bench.scores, strict=True))
    completions = pool.generate(REQUESTS)
    return [item.uid for item in completions] == [item.uid for item in REQUESTS] and all(
        item.weight_version == bench.version and 1 <= len(item.token_ids) == len(item.logprobs) for item in completions
    )


def problems_of_one(bench: Bench, case: Case) -> list[str]:
    """What is not as wanted when one engine fails."""
    pool, said = bench.fresh_pool(**settings_for(case.kind))
    (index,) = case.engines
    fault = bench.proxies[index].inject(case.kind.fault(case.variant, case.moment, case.index))
    started = time.monotonic()
    answered = is_answered(bench, pool, case.call)
    took = time.monotonic() - started
    checks = {
        "the fault was not injected": fault.injected > 0,
        "the answers differ": answered,
        f"set aside: {list(pool.failed)}": list(pool.failed) == [f"e{index}"],
        f"said: {said}": len(said) == 1 and f"engine e{index} " in said[0] and "set aside" in said[0],
        "the engine was not ended": pool.engines[index].ended == 1,
        f"it took {took:.1f} s": took < case.patience_s,
        "the next answers are wrong": is_answered_by_one(bench, pool, case.call),
    }
    pool.shutdown()
    return [problem for problem, is_fine in checks.items() if not is_fine]


def problems_of_all(bench: Bench, case: Case) -> list[str]:
    """What is not as wanted when every engine fails for good."""
    pool, _ = bench.fresh_pool(max_restarts=0, **settings_for(case.kind))
    injected = [proxy.inject(case.kind.fault(case.variant, case.moment, case.index)) for proxy in bench.proxies]
    started = time.monotonic()
    message = ""
    try:
        is_answered(bench, pool, case.call)
    except NoEngineLeft as error:
        message = str(error)
    took = time.monotonic() - started
    checks = {
        "the fault was not injected": all(fault.injected > 0 for fault in injected),
        f"no fitting error: {message!r}": all(f"    engine e{index} " in message for index in ALL),
        f"it took {took:.1f} s": took < case.patience_s,
    }
    pool.shutdown()
    return [problem for problem, is_fine in checks.items() if not is_fine]


def settings_for(kind: Kind) -> dict[str, float]:
    """Of a pool that is to notice this kind of fault in a short time."""
    if kind.needs_timeout:
        return {"request_timeout_s": patience(DRIP_TIMEOUT_S)}
    return {"health_check_interval_s": patience(QUICK_HEALTH_S)} if kind.lasts and not kind.refuses else {}


def run_cases(bench: Bench, faults: FaultTable, some: Sequence[Case]) -> None:
    failures = []
    for case in some:
        problems = problems_of_all(bench, case) if case.engines == ALL else problems_of_one(bench, case)
        wanted = "no engine left, each named" if case.engines == ALL else "answered by the other, bit for bit"
        faults.record(case.kind.name, case.name, "; ".join(problems) or wanted, not problems)
        failures += [f"{case.kind.name}: {case.name}: {problem}" for problem in problems]
    assert not failures, "\n".join(failures)


def is_in_short_run(case: Case) -> bool:
    is_short = not case.kind.in_short or case.variant in case.kind.in_short
    return is_short and (case.call == "score") == (case.engines == ALL)


@pytest.mark.parametrize("kind", [*KINDS, *STRANGER_KINDS], ids=lambda kind: kind.name)
def test_a_failing_answer_is_asked_of_the_others(bench: Bench, faults: FaultTable, kind: Kind) -> None:
    run_cases(bench, faults, [case for case in cases([kind], [0.4]) if is_in_short_run(case)])


@pytest.mark.full_only
@pytest.mark.parametrize("kind", [*KINDS, *STRANGER_KINDS], ids=lambda kind: kind.name)
def test_a_failing_answer_at_other_moments_is_asked_of_the_others(bench: Bench, faults: FaultTable, kind: Kind) -> None:
    run_cases(bench, faults, [case for case in cases([kind], [0.4]) if not is_in_short_run(case)])
    run_cases(bench, faults, cases([kind], kind.other_moments, shift=1))


@pytest.mark.parametrize(
    "kind",
    [*KINDS[:3], *(pytest.param(kind, marks=pytest.mark.full_only) for kind in KINDS[3:])],
    ids=lambda kind: kind.name,
)
def test_when_all_fail_once_they_are_revived_and_answer(bench: Bench, faults: FaultTable, kind: Kind) -> None:
    pool, said = bench.fresh_pool(**settings_for(kind))
    version = bench.version

    def revive() -> None:
        for proxy in bench.proxies:
            proxy.heal()
        pool.restart_failed()
        update(pool, version, bench.weights)

    pool.revive = revive
    variant = next(iter(kind.variants))
    injected = [proxy.inject(kind.fault(variant, 0.5, 1)) for proxy in bench.proxies]
    answered = is_answered(bench, pool, "generate")
    pool.shutdown()
    ok = answered and all(fault.injected for fault in injected) and sum("serves again" in line for line in said) == 2
    for index in ALL:
        faults.record(kind.name, f"{variant}, all engines once, {index}", "revived, answered bit for bit", ok)
    assert ok, said
