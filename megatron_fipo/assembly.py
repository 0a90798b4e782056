"""From settings to the parts of a run: actor, engines, problems, and the stages the loop calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_fipo.actor.actor import Actor, build_actor
from megatron_fipo.actor.megatron_flags import config_fields
from megatron_fipo.actor.setup import Groups
from megatron_fipo.arguments import Settings
from megatron_fipo.checks import Checked
from megatron_fipo.metrics.run_logger import RunLogger
from megatron_fipo.problems import Problems
from megatron_fipo.trainer.custom_generation import custom_generation
from megatron_fipo.trainer.evaluation import evaluate
from megatron_fipo.trainer.evaluation_report import write_problem_table
from megatron_fipo.trainer.evaluation_result import EvaluationResult, summary
from megatron_fipo.trainer.generation import Generate
from megatron_fipo.trainer.loop import Rollout
from megatron_fipo.trainer.recording import read_rollouts, write_rollouts
from megatron_fipo.trainer.rollout_batch import make_train_sequences, rollout_metrics
from megatron_fipo.trainer.sampling import BatchCollector, collector_settings
from megatron_fipo.types import GraderError, Group, Problem, Prompt, Sample, SamplingSettings

NUM_LOGGED_TEXTS = 4
EVALUATIONS_DIR = "evaluations"  # tables of problems, in the run's directory


def build_trainer_side(settings: Settings, checked: Checked, groups: Groups) -> Actor:
    """The actor of this rank, with the checkpoint's weights."""
    megatron = settings.megatron
    return build_actor(
        checked.arch,
        checked.weights,
        checked.layout,
        groups,
        params_dtype=torch.bfloat16 if megatron.bf16 else torch.float32,
        device=checked.device,
        transformer_impl=checked.transformer_impl,
        transformer=config_fields(megatron.transformer),
        ddp=config_fields(megatron.ddp),
        optimizer=config_fields(megatron.optimizer_fields),
        lr_warmup_iters=megatron.lr_warmup_iters,
        keep_reference=settings.correction.kl_coef > 0,
        max_tokens_per_micro_batch=settings.batch.max_tokens_per_micro_batch,
        max_response_len=settings.rollout.rollout_max_response_len,
        vocab_divisible_by=int(megatron.model.get("make_vocab_size_divisible_by", 1)),
        temperature=settings.rollout.rollout_temperature,
        # all at once: one chunk that nothing is longer than
        logprobs_chunk_size=settings.batch.log_probs_chunk_size if settings.batch.log_probs_chunk_size > 0 else 2**31,
    )


class RolloutSide:
    """Rank 0's stages: problems in, graded rollout batches and evaluations out."""

    def __init__(self, settings: Settings, problems: Problems, generate: Generate) -> None:
        self.settings = settings
        self._problems = problems
        custom = settings.rollout.custom_generate_function_path
        self._generate = generate if custom is None else custom_generation(custom, generate, problems.tokenizer)
        self.collector = BatchCollector(
            problems.source,
            self._generate,
            problems.tokenizer,
            problems.graders.grade,
            collector_settings(settings.algorithm, settings.batch, settings.rollout, settings.data, settings.run.seed),
            to_prompt=problems.prompt,
        )

    def collect(self, step: int) -> Rollout:
        """Generate a step's batch, and write it down where the user asked for that."""
        before = self._problems.prompt_counts()
        groups, metrics = self.collector.collect(step)
        metrics |= {name: count - before[name] for name, count in self._problems.prompt_counts().items()}
        if self.settings.rollout.record_rollouts is not None:
            write_rollouts(self.settings.rollout.record_rollouts, step, groups, metrics)
        return as_rollout(groups, metrics, self.settings)

    def evaluate(self) -> list[EvaluationResult]:
        """Every set of held-out problems under the engines' current weights."""
        data = self.settings.data
        return [
            evaluate(
                name,
                [self._held_out_prompt(problem) for problem in problems],
                self._generate,
                self._problems.tokenizer,
                self._problems.graders.grade,
                sampling=SamplingSettings(
                    self.settings.eval_max_response_len,
                    temperature=data.eval_temperature,
                    top_p=data.eval_top_p,
                    top_k=data.eval_top_k,
                ),
                n_samples=data.n_samples_per_eval_prompt,
                seed=self.settings.run.seed,
                on_reward_error=data.on_reward_error,
            )
            for name, problems in self._problems.held_out.items()
        ]

    def _held_out_prompt(self, problem: Problem) -> Prompt:
        prompt = self._problems.prompt(problem)
        assert prompt is not None, f"held-out problem {problem.uid} was left out"
        return prompt


def replayed(settings: Settings) -> Callable[[int], Rollout]:
    """A stand-in for `RolloutSide.collect` that reads what an earlier run recorded."""
    directory = settings.rollout.replay_rollouts
    assert directory is not None

    def collect(step: int) -> Rollout:
        groups, metrics = read_rollouts(directory, step)
        found = sum(len(group.samples) for group in groups)
        if found != settings.batch.num_samples:
            raise ValueError(
                f"--replay-rollouts {directory!r} holds {found} samples in step {step}, but "
                f"--rollout-batch-size x --n-samples-per-prompt is {settings.batch.num_samples}"
            )
        return as_rollout(groups, metrics, settings)

    return collect


def as_rollout(groups: Sequence[Group], metrics: Mapping[str, float], settings: Settings) -> Rollout:
    """Groups as the loop wants them."""
    samples = [sample for group in groups for sample in group.samples]
    sequences = make_train_sequences(groups, older_tokens=settings.rollout.partial_rollout_older_tokens)
    return Rollout(
        sequences,
        {**rollout_metrics(groups, settings.rollout.rollout_max_response_len), **metrics},
        [
            {"uid": group.samples[0].uid, "ground_truth": group.prompt.problem.ground_truth, **_shown(group.samples[0])}
            for group in groups[:NUM_LOGGED_TEXTS]
        ],
        histograms={
            "response_length": [float(len(sample.response_ids)) for sample in samples],
            "reward": [sample.reward for sample in samples if not isinstance(sample.result, GraderError)],
            "advantage": [
                float(sequence.advantages[sequence.loss_mask][0]) for sequence in sequences if sequence.loss_mask.any()
            ],
        },
    )


def _shown(sample: Sample) -> dict[str, Any]:
    """A sample's text and verdict, for a reader."""
    if isinstance(sample.result, GraderError):
        return {"response": sample.text, "reward_error": f"{sample.result.kind}: {sample.result.message}"}
    return {"response": sample.text, "score": sample.result.score, "accuracy": sample.result.accuracy}


def log_evaluation(log: RunLogger, step: int, results: Sequence[EvaluationResult], output_dir: str) -> None:
    """Record an evaluation, write its table of problems, and show the figures. Rank 0 only."""
    if not results:
        return
    metrics = {name: value for result in results for name, value in result.metrics().items()}
    log.log_evaluation(step, {**summary(results), **metrics})
    for result in results:
        write_problem_table(result, Path(output_dir) / EVALUATIONS_DIR, step)
        log.log_samples(
            step,
            [
                {"kind": "evaluation", "uid": e.uid, "prompt": e.prompt, "response": e.response, "accuracy": e.accuracy}
                | {"ground_truth": e.ground_truth}
                for e in result.examples
            ],
        )
        log.say(f"evaluation after {step} steps: {result.line()}")
