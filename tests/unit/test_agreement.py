"""Engine against trainer: what counts, what is left out, and when the run stops."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.trainer.agreement import EngineDisagrees, agreement_metrics, require_agreement
from megatron_fipo.types import TrainSequence


@pytest.fixture(scope="module")
def control() -> Iterator[dist.ProcessGroup]:
    """A gloo job of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()


def make_sequence(mask: list[int], rollout: list[float], *, version: int = 4) -> TrainSequence:
    return TrainSequence(
        uid="p/0",
        token_ids=np.zeros(len(mask), dtype=np.int64),
        loss_mask=np.array(mask, dtype=bool),
        advantages=np.ones(len(mask), dtype=np.float32),
        rollout_logprobs=np.array(rollout, dtype=np.float32),
        weight_version=version,
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
    assert metrics == pytest.approx(
        {
            "entropy": 3.0,
            "engine_mismatch/mean": (0.5 + 0 + 0.25) / 3,
            "engine_mismatch/max": 0.5,
            "engine_mismatch/num_tokens": 3,
        }
    )


def test_samples_of_older_weights_do_not_count_as_mismatch_but_as_entropy(control: dist.ProcessGroup) -> None:
    sequences = [make_sequence([1, 0], [-1, 0]), make_sequence([1, 0], [-7, 0], version=3)]
    metrics = metrics_of(sequences, [[-1.5, 0], [-1, 0]], [[1, 0], [3, 0]], control)
    assert metrics["engine_mismatch/mean"] == 0.5
    assert metrics["engine_mismatch/max"] == 0.5
    assert metrics["engine_mismatch/num_tokens"] == 1
    assert metrics["entropy"] == 2.0


def test_a_batch_of_nothing_fresh_agrees(control: dist.ProcessGroup) -> None:
    metrics = metrics_of([make_sequence([1, 0], [-7, 0], version=3)], [[-1, 0]], [[3, 0]], control)
    assert metrics["engine_mismatch/mean"] == 0.0
    assert metrics["engine_mismatch/num_tokens"] == 0
    require_agreement(metrics, 1e-9)


def test_an_empty_response_has_neither_entropy_nor_mismatch(control: dist.ProcessGroup) -> None:
    metrics = metrics_of([make_sequence([0, 0], [0, 0])], [[0, 0]], [[0, 0]], control)
    assert set(metrics.values()) == {0.0}


def test_a_mean_over_the_limit_stops_the_run_and_names_the_flag() -> None:
    require_agreement({"engine_mismatch/mean": 0.25}, 0.25)
    message = r"differ from the trainer's by 0\.251 on average, but --engine-mismatch-limit is 0\.25"
    with pytest.raises(EngineDisagrees, match=message):
        require_agreement({"engine_mismatch/mean": 0.251}, 0.25)


def test_a_mismatch_that_is_nan_is_over_any_limit(control: dist.ProcessGroup) -> None:
    metrics = metrics_of([make_sequence([1, 1, 0], [float("nan"), -1, 0])], [[-1, -1, 0]], [[1, 1, 0]], control)
    with pytest.raises(EngineDisagrees, match="by nan on average"):
        require_agreement(metrics, 1e9)
