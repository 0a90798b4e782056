"""Engines that fail in the middle of a weight update, at every one of its requests: the others get their weights and
serve, and none serves a mixture."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from engines.bench import NUM_ENGINES, QUICK_HEALTH_S, REQUESTS, Bench, patience, update
from engines.fault_proxy import Act, Exchange, Fault
from engines.test_answers import SLACK_S, is_answered_by_one
from engines.wire_faults import close_at_once, cut, hang_at_once, reset_at_once, whole
from fault_table import FaultTable

from megatron_fipo.rollout.engine import NO_VERSION, EngineError, NoEngineLeft

REFUSED = b'{"success": false, "message": "Failed to update parameter online"}'


@dataclass(frozen=True)
class UpdateKind:
    """A kind of fault and its ways. `json_only`: not in answers that nobody reads as JSON."""

    name: str
    variants: dict[str, Callable[[float], Act]]
    lasts: bool = False
    refuses: bool = False
    json_only: bool = False


KINDS = (
    UpdateKind("engine: refuses connections", {"refuse": reset_at_once}, lasts=True, refuses=True),
    UpdateKind("engine: hangs", {"hang": hang_at_once}, lasts=True),
    UpdateKind(
        "engine: HTTP 500",
        {"500": whole("500 Internal Server Error", b"Internal Server Error"), "400": whole("400 Bad Request", REFUSED)},
    ),
    UpdateKind("engine: broken connection", {"reset": reset_at_once, "closed": close_at_once}),
    UpdateKind("engine: truncated JSON", {"honest": cut(honest=True)}, json_only=True),
    UpdateKind(
        "engine: strange answer",
        {
            "refused with 200": whole("200 OK", REFUSED),
            "HTML": whole("200 OK", b"<html></html>"),
            "says nothing": whole("200 OK", b"{}"),
            "null": whole("200 OK", b"null"),
        },
    ),
)


def telling_indices(paths: Sequence[str]) -> list[int]:
    """Every request; of those for the buckets, which follow one another, the first, one within and the last."""
    buckets = [index for index, path in enumerate(paths) if path == "/update_weights_from_tensor"]
    assert buckets == list(range(buckets[0], buckets[-1] + 1)), paths
    alike = set(buckets) - {buckets[0], buckets[len(buckets) // 2], buckets[-1]}
    return [index for index in range(len(paths)) if index not in alike]


def is_json(exchange: Exchange) -> bool:
    return exchange.path != "/flush_cache"


def fault_of(kind: UpdateKind, variant: str, index: int) -> Fault:
    act = kind.variants[variant](0.5)
    if kind.json_only:
        return Fault(act, is_json, index, kind.lasts, kind.refuses)
    return Fault(act, index=index, lasts=kind.lasts, refuses=kind.refuses)


def problems_of_one(bench: Bench, kind: UpdateKind, variant: str, engine: int, index: int) -> list[str]:
    pool, said = bench.fresh_pool(**settings_for(kind))
    fault = bench.proxies[engine].inject(fault_of(kind, variant, index))
    started = time.monotonic()
    update(pool, bench.next_version(), bench.weights)
    took = time.monotonic() - started
    checks = {
        "the fault was not injected": fault.injected > 0,
        f"set aside: {list(pool.failed)}": list(pool.failed) == [f"e{engine}"],
        "it serves all the same": pool.engines[engine].weight_version == NO_VERSION,
        "the engine was not ended": pool.engines[engine].ended == 1,
        f"said: {said}": len(said) == 1 and "it is set aside" in said[0],
        f"it took {took:.1f} s": took < patience(4 * QUICK_HEALTH_S + SLACK_S),
        "the others' answers are wrong": is_answered_by_one(bench, pool, "generate"),
    }
    pool.shutdown()
    bench.repair()
    return [problem for problem, is_fine in checks.items() if not is_fine]


def problems_of_all(bench: Bench, kind: UpdateKind, variant: str, index: int) -> list[str]:
    """All fail at once: an error that says so, nothing served; the run may then start them again and repeat it."""
    # Opening an update starts engines again by itself, when all have failed.
    pool, said = bench.fresh_pool(max_restarts=0 if index < 2 else 1, **settings_for(kind))
    injected = [proxy.inject(fault_of(kind, variant, index)) for proxy in bench.proxies]
    version, before = bench.next_version(), pool.weight_version
    message, started = "", time.monotonic()
    try:
        update(pool, version, bench.weights)
    except NoEngineLeft as error:
        message = f"for good: {error}"
    except EngineError as error:
        message = str(error)
    took = time.monotonic() - started
    checks = {
        "the fault was not injected": all(fault.injected > 0 for fault in injected),
        f"no fitting error: {message!r}": _is_all_named(message) and message.startswith("for good") == (index < 2),
        f"it took {took:.1f} s": took < patience(8 * QUICK_HEALTH_S + SLACK_S),
    }
    if message and not message.startswith("for good"):
        checks["they serve all the same"] = all(engine.weight_version == NO_VERSION for engine in pool.engines)
        checks["the version moved"] = pool.weight_version == before
        bench.repair()
        pool.restart_failed()
        update(pool, version, bench.weights)
        completions = pool.generate(REQUESTS)
        checks["what they answer after another update is wrong"] = [item.uid for item in completions] == [
            item.uid for item in REQUESTS
        ] and {item.weight_version for item in completions} == {version}
    pool.shutdown()
    bench.repair()
    return [problem for problem, is_fine in checks.items() if not is_fine] + [f"said: {said}"] * (
        not all(checks.values())
    )


def _is_all_named(message: str) -> bool:
    return all(f"    engine e{index} " in message for index in range(NUM_ENGINES))


def settings_for(kind: UpdateKind) -> dict[str, float]:
    return {"health_check_interval_s": patience(QUICK_HEALTH_S)} if kind.lasts and not kind.refuses else {}


def run_index(bench: Bench, faults: FaultTable, kind: UpdateKind, index: int) -> None:
    failures = []
    for number, variant in enumerate(kind.variants):
        for everyone in (False, True):
            engine = (index + number) % NUM_ENGINES
            if everyone:
                problems = problems_of_all(bench, kind, variant, index)
            else:
                problems = problems_of_one(bench, kind, variant, engine, index)
            which = "all engines" if everyone else f"engine {engine} of {NUM_ENGINES}"
            name = f"{variant}, update, {which}, at request {index}"
            wanted = "an error, each named" if everyone else "set aside, the other updated"
            faults.record(kind.name, name, "; ".join(problems) or wanted, not problems)
            failures += [f"{kind.name}: {name}: {problem}" for problem in problems]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_engine_that_fails_in_an_update_serves_nothing(bench: Bench, faults: FaultTable, kind: UpdateKind) -> None:
    last = len(bench.update_paths) - 1
    for index in (0, 1 + KINDS.index(kind)) if kind.lasts else (1, 5 + KINDS.index(kind)):
        run_index(bench, faults, kind, min(index, last - kind.json_only))


@pytest.mark.full_only
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_engine_that_fails_at_any_request_of_an_update_serves_nothing(
    bench: Bench, faults: FaultTable, kind: UpdateKind
) -> None:
    paths = [path for path in bench.update_paths if not kind.json_only or path != "/flush_cache"]
    for index in telling_indices(paths):
        run_index(bench, faults, kind, index)


@pytest.mark.parametrize("engine", range(NUM_ENGINES))
def test_an_engine_that_did_not_take_the_new_version_is_found_by_its_answers(
    bench: Bench, faults: FaultTable, engine: int
) -> None:
    pool, said = bench.fresh_pool()
    swallow = whole("200 OK", b'{"success": true, "message": "Success"}')(0.0)
    fault = Fault(swallow, lambda exchange: exchange.path == "/update_weight_version")
    bench.proxies[engine].inject(fault)
    update(pool, bench.next_version(), bench.weights)
    ok = is_answered_by_one(bench, pool, "generate") and fault.injected == 1 and list(pool.failed) == [f"e{engine}"]
    faults.record("engine: stale version", f"the update of it swallowed, engine {engine}", "; ".join(said), ok)
    pool.shutdown()
    assert ok, said
