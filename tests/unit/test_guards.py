"""Guards: what each of them takes for wrong, when it warns, when it stops, and what a resumed run remembers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_fipo.run_config import GuardSettings
from megatron_fipo.trainer.guards import Guards, GuardStopped

OFF: dict[str, Any] = {
    f"guard_{name}": "off"
    for name in ("fipo_inert", "noise_gauge", "entropy_collapse", "length_collapse", "constant_reward")
}


def only(name: str, action: str = "warn", **bounds: Any) -> GuardSettings:
    """Settings under which one guard alone is on."""
    return GuardSettings(**{**OFF, f"guard_{name}": action, **bounds})


def update(low: float = 0.9, high: float = 1.1, **more: float) -> dict[str, float]:
    return {
        "influence_weights_min": low,
        "influence_weights_max": high,
        "lr": 1e-6,
        "grad_norm": 0.5,
        "skipped": 0.0,
    } | more


ONE = update(1.0, 1.0)
SKIPPED = {"skipped": 1.0}


def healthy(step: int, **more: Any) -> dict[str, Any]:
    """A record that no guard objects to."""
    return {
        "step": step,
        "noise_gauge": 0.0,
        "entropy": 0.6,
        "response_length/mean": 100.0,
        "score/min": -1.0,
        "score/max": 1.0,
        "updates": [ONE, update(), update()],
    } | more


def check_all(guards: Guards, records: list[dict[str, Any]]) -> list[list[str]]:
    return [guards.check(record) for record in records]


def test_a_healthy_run_hears_nothing() -> None:
    guards = Guards(GuardSettings())
    assert check_all(guards, [healthy(step) for step in range(1, 30)]) == [[]] * 29
    assert guards.metrics() == {
        "guards/fipo_inert": 0.0,
        "guards/noise_gauge": 0.0,
        "guards/entropy_collapse": 0.0,
        "guards/length_collapse": 0.0,
        "guards/constant_reward": 0.0,
        "guards/skipped_updates": 0.0,
    }


def test_fipo_without_influence_two_steps_running_stops_the_run() -> None:
    guards = Guards(GuardSettings())
    inert = {"updates": [ONE] * 8}
    assert guards.check(healthy(1, **inert)) == []
    with pytest.raises(GuardStopped, match=r"step 2: fipo_inert: every influence weight was 1 .* 2 steps running.*"):
        guards.check(healthy(2, **inert))
    assert guards.metrics()["guards/fipo_inert"] == 1.0


def test_one_weight_other_than_one_is_enough() -> None:
    guards = Guards(only("fipo_inert"))
    for step in range(1, 7):
        assert guards.check(healthy(step, updates=[ONE, ONE, update(1.0, 1.0 + 1e-12)])) == []
        assert guards.check(healthy(step, updates=[ONE, ONE, update(1.0 - 1e-12, 1.0)])) == []


def test_inert_steps_that_do_not_follow_one_another_do_not_count_together() -> None:
    guards = Guards(only("fipo_inert", "stop"))
    for step in range(1, 10):
        assert guards.check(healthy(step, updates=[ONE] * 8 if step % 2 else [ONE, update()])) == []


@pytest.mark.parametrize(
    "updates",
    [
        [ONE],  # the first update's weights are 1 always
        [update(1.0, 1.0, lr=0.0), ONE],  # the warm-up's first update moved nothing
        [update(1.0, 1.0, grad_norm=0.0), ONE],
        [SKIPPED, ONE],  # nor did one that was skipped
        [ONE, SKIPPED],
        [{"pg_loss": 0.0, "lr": 1e-6}] * 8,  # not FIPO
        [],
    ],
)
def test_weights_of_one_are_no_evidence_where_nothing_has_moved(updates: list[dict[str, float]]) -> None:
    guards = Guards(only("fipo_inert", "stop"))
    for step in range(1, 6):
        assert guards.check(healthy(step, updates=updates)) == []
    assert "guards/fipo_inert" not in guards.metrics()


def test_a_step_that_proves_nothing_neither_clears_nor_adds() -> None:
    guards = Guards(only("fipo_inert", "stop"))
    guards.check(healthy(1, updates=[ONE, ONE]))
    guards.check(healthy(2, updates=[SKIPPED, ONE]))
    with pytest.raises(GuardStopped, match="2 steps running"):
        guards.check(healthy(3, updates=[update(1.0, 1.0, lr=0.0), ONE, ONE]))


@pytest.mark.parametrize(
    ("name", "good", "bad", "message"),
    [
        ("noise_gauge", {"noise_gauge": 0.02}, {"noise_gauge": 0.03}, r"by 0\.03 .* --noise-gauge-limit is 0\.02"),
        ("entropy_collapse", {"entropy": 0.01}, {"entropy": 0.004}, r"entropy is 0\.004 .* --entropy-floor is 0\.01"),
        ("constant_reward", {"score/max": -0.5}, {"score/max": -1.0}, r"every response of the step scored -1"),
        (
            "constant_reward",
            {"score/max": -1.0, "generated_score/min": -1.0, "generated_score/max": 1.0},
            {"generated_score/min": 0.0, "generated_score/max": 0.0},
            r"every response of the step scored 0",
        ),
    ],
)  # fmt: skip
def test_a_bound_is_kept_and_named(name: str, good: dict[str, Any], bad: dict[str, Any], message: str) -> None:
    guards = Guards(only(name))
    assert guards.check(healthy(1, **good)) == []
    assert guards.metrics()[f"guards/{name}"] == 0.0
    (warning,) = guards.check(healthy(2, **bad))
    assert warning.startswith(f"{name}: ")
    assert guards.metrics()[f"guards/{name}"] == 1.0
    with pytest.raises(GuardStopped, match=rf"step 1: {name}: .*{message}"):
        Guards(only(name, "stop")).check(healthy(1, **bad))
    assert Guards(GuardSettings(**OFF)).check(healthy(1, **bad)) == []


def test_length_is_compared_with_the_first_five_steps() -> None:
    guards = Guards(only("length_collapse"))
    lengths = [100, 110, 90, 105, 95, 30, 29.9]  # 30 is 0.3 times their mean
    found = check_all(guards, [healthy(i, **{"response_length/mean": n}) for i, n in enumerate(lengths, start=1)])
    assert found[:6] == [[]] * 6
    (warning,) = found[6]
    assert warning.startswith(
        "length_collapse: the mean response has 29.9 tokens, and had 100.0 over the first 5 steps"
    )
    assert "--length-floor 0.3" in warning


def test_a_warning_comes_at_once_and_then_every_tenth_step_while_it_lasts() -> None:
    guards = Guards(only("entropy_collapse"))
    low = [step for step in range(1, 41) if guards.check(healthy(step, entropy=0.6 if step in (4, 27) else 0.0))]
    assert low == [1, 5, 15, 25, 28, 38]


def test_skipped_updates_in_a_row_stop_the_run_across_steps() -> None:
    guards = Guards(GuardSettings(**OFF, max_skipped_updates=3))
    assert guards.check(healthy(1, updates=[SKIPPED, SKIPPED, ONE, SKIPPED])) == []
    assert guards.metrics() == {"guards/skipped_updates": 1.0}
    assert guards.check(healthy(2, updates=[SKIPPED, SKIPPED])) == []
    assert guards.metrics() == {"guards/skipped_updates": 3.0}
    with pytest.raises(
        GuardStopped, match=r"skipped_updates: updates skipped in a row .*: 4, .* --max-skipped-updates is 3"
    ):
        guards.check(healthy(3, updates=[SKIPPED, ONE]))


def test_zero_allows_no_skipped_update() -> None:
    with pytest.raises(GuardStopped, match="infinity in the loss or the gradient: 1, "):
        Guards(GuardSettings(max_skipped_updates=0)).check(healthy(1, updates=[ONE, SKIPPED, update()]))


def test_every_guard_that_stops_is_named_and_warnings_come_in_one_list() -> None:
    bad = {"entropy": 0.0, "noise_gauge": 1.0}
    assert [text.split(":")[0] for text in Guards(GuardSettings()).check(healthy(1, **bad))] == [
        "noise_gauge",
        "entropy_collapse",
    ]
    stopping = GuardSettings(guard_entropy_collapse="stop", guard_noise_gauge="stop")
    with pytest.raises(GuardStopped, match=r"noise_gauge: .*; entropy_collapse: "):
        Guards(stopping).check(healthy(1, **bad))


def test_a_record_without_the_metrics_is_not_judged() -> None:
    guards = Guards(GuardSettings())
    assert check_all(guards, [{"step": step} for step in range(1, 12)]) == [[]] * 11
    assert guards.metrics() == {"guards/skipped_updates": 0.0}


def test_what_is_no_number_counts_as_wrong() -> None:
    nan = float("nan")
    found = Guards(GuardSettings()).check(healthy(1, entropy=nan, noise_gauge=nan))
    assert [text.split(":")[0] for text in found] == ["noise_gauge", "entropy_collapse"]


def test_a_resumed_run_goes_on_as_the_undisturbed_one_would() -> None:
    lengths = [100.0] * 5 + [20.0] * 25
    history = [
        healthy(step, **{"response_length/mean": length}, updates=[ONE, update(), SKIPPED if step == 7 else update()])
        for step, length in enumerate(lengths, start=1)
    ]
    whole = Guards(GuardSettings())
    undisturbed = check_all(whole, history)
    assert [len(texts) for texts in undisturbed].count(1) == 3  # steps 6, 16 and 26
    for step in (0, 3, 7, 20):
        resumed = resumed_after(history[:step])
        assert check_all(resumed, history[step:]) == undisturbed[step:]
        assert resumed.metrics() == whole.metrics()
    inert = [healthy(1, updates=[ONE, ONE])]
    with pytest.raises(GuardStopped, match="2 steps running"):
        resumed_after(inert).check(healthy(2, updates=[ONE, ONE]))
    with pytest.raises(ValueError, match="must hold inert_steps, first_lengths"):
        Guards(GuardSettings()).load_state_dict({"inert_steps": 0})


def resumed_after(history: list[dict[str, Any]]) -> Guards:
    """Guards that have gone through `history`, saved and loaded."""
    before = Guards(GuardSettings())
    check_all(before, history)
    after = Guards(GuardSettings())
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    return after
