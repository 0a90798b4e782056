"""GRPO, DAPO and FIPO on a task where longer reasoning pays: same start, same problems, same mini-batches, many seeds.

Real are the training loop, dynamic sampling, grading, losses, evaluation and logs; the policy is a small transformer in
plain PyTorch. A run whose result lies in OUTPUT_DIR/results is not made again, so an interrupted study is continued by
the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from chain_of_leaps import (
    END,
    ID_OF,
    PROMPT_LEN,
    TOKENS,
    LeapsTokenizer,
    split_problems,
    training_source,
    warm_up_batches,
)
from leaps_policy import LeapsActor, LeapsEngine, LeapsTransformer, num_parameters, warm_up
from study_report import write_report

from megatron_fipo.config import LOSS_SETTINGS, BatchSettings, CorrectionSettings, FIPOSettings, RolloutSettings
from megatron_fipo.data_config import DataSettings
from megatron_fipo.metrics.records import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from megatron_fipo.metrics.run_logger import RunLogger
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.rewards import GraderPool
from megatron_fipo.run_config import GuardSettings
from megatron_fipo.trainer.evaluation import evaluate, summary
from megatron_fipo.trainer.exchange import RankZero
from megatron_fipo.trainer.generation import Grader
from megatron_fipo.trainer.guards import Guards
from megatron_fipo.trainer.loop import Rollout, Run, train
from megatron_fipo.trainer.rollout_batch import make_train_sequences, rollout_metrics
from megatron_fipo.trainer.sampling import BatchCollector, collector_settings
from megatron_fipo.types import Problem, Prompt, SamplingSettings

ALGORITHMS = ("grpo", "dapo", "fipo")
REWARD = "chain_of_leaps:grade"
STEP_METRICS = (
    *("accuracy", "response_length/mean", "entropy", "num_samples", "num_generated_samples", "num_generated_tokens"),
    *("num_surplus_groups", "groups_informative_fraction", "engine_mismatch/max", "noise_gauge"),
)
UPDATE_METRICS = (
    *("ppo_kl", "pg_clipfrac", "influence_weights_mean", "IW_upper_clip_ratio", "IW_lower_clip_ratio"),
    *("future_kl_abs_mean", "future_kl_std"),
)


@dataclass(frozen=True)
class Setup:
    """What all runs of a study share."""

    num_steps: int = 40
    prompts: int = 16  # per step
    samples: int = 16  # per prompt
    num_updates: int = 4  # per step
    max_response_len: int = 64
    lr: float = 2.5e-4
    eval_interval: int = 2
    eval_samples: int = 16  # per held-out problem
    warm_up_batches: int = 600
    warm_up_batch_size: int = 96
    warm_up_lr: float = 3e-3


def main() -> int:
    """Make the missing runs, then the table and the plots. Returns the exit status."""
    options = _parse()
    torch.set_num_threads(1)
    try:
        if not options.report_only:
            _make_runs(options.output_dir, options.seeds, options.algorithms, Setup(lr=options.lr))
        paths = write_report(options.output_dir)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from the runs that are finished")
        return 130
    except ValueError as error:
        _say(f"error: {error}")
        return 2
    print(*paths, sep="\n")
    return 0


def run_once(
    seed: int,
    algorithm: str,
    start: Mapping[str, torch.Tensor],
    setup: Setup,
    run_dir: Path,
    *,
    grader: Grader,
    control: dist.ProcessGroup,
) -> dict[str, Any]:
    """One training run from the warmed-up weights `start`; its result as JSON types. Its log goes to `run_dir`."""
    model = new_model(seed, setup)
    model.load_state_dict(start)
    engine = LeapsEngine(model, ID_OF[END])
    problems, _ = split_problems()
    loss = LOSS_SETTINGS[algorithm]
    collector = BatchCollector(
        training_source(problems, seed),
        engine.generate,
        LeapsTokenizer(),
        grader,
        _collector_settings(seed, algorithm, setup),
        to_prompt=_prompt,
    )
    bounds = (loss.influence_low, loss.influence_high) if isinstance(loss, FIPOSettings) else None
    with RunLogger(run_dir, total_steps=setup.num_steps, influence_bounds=bounds) as log:

        def evaluate_after(step: int) -> None:
            with log.stage("evaluate", part_of_step=False):
                log.log_evaluation(step, _evaluation(engine, grader, setup, seed))

        def sync(version: int) -> None:
            engine.version = version  # the engine's weights are the actor's

        train(
            Run(
                algorithm=algorithm,
                loss=loss,
                correction=CorrectionSettings(),
                num_steps=setup.num_steps,
                num_updates=setup.num_updates,
                layout=ParallelLayout(),
                control=control,
                rank_zero=RankZero(ParallelLayout(), control),
                hidden_size=model.tokens.embedding_dim,
                actor=LeapsActor(model, lr=setup.lr),
                collect=partial(_rollout, collector),
                start_training=lambda: None,
                sync_weights=sync,
                evaluate=evaluate_after,
                save=lambda step: None,
                pause=lambda: None,
                memory=dict,
                eval_interval=setup.eval_interval,
                save_interval=None,
                engine_mismatch_limit=1e-3,
                guards=Guards(GuardSettings()),
                log=log,
            ),
            first_step=0,
        )
    return {
        "seed": seed,
        "algorithm": algorithm,
        "setup": asdict(setup),
        "loss": asdict(loss),
        "num_parameters": num_parameters(model),
        **_curves(read_metrics(run_dir / EVALUATIONS_FILE), read_metrics(run_dir / METRICS_FILE)),
    }


def _rollout(collector: BatchCollector, step: int) -> Rollout:
    """A step's batch as the loop wants it."""
    groups, metrics = collector.collect(step)
    return Rollout(
        make_train_sequences(groups, older_tokens="mask"),
        {**rollout_metrics(groups, collector.settings.sampling.max_response_len), **metrics},
        [{"uid": groups[0].samples[0].uid, "response": groups[0].samples[0].text}],
    )


def _evaluation(engine: LeapsEngine, grader: Grader, setup: Setup, seed: int) -> dict[str, float]:
    """Accuracy and length on the held-out problems, at the temperature of training."""
    _, held_out = split_problems()
    result = evaluate(
        "leaps",
        [_prompt(problem) for problem in held_out],
        engine.generate,
        LeapsTokenizer(),
        grader,
        sampling=SamplingSettings(setup.max_response_len),
        n_samples=setup.eval_samples,
        seed=seed,
        on_reward_error="fail",
    )
    return summary([result])


def new_model(seed: int, setup: Setup) -> LeapsTransformer:
    """The policy with its initial weights."""
    return LeapsTransformer(len(TOKENS), PROMPT_LEN + setup.max_response_len, seed=seed)


def warmed_up(seed: int, setup: Setup) -> dict[str, torch.Tensor]:
    """Weights after the supervised warm-up: the start of all algorithms of a seed."""
    model = new_model(seed, setup)
    problems, _ = split_problems()
    batches = warm_up_batches(problems, setup.warm_up_batches, setup.warm_up_batch_size, seed)
    warm_up(model, batches, num_batches=setup.warm_up_batches, lr=setup.warm_up_lr)
    return model.state_dict()


def _make_runs(directory: Path, seeds: Sequence[int], algorithms: Sequence[str], setup: Setup) -> None:
    plan = [(seed, algorithm) for seed in seeds for algorithm in algorithms]
    missing = [run for run in plan if not is_done(_result_path(directory, *run), setup)]
    _say(f"{len(plan)} runs, {len(plan) - len(missing)} of them are there")
    started = time.monotonic()
    with GraderPool(REWARD, timeout_s=10.0, memory_bytes=2**30, num_workers=1) as graders, one_process() as control:
        for number, (seed, algorithm) in enumerate(missing, start=1):
            start = _start_weights(directory, seed, setup)
            run_started = time.monotonic()
            run_dir = directory / "runs" / f"seed-{seed}-{algorithm}"
            if run_dir.exists():
                shutil.rmtree(run_dir)  # of a run that was interrupted: runs are made in one go
            result = run_once(seed, algorithm, start, setup, run_dir, grader=graders.grade, control=control)
            now = time.monotonic()
            result["seconds"] = round(now - run_started, 1)
            result["versions"] = {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            }
            _write_json(_result_path(directory, seed, algorithm), result)
            first, last = result["evaluations"][0], result["evaluations"][-1]
            left = (now - started) / number * (len(missing) - number)
            _say(
                f"run {number} of {len(missing)}: seed {seed}, {algorithm}: accuracy {first['accuracy']:.2f} -> "
                f"{last['accuracy']:.2f}, length {first['response_length']:.1f} -> {last['response_length']:.1f}, "
                f"{result['seconds']:.0f} s; about {left / 60:.0f} min left"
            )


def _start_weights(directory: Path, seed: int, setup: Setup) -> dict[str, torch.Tensor]:
    path = directory / "warm_up" / f"seed-{seed}.pt"
    if not path.exists():
        _say(f"seed {seed}: warm-up, {setup.warm_up_batches} supervised batches")
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".tmp")
        torch.save(warmed_up(seed, setup), aside)
        os.replace(aside, path)
    return torch.load(path, weights_only=True)


def _collector_settings(seed: int, algorithm: str, setup: Setup) -> Any:
    """The product's defaults for the algorithm (dynamic sampling for DAPO and FIPO); no overlong penalty for any."""
    return collector_settings(
        algorithm,  # type: ignore[arg-type]
        BatchSettings(
            rollout_batch_size=setup.prompts,
            n_samples_per_prompt=setup.samples,
            num_updates_per_rollout=setup.num_updates,
        ),
        RolloutSettings(
            rollout_max_prompt_len=PROMPT_LEN,
            rollout_max_response_len=setup.max_response_len,
            overlong_penalty=False,
            max_generation_batches=20,
        ),
        DataSettings(task="chain_of_leaps", custom_rm_path=REWARD),
        seed,
    )


def _prompt(problem: Problem) -> Prompt:
    assert isinstance(problem.prompt, str), problem.uid
    return Prompt(problem, np.asarray(LeapsTokenizer().encode(problem.prompt), dtype=np.int64))


def _curves(evaluations: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the report needs of a run's records: evaluations, steps, and FIPO's mechanism by update of a step."""
    num_updates = len(steps[0]["updates"])
    return {
        "evaluations": [
            {
                "step": record["step"],
                "accuracy": round(record["accuracy"], 6),
                "response_length": round(record["response_length/mean"], 4),
                "truncated_fraction": round(record["response_length/truncated_fraction"], 6),
            }
            for record in evaluations
        ],
        "steps": {
            name: [float(f"{record[name]:.6g}") for record in steps]
            for name in STEP_METRICS
            if all(name in record for record in steps)
        },
        "updates": [
            {
                name: float(f"{np.mean([record['updates'][i][name] for record in steps]):.6g}")
                for name in UPDATE_METRICS
                if name in steps[0]["updates"][i]
            }
            for i in range(num_updates)
        ],
    }


def is_done(path: Path, setup: Setup) -> bool:
    """Whether a run's result is there. Raises ValueError when it was made with another setup."""
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))["setup"]
    if found != asdict(setup):
        raise ValueError(f"{path} was made with {found}, but this study has {asdict(setup)}: give another --output-dir")
    return True


def _result_path(directory: Path, seed: int, algorithm: str) -> Path:
    return directory / "results" / f"seed-{seed}-{algorithm}.json"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value) + "\n", encoding="utf-8")
    os.replace(aside, path)


@contextmanager
def one_process() -> Iterator[dist.ProcessGroup]:
    """A gloo job of this process alone, which is what the loop talks over."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert group is not None
        yield group
    finally:
        dist.destroy_process_group()


def _say(message: str) -> None:
    print(f"study: {message}", file=sys.stderr, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GRPO, DAPO and FIPO on a small task where longer reasoning pays.")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)), help="one start each")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--lr", type=float, default=Setup.lr, help="of the updates, constant")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--report-only", action="store_true", help="draw the report of the results that are there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
