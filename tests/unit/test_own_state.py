"""What a checkpoint holds of the run is looked at before anything starts: what is of another kind is named."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_on_disk import reseal, save
from fake_rollouts import ScriptedEngine, make_collector

from megatron_fipo.actor.checkpoint_files import CheckpointError, read_run_state, saved_dtype, verify_checkpoint
from megatron_fipo.own_state import NOTHING_DONE, require_own_state
from megatron_fipo.run_config import GuardSettings
from megatron_fipo.trainer.guards import Guards
from megatron_fipo.trainer.sampling import BatchCollector
from megatron_fipo.types import SamplingSettings

DIRECTORY = Path("runs/step_0000002")
LAYOUT: dict[str, Any] = {"tp": 1, "pp": 1, "cp": 1, "dp": 1, "vpp": 1, "ep": 1, "etp": 1} | {
    "sequence_parallel": False,
    "params_dtype": "torch.float32",
    "device": "cpu",
}
Key = tuple[str | int, ...]


def collector() -> BatchCollector:
    engine = ScriptedEngine(text_of)
    sampling = SamplingSettings(max_response_len=20)
    return make_collector(engine, partial_rollout_len=8, sampling=sampling, generation_batch_size=14)


def text_of(uid: str) -> str:
    """Every second sample is right; most are short, some take several steps."""
    verdict = "right" if int(uid.split("/")[1]) % 2 else "wrong"
    return verdict + "." * max(0, sum(map(ord, uid)) % 24 - 12)


@cache
def whole_text() -> str:
    """As a run saves it: groups that wait, finished and unfinished ones, and guards that have seen steps."""
    drawn = collector()
    for step in (1, 2):
        drawn.generate.weight_version = step - 1  # type: ignore[attr-defined]
        drawn.collect(step)
    guards = Guards(GuardSettings())
    for step in (1, 2):
        guards.check({"step": step, "response_length/mean": 12.5, "entropy": 0.001, "score/min": 0, "score/max": 1})
    own = {"collector": drawn.state_dict(), "guards": guards.state_dict(), "num_updates": 8}
    return json.dumps({"step": 2, "model": {}, "layout": LAYOUT, "trainer": own, "score": 0.5})


def whole() -> dict[str, Any]:
    return json.loads(whole_text())


def keys_of(value: Any, key: Key = ()) -> Iterator[Key]:
    """Every place in it, of lists the first and the last entries."""
    if key:
        yield key
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from keys_of(inner, (*key, name))
    elif isinstance(value, list):
        for index in {0, len(value) - 1} if value else ():
            yield from keys_of(value[index], (*key, index))


def at(value: Any, key: Key) -> Any:
    for part in key:
        value = value[part]
    return value


def spelled(key: Key) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def refusal(state: dict[str, Any]) -> str | None:
    try:
        require_own_state(DIRECTORY, state)
    except CheckpointError as error:
        return str(error)
    return None


def test_what_a_run_saves_is_accepted() -> None:
    state = whole()
    kinds = {kind for entry in state["trainer"]["collector"]["waiting"] for kind in entry}
    assert kinds == {"group", "unfinished"}
    assert state["trainer"]["guards"]["steps_wrong"]["entropy_collapse"] == 2
    require_own_state(DIRECTORY, state)
    require_own_state(DIRECTORY, {**state, "score": None})
    replayed = {**state["trainer"], "collector": None}
    require_own_state(DIRECTORY, {**state, "trainer": replayed})


@pytest.mark.parametrize("wrong", [None, "abc", -1, 1.5, [], {}, True, [None], [[]], {"a": 1}, 2**70])
def test_a_value_of_another_kind_is_named_with_its_key_and_never_a_surprise(wrong: Any) -> None:
    """It is refused by its key, or is as good as any other value; loading it then raises ValueError or nothing."""
    refused = accepted = 0
    for key in keys_of(whole()["trainer"], ("trainer",)):
        state = whole()
        before = at(state, key)
        at(state, key[:-1])[key[-1]] = copy.deepcopy(wrong)
        error = refusal(state)
        if error is not None:
            refused += 1
            assert error.startswith(f"{DIRECTORY}/run_state.json says trainer")
            assert (
                f"says {spelled(key)} " in error or f"{spelled(key[:-1])} [" in error or isinstance(wrong, list | dict)
            )
            assert ", but must say " in error
            assert "\n" not in error
            assert len(error) < 500
            continue
        accepted += 1
        is_free = "extra" in key or "source" in key
        are_numbers = isinstance(wrong, int | float) and isinstance(before, int | float)
        assert is_free or type(wrong) is type(before) or are_numbers or wrong in (None, "abc", []), (key, before)
        with contextlib.suppress(ValueError):
            Guards(GuardSettings()).load_state_dict(state["trainer"]["guards"])
            if state["trainer"]["collector"] is not None:
                collector().load_state_dict(state["trainer"]["collector"])
    assert refused > 50
    assert accepted < 40


def test_what_is_missing_or_too_much_is_named_with_its_key() -> None:
    for key in keys_of(whole()["trainer"], ("trainer",)):
        state = whole()
        holder = at(state, key[:-1])
        if len(key) == 1 or isinstance(holder, list) or key[-2] in ("source", "extra", "steps_wrong"):
            continue
        del holder[key[-1]]
        with pytest.raises(CheckpointError) as caught:
            require_own_state(DIRECTORY, state)
        assert f"{spelled(key[:-1])} " in str(caught.value)
        assert str(key[-1]) in str(caught.value).partition("must say an object of ")[2]
        holder["another"] = 1
        with pytest.raises(CheckpointError, match="must say an object of "):
            require_own_state(DIRECTORY, state)


@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        (("trainer",), NOTHING_DONE, "says trainer.guards None, but must say an object of inert_steps, first_lengths"),
        (("trainer",), [1], "says trainer [1], but must say an object of collector, guards, num_updates"),
        (("trainer", "num_updates"), -1, "says trainer.num_updates -1, but must say a whole number >= 0"),
        (("trainer", "guards", "inert_steps"), "2", "says trainer.guards.inert_steps '2', but must say a whole number"),
        (("trainer", "collector", "waiting"), {}, "says trainer.collector.waiting {}, but must say a list"),
        (("score",), "high", "says score 'high', but must say a number"),
        (("score",), True, "says score True, but must say a number"),
    ],
)
def test_the_error_says_file_key_what_is_found_and_what_is_wanted(key: Key, wrong: Any, message: str) -> None:
    state = whole()
    at(state, key[:-1])[key[-1]] = wrong
    with pytest.raises(CheckpointError) as caught:
        require_own_state(DIRECTORY, state)
    assert f"{DIRECTORY}/run_state.json {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "abc"}, "says step 'abc', but must say a whole number >= 0"),
        ({"step": -2}, "says step -2, but must say a whole number >= 0"),
        ({"step": 2.0}, "says step 2.0, but must say a whole number >= 0"),
        ({"model": ["llama"]}, r"says model \['llama'\], but must say an object"),
        ({"layout": {**LAYOUT, "tp": "two"}}, "says layout.tp 'two', but must say a whole number > 0"),
        ({"layout": {**LAYOUT, "dp": -1}}, "says layout.dp -1, but must say a whole number > 0"),
        ({"layout": {**LAYOUT, "cp": None}}, "says layout.cp None, but must say a whole number > 0"),
        ({"layout": {**LAYOUT, "sequence_parallel": 1}}, "says layout.sequence_parallel 1, but must say true or false"),
        ({"layout": {**LAYOUT, "params_dtype": 32}}, "says layout.params_dtype 32, but must say a text"),
        ({"layout": None}, "says layout None, but must say an object"),
    ],
)
def test_a_wrong_kind_under_a_true_manifest_makes_a_checkpoint_that_is_not_whole(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """So that the newest whole one is used instead, or the run ends with this line."""
    directory = save(tmp_path, 2)
    path = directory / "run_state.json"
    path.write_text(json.dumps({**whole(), **change}))
    reseal(directory)
    for look in (verify_checkpoint, read_run_state):
        with pytest.raises(CheckpointError, match=f"run_state.json {message}"):
            look(directory)


@pytest.mark.parametrize("layout", [{}, {"params_dtype": "torch.float16"}, {"params_dtype": "float"}])
def test_a_checkpoint_that_names_no_precision_that_it_can_have_is_not_exported(
    tmp_path: Path, layout: dict[str, Any]
) -> None:
    directory = save(tmp_path, 2)
    path = directory / "run_state.json"
    path.write_text(json.dumps({**whole(), "layout": LAYOUT}))
    assert saved_dtype(directory) == torch.float32
    path.write_text(json.dumps({**whole(), "layout": layout}))
    found = layout.get("params_dtype")
    wanted = "must say one of torch.float32, torch.bfloat16"
    with pytest.raises(CheckpointError, match=f"run_state.json says layout.params_dtype {found!r}, but {wanted}"):
        saved_dtype(directory)
