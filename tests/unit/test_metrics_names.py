"""What a run logs: all that the FIPO authors log, under their names; and nothing that docs/metrics.md leaves out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_fipo.config import CorrectionSettings, FIPOSettings
from megatron_fipo.losses import correction_metrics, correction_weights, fipo_loss, update_histograms, update_metrics
from megatron_fipo.metrics import RunLogger, read_metrics
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.run_config import GuardSettings
from megatron_fipo.trainer.agreement import agreement_metrics
from megatron_fipo.trainer.guards import Guards
from megatron_fipo.trainer.rollout_batch import make_train_sequences, rollout_metrics
from megatron_fipo.trainer.tally import Tally
from megatron_fipo.types import Group, Problem, Prompt, RewardResult, Sample

OF_UPDATES = """
    pg_loss pg_clipfrac ppo_kl pg_clipfrac_lower
    influence_weights_mean influence_weights_min influence_weights_max
    IW_overall_clip_ratio IW_upper_clip_ratio IW_lower_clip_ratio
    influence_weights_mean_raw raw_influence_weights_min raw_influence_weights_max
    neg_ratio_2_3 neg_ratio_3_4 neg_ratio_4_10 neg_is_max neg_is_p75 neg_is_p995 neg_is_p999
    pos_is_min pos_is_p25 pos_is_median pos_is_p75 pos_is_p995 pos_is_p999 pos_is_max pos_mini_frac
""".split()
OF_STEPS = """
    entropy num_gen_batches
    response_length/mean response_length/max response_length/min response_length/median
    response_length/q25 response_length/q75 response_length/clip_ratio
    score/mean score/max score/min reward/mean reward/max reward/min
    advantage/mean advantage/max advantage/min return/mean return/max return/min
    advantage/token_mean
""".split()
OURS = """
    noise_gauge engine_mismatch/mean engine_mismatch/max engine_mismatch/k3_kl truncation_rate
    groups_kept_fraction groups_informative_fraction num_reward_errors accuracy
""".split()
OF_THE_ACTOR = {"grad_norm": 0.5, "lr": 1e-6, "num_kept": 6.0, "skipped": 0.0}  # Megatron's side adds these
OF_THE_LOOP = {"noise_gauge": 0.0, "num_tokens": 12, "num_skipped_updates": 0}
DOCUMENTED_ELSEWHERE = {"step", "updates"}


def make_group() -> Group:
    samples = [
        Sample(
            uid=f"p/{i}",
            response_ids=np.arange(3),
            rollout_logprobs=np.full(3, -1.0, dtype=np.float32),
            loss_mask=np.ones(3, dtype=bool),
            token_versions=np.zeros(3, dtype=np.int64),
            finish_reason="stop",
            text="",
            result=RewardResult(score=float(2 * i - 1), accuracy=float(i), answer=None),
            reward=float(2 * i - 1),
        )
        for i in range(2)
    ]
    return Group(Prompt(Problem("p", "?", ""), np.array([7, 8, 9])), tuple(samples))


def update_record(correction: CorrectionSettings) -> dict[str, Any]:
    """An update's metrics, as the actor puts them together."""
    old = torch.full((2, 3), -1.0)
    mask = torch.ones(2, 3, dtype=torch.bool)
    advantages = torch.tensor([[1.0], [-1.0]]).expand(2, 3).contiguous()
    settings = FIPOSettings()
    _, info = fipo_loss(old + 0.01 * torch.arange(6.0).view(2, 3), old, advantages, mask, settings)
    stats = info["token_stats"] | {"kl": torch.zeros(6)}
    weighed = correction_weights(old, old, mask, correction)
    if weighed is not None:
        stats |= weighed[1]
    return (
        update_metrics(stats, settings)
        | update_histograms(stats, settings)
        | correction_metrics(stats, correction)
        | OF_THE_ACTOR
    )


@pytest.fixture(scope="module")
def record(control: dist.ProcessGroup, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A step as metrics.jsonl holds it, from the functions that a run puts it together with."""
    group = make_group()
    sequences = make_train_sequences([group], older_tokens="mask")
    logprobs = [torch.from_numpy(sequence.rollout_logprobs) for sequence in sequences]
    agreement = agreement_metrics(
        sequences, logprobs, logprobs, weight_version=0, layout=ParallelLayout(), control=control
    )
    assert agreement is not None
    tally = Tally()
    tally.add_graded(group, True)
    updates = [update_record(CorrectionSettings(use_tis=True)), update_record(CorrectionSettings(use_icepop=True))]
    step = {
        "step": 1,
        **rollout_metrics([group], 8),
        **tally.metrics(),
        **agreement,
        **OF_THE_LOOP,
        "updates": updates,
    }
    guards = Guards(GuardSettings())
    guards.check(step)
    directory = tmp_path_factory.mktemp("run")
    with RunLogger(directory, total_steps=1) as logger:
        for name in ("rollout", "logprobs", "update", "sync"):
            with logger.stage(name):
                pass
        logger.log_step(step | guards.metrics())
    return read_metrics(directory / "metrics.jsonl")[0]


def test_steps_hold_the_authors_metrics_under_their_names(record: dict[str, Any]) -> None:
    missing = [name for name in [*OF_STEPS, *OURS] if not isinstance(record.get(name), (int, float))]
    assert not missing


def test_updates_hold_the_authors_metrics_under_their_names(record: dict[str, Any]) -> None:
    for update in record["updates"]:
        missing = [name for name in OF_UPDATES if not isinstance(update.get(name), float)]
        assert not missing


def test_every_metric_is_explained_in_the_docs(record: dict[str, Any], repo_root: Path) -> None:
    text = (repo_root / "docs/metrics.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`([^`]+)`", text))
    logged = set(record) | {name for update in record["updates"] for name in update}
    assert not {name.removeprefix("guards/") for name in logged} - explained - DOCUMENTED_ELSEWHERE
