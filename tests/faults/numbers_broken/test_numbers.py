"""Broken numbers: the update is skipped with every bit kept, or the run stops naming what is broken; never silently."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_table import FaultTable
from processes import run_ranks
from tiny_models import save_model

from megatron_fipo.metrics.records import plain
from megatron_fipo.rewards import grade
from megatron_fipo.rollout.answers import BadAnswer, read_completions
from megatron_fipo.trainer.agreement import EngineDisagrees, require_agreement
from megatron_fipo.trainer.rollout_batch import make_train_sequences, rollout_metrics
from megatron_fipo.types import (
    GenerateRequest,
    GraderError,
    Group,
    Problem,
    Prompt,
    RewardResult,
    Sample,
    SamplingSettings,
)

KIND = "NaN, infinity or 1e30"
NOT_FINITE = (math.nan, math.inf, -math.inf)
ABSURD = (1e30, -1e30)
VALUES = [*NOT_FINITE, *ABSURD]
ONE_RANK: dict[str, dict[str, Any]] = {"one rank": {}, "one rank bf16": {"bf16": True}}
TWO_RANKS: dict[str, dict[str, Any]] = {"dp2": {}, "pp2": {"pp": 2}, "tp2": {"tp": 2}}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, "qwen2", tied=False)
    return directory


@pytest.mark.parametrize(
    ("num_ranks", "layouts"),
    [
        (1, {"one rank": {}}),
        (2, {"dp2": {}}),
        pytest.param(1, {"one rank bf16": {"bf16": True}}, marks=pytest.mark.full_only),
        pytest.param(2, {"pp2": {"pp": 2}, "tp2": {"tp": 2}}, marks=pytest.mark.full_only),
    ],
)
def test_the_actor_stays_finite(
    model_dir: Path, tmp_path: Path, faults: FaultTable, num_ranks: int, layouts: dict[str, dict[str, Any]]
) -> None:
    kwargs = {"model_dir": str(model_dir), "root": str(tmp_path), "layouts": layouts, "values": VALUES}
    ranks = run_ranks(tmp_path, num_ranks, "numbers_broken.numbers_on_ranks:break_numbers", kwargs, 240)
    for layout in layouts:
        cases = [rank[layout] for rank in ranks]
        for case in cases[0]:
            if case == "nothing":
                assert cases[0][case]["skipped"] == 0.0
                assert not any(rank[case]["unchanged"] for rank in cases), "the actor trains on"
                continue
            outcome, ok = judged(case, [rank[case] for rank in cases])
            faults.record(KIND, f"{layout}: {case}", outcome, ok)
    assert not faults.failed, faults.failed


def judged(case: str, ranks: list[dict[str, Any]]) -> tuple[str, bool]:
    """What became of a broken number, and whether that is what is wanted of it."""
    quantity, _, value = case.rpartition(" ")
    if quantity.startswith("weight"):
        errors = {rank["error"] for rank in ranks}
        named = all("the weights hold numbers that are not finite" in error for error in errors)
        nothing_saved = not any(rank.get("left") for rank in ranks)
        return "; ".join(errors), named and nothing_saved
    skipped = bool(ranks[0]["skipped"])
    sound = all(rank["is_finite"] and rank["metrics_finite"] for rank in ranks)
    outcome = f"{'skipped' if skipped else 'clipped'}, {'sound' if sound else 'BROKEN'}"
    if skipped:
        return outcome, sound and all(rank["unchanged"] for rank in ranks)
    return outcome, sound and not must_be_skipped(quantity, float(value))


def must_be_skipped(quantity: str, value: float) -> bool:
    """All that is not finite, and 1e30 where nothing bounds it: as a gradient, or what scales one.

    A log-prob of 1e30 makes a ratio, which is clamped; a loss plus 1e30 has the loss's own gradient; an advantage of
    1e30 may fall on a token whose ratio is clipped, which has none.
    """
    return not math.isfinite(value) or quantity in ("gradient", "loss times")


def group_of(rewards: list[float], logprob: float = -1.0) -> Group:
    samples = tuple(
        Sample(
            uid=f"p/{i}",
            response_ids=np.array([3, 4, 5]),
            rollout_logprobs=np.array([-0.5, logprob if i == 1 else -1.0, -2.0], dtype=np.float32),
            loss_mask=np.ones(3, dtype=bool),
            token_versions=np.zeros(3, dtype=np.int64),
            finish_reason="stop",
            text="",
            result=RewardResult(reward, 1.0, None),
            reward=reward,
        )
        for i, reward in enumerate(rewards)
    )
    return Group(Prompt(Problem("p", "?", "1"), np.array([1, 2])), samples)


@pytest.mark.parametrize("reward", [*VALUES, 1e200, 1.7e308])
def test_a_reward_gives_finite_advantages_or_an_error(faults: FaultTable, reward: float) -> None:
    group = group_of([1.0, 0.0, reward, reward])
    outcomes = []
    for make in (lambda: make_train_sequences([group], older_tokens="correct"), lambda: rollout_metrics([group], 8)):
        try:
            made = make()
            arrays = [s.advantages for s in made] if isinstance(made, list) else [np.array(list(made.values()))]
            outcomes.append("bounded" if all(np.isfinite(array).all() for array in arrays) else "BROKEN")
        except ValueError as error:
            outcomes.append(str(error))
    wanted = "bounded" if abs(reward) == 1e30 else "the rewards of problem p are [1.0, 0.0, "
    ok = all(outcome.startswith(wanted) for outcome in outcomes)
    faults.record(KIND, f"reward {reward}", str(outcomes), ok)
    assert ok, outcomes


def test_a_grader_gives_no_verdict_that_is_not_finite(faults: FaultTable) -> None:
    results = grade(
        "numbers_broken.broken_reward:reward",
        [""] * len(VALUES),
        [str(v) for v in VALUES],
        timeout_s=20,
        memory_bytes=2**30,
    )
    for value, result in zip(VALUES, results, strict=True):
        if math.isfinite(value):
            ok = isinstance(result, RewardResult) and result.score == value
        else:
            ok = isinstance(result, GraderError) and "wanted a finite number" in result.message
        faults.record(KIND, f"score {value}", str(result), ok)
        assert ok, result


def answer(logprob: Any) -> dict[str, Any]:
    triples = [[-0.5, 3, None], [logprob, 4, None]]
    meta = {
        "id": "r",
        "finish_reason": {"type": "stop", "matched": 4},
        "weight_version": "7",
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "output_token_logprobs": triples,
    }
    return {"text": "", "output_ids": [3, 4], "meta_info": meta}


@pytest.mark.parametrize("logprob", [*NOT_FINITE, None])
def test_an_engine_s_log_prob_that_is_not_finite_is_no_answer(faults: FaultTable, logprob: float | None) -> None:
    request = GenerateRequest("r", np.array([1]), SamplingSettings(8), 0)
    try:
        outcome = str(read_completions([request], ["r"], answer(logprob), 7, 1 << 20))
    except BadAnswer as error:
        outcome = str(error)
    ok = "r: the log-prob at position 1 is" in outcome
    faults.record(KIND, f"engine's log-prob {logprob}", outcome, ok)
    assert ok, outcome


@pytest.mark.parametrize("logprob", [*VALUES, 1e39, -1e39])
def test_an_engine_s_log_prob_is_not_trained_on(faults: FaultTable, logprob: float) -> None:
    """A recording, or a rollout function of the user's, may hold what no engine returns."""
    with np.errstate(over="ignore"):
        group = group_of([1.0, 0.0], logprob)
    try:
        sequences = make_train_sequences([group], older_tokens="correct")
        mismatch = float(np.mean([np.abs(s.rollout_logprobs.astype(np.float64)).mean() for s in sequences]))
        require_agreement({"engine_mismatch/mean": mismatch}, limit=1.0)
        outcome = "trained on"
    except (ValueError, EngineDisagrees) as error:
        outcome = str(error)
    wanted = (
        "the engine's log-probs differ" if abs(logprob) == 1e30 else "sample p/1: the engine's log-prob of token 1 "
    )
    ok = outcome.startswith(wanted)
    faults.record(KIND, f"rollout log-prob {logprob}", outcome, ok)
    assert ok, outcome


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_metric_that_is_not_finite_names_itself_and_the_step(faults: FaultTable, value: float) -> None:
    with pytest.raises(ValueError, match=r"metric 'entropy' is (nan|inf|-inf) at step 4, but must be finite") as raised:
        plain("entropy", value, 4)
    faults.record(KIND, f"metric {value}", str(raised.value), True)
