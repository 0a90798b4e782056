"""Engine against trainer: what counts, what is left out, and when the run stops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.trainer.agreement import EngineDisagrees, agreement_metrics, require_agreement
from megatron_fipo.types import TrainSequence


def make_sequence(mask: list[int], rollout: list[float], *, version: int | list[int] = 4) -> TrainSequence:
    return TrainSequence(
        uid="p/0",
        token_ids=np.zeros(len(mask), dtype=np.int64),
        loss_mask=np.array(mask, dtype=bool),
        advantages=np.ones(len(mask), dtype=np.float32),
        rollout_logprobs=np.array(rollout, dtype=np.float32),
        token_versions=np.where(np.array(mask, dtype=bool), version, -1),
    )


def metrics_of(
    sequences: list[TrainSequence],
    logprobs: list[list[float]],
    entropies: list[list[float]],
    control: dist.ProcessGroup,
) -> dict[str, float]:
    metrics = agreement_metrics(
        sequences,
        [torch.tensor(row) for row in logprobs],
        [torch.tensor(row) for row in entropies],
        weight_version=4,
        layout=ParallelLayout(),
        control=control,
    )
    assert metrics is not None
    return metrics


def test_means_run_over_response_tokens_of_the_whole_batch(control: dist.ProcessGroup) -> None:
    # the masked entries are far off and must not show
    sequences = [make_sequence([0, 1, 1, 0], [9, -1, -2, 9]), make_sequence([1, 0], [-0.5, 9])]
    metrics = metrics_of(sequences, [[0, -1.5, -2, 0], [-0.25, 0]], [[9, 1, 2, 9], [6, 9]], control)
    rho = np.array([-0.5, 0, 0.25])
    ratio = np.exp(rho)
    assert metrics == pytest.approx(
        {
            "entropy": 3.0,
            "engine_mismatch/mean": (0.5 + 0 + 0.25) / 3,
            "engine_mismatch/max": 0.5,
            "engine_mismatch/k3_kl": np.mean(ratio - rho - 1),
            "engine_mismatch/ratio_mean": ratio.mean(),
            "engine_mismatch/ratio_p99": 1 + (np.exp(0.25) - 1) * 0.98,  # of three: 0.98 between the upper two
            "engine_mismatch/ratio_max": np.exp(0.25),
            "engine_mismatch/num_tokens": 3,
            "engine_mismatch/older_tokens": 0.0,
            "engine_mismatch/num_non_finite": 0.0,
        }
    )


def test_samples_of_older_weights_do_not_count_as_mismatch_but_as_entropy(control: dist.ProcessGroup) -> None:
    sequences = [make_sequence([1, 0], [-1, 0]), make_sequence([1, 0], [-7, 0], version=3)]
    metrics = metrics_of(sequences, [[-1.5, 0], [-1, 0]], [[1, 0], [3, 0]], control)
    assert metrics["engine_mismatch/mean"] == 0.5
    assert metrics["engine_mismatch/max"] == 0.5
    assert metrics["engine_mismatch/num_tokens"] == 1
    assert metrics["engine_mismatch/older_tokens"] == 0.5
    assert metrics["entropy"] == 2.0


def test_of_a_continued_response_only_the_newest_tokens_count_as_mismatch(control: dist.ProcessGroup) -> None:
    sequence = make_sequence([0, 1, 1, 1, 0], [9, -7, -7, -1, 9], version=[0, 2, 3, 4, 0])
    metrics = metrics_of([sequence], [[0, -1, -1, -1.5, 0]], [[0, 1, 1, 1, 0]], control)
    assert metrics["engine_mismatch/max"] == 0.5
    assert metrics["engine_mismatch/older_tokens"] == pytest.approx(2 / 3)


def test_a_batch_of_nothing_fresh_agrees(control: dist.ProcessGroup) -> None:
    metrics = metrics_of([make_sequence([1, 0], [-7, 0], version=3)], [[-1, 0]], [[3, 0]], control)
    assert metrics["engine_mismatch/mean"] == 0.0
    assert metrics["engine_mismatch/num_tokens"] == 0
    require_agreement(metrics, 1e-9)


def test_an_empty_response_has_neither_entropy_nor_mismatch(control: dist.ProcessGroup) -> None:
    metrics = metrics_of([make_sequence([0, 0], [0, 0])], [[0, 0]], [[0, 0]], control)
    ratios = {f"engine_mismatch/ratio_{name}" for name in ("mean", "p99", "max")}
    assert {name for name, value in metrics.items() if value} == ratios
    assert {metrics[name] for name in ratios} == {1.0}


def test_a_mean_over_the_limit_stops_the_run_and_names_the_flag() -> None:
    require_agreement({"engine_mismatch/mean": 0.25}, 0.25)
    message = r"differ from the trainer's by 0\.251 on average, but --engine-mismatch-limit is 0\.25"
    with pytest.raises(EngineDisagrees, match=message):
        require_agreement({"engine_mismatch/mean": 0.251}, 0.25)


def test_what_is_not_finite_is_counted_and_left_out(control: dist.ProcessGroup) -> None:
    nan, inf = float("nan"), float("inf")
    sequences = [make_sequence([1, 1, 1, 0], [-1, -1, -1, 0]), make_sequence([1, 0], [-1, 0], version=3)]
    metrics = metrics_of(sequences, [[nan, -1.5, -inf, nan], [nan, 0]], [[nan, 3, 5, nan], [4, 0]], control)
    assert metrics["engine_mismatch/num_non_finite"] == 3
    assert metrics["engine_mismatch/mean"] == metrics["engine_mismatch/max"] == 0.5
    assert metrics["engine_mismatch/num_tokens"] == 1
    assert metrics["entropy"] == 4.0
    assert np.isfinite(list(metrics.values())).all()
    nothing = metrics_of([make_sequence([1, 0], [-1, 0])], [[nan, 0]], [[nan, 0]], control)
    assert (nothing["engine_mismatch/num_non_finite"], nothing["engine_mismatch/num_tokens"]) == (1, 0)
    require_agreement(nothing, 1e-9)


def test_a_log_ratio_beyond_all_bounds_stays_finite(control: dist.ProcessGroup) -> None:
    metrics = metrics_of([make_sequence([1, 1, 0], [-900, 0, 0])], [[0, -900, 0]], [[1, 1, 0]], control)
    assert metrics["engine_mismatch/mean"] == 900
    assert metrics["engine_mismatch/ratio_max"] == pytest.approx(np.exp(20.0))
    assert metrics["engine_mismatch/k3_kl"] == pytest.approx((np.exp(20.0) - 21 + np.exp(-20.0) + 19) / 2)


def test_k3_estimates_the_divergence_of_trainer_from_engine(control: dist.ProcessGroup) -> None:
    rng = np.random.default_rng(0)
    engine = np.array([0.5, 0.3, 0.2])
    trainer = np.array([0.4, 0.4, 0.2])
    tokens = rng.choice(3, size=200_000, p=engine)
    sequence = make_sequence([1] * len(tokens), np.log(engine)[tokens].tolist())
    metrics = metrics_of([sequence], [np.log(trainer)[tokens].tolist()], [[0.0] * len(tokens)], control)
    exact = float((engine * np.log(engine / trainer)).sum())
    assert metrics["engine_mismatch/k3_kl"] == pytest.approx(exact, rel=0.02)
    assert metrics["engine_mismatch/ratio_mean"] == pytest.approx(1.0, abs=0.002)
