"""One rollout batch: prompts to graded groups, dynamic sampling, and the sequences and metrics made of them.

Runs on rank 0. The engine, the grader and the tokenizer are arguments, so that tests need none of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np

from megatron_fipo.config import Algorithm, BatchSettings, RolloutSettings, require
from megatron_fipo.data.prompts import Tokenizer, tokenize_problem
from megatron_fipo.data.source import ProblemSource
from megatron_fipo.data_config import DataSettings
from megatron_fipo.losses.advantages import group_advantages, overlong_penalty
from megatron_fipo.trainer.recording import group_from_dict, group_to_dict
from megatron_fipo.types import (
    Completion,
    GenerateRequest,
    GraderError,
    Group,
    Prompt,
    RewardResult,
    Sample,
    SamplingSettings,
    TrainSequence,
)

Generate = Callable[[Sequence[GenerateRequest]], Sequence[Completion]]
"""Draws one response per request; their order is free, the uid says which is which."""
Grader = Callable[[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Sequence[RewardResult | GraderError]]
"""(responses, ground truths, extras) -> verdicts in the same order; GraderPool.grade is one."""


class RewardFailed(ValueError):
    """A grader gave no verdict on a response. It is never taken for a wrong answer."""


@dataclass(frozen=True)
class CollectorSettings:
    """What makes a rollout batch, with every default resolved (see `collector_settings`)."""

    seed: int
    rollout_batch_size: int
    n_samples_per_prompt: int
    generation_batch_size: int  # prompts drawn at a time under dynamic sampling
    max_generation_batches: int
    dynamic_sampling: bool
    apply_chat_template: bool
    max_prompt_len: int
    sampling: SamplingSettings
    overlong_buffer_len: int | None  # None: no overlong penalty
    overlong_penalty_factor: float


def collector_settings(
    algorithm: Algorithm, batch: BatchSettings, rollout: RolloutSettings, data: DataSettings, seed: int
) -> CollectorSettings:
    """The settings of a run's collector. Dynamic sampling and the overlong penalty are on for DAPO and FIPO unless set.

    Raises ValueError for an overlong buffer that exceeds the longest response.
    """
    is_dapo_like = algorithm in ("dapo", "fipo")
    penalises = is_dapo_like if rollout.overlong_penalty is None else rollout.overlong_penalty
    require(
        not penalises or rollout.overlong_buffer_len <= rollout.rollout_max_response_len,
        "--overlong-buffer-len",
        rollout.overlong_buffer_len,
        f"at most --rollout-max-response-len ({rollout.rollout_max_response_len}), or --overlong-penalty off",
    )
    return CollectorSettings(
        seed=seed,
        rollout_batch_size=batch.rollout_batch_size,
        n_samples_per_prompt=batch.n_samples_per_prompt,
        generation_batch_size=rollout.over_sampling_batch_size or batch.rollout_batch_size,
        max_generation_batches=rollout.max_generation_batches,
        dynamic_sampling=is_dapo_like if rollout.dynamic_sampling is None else rollout.dynamic_sampling,
        apply_chat_template=data.apply_chat_template,
        max_prompt_len=rollout.rollout_max_prompt_len,
        sampling=SamplingSettings(rollout.rollout_max_response_len, temperature=rollout.rollout_temperature),
        overlong_buffer_len=rollout.overlong_buffer_len if penalises else None,
        overlong_penalty_factor=rollout.overlong_penalty_factor,
    )


class BatchCollector:
    """Draws, grades and filters groups until a rollout batch is full. Holds the surplus groups between steps.

    The batch is filled in prompt order, never in the order of finishing, which would favour short responses. Whatever
    is generated is trained on, in this step or a later one, or was uninformative: nothing else is lost.
    """

    def __init__(
        self,
        source: ProblemSource,
        generate: Generate,
        tokenizer: Tokenizer,
        grader: Grader,
        settings: CollectorSettings,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.source = source
        self.generate = generate
        self.tokenizer = tokenizer
        self.grader = grader
        self.settings = settings
        self.clock = clock
        self.surplus: list[Group] = []

    def collect(self, step: int) -> tuple[tuple[Group, ...], dict[str, float]]:
        """The `rollout_batch_size` groups of a step, in prompt order, and how they came about.

        Surplus groups of earlier steps come first (their old log-probs come from the trainer, like all). With dynamic
        sampling only groups whose accuracies differ are kept (DAPO, arXiv 2503.14476, eq. 11).

        Raises ValueError when `max_generation_batches` do not fill the batch, RewardFailed when a grader fails.
        """
        settings = self.settings
        tally = _Tally()
        kept = self.surplus
        while len(kept) < settings.rollout_batch_size:
            if settings.dynamic_sampling:
                if tally.num_batches == settings.max_generation_batches:
                    raise ValueError(_cannot_fill(len(kept), settings, tally))
                num_prompts = settings.generation_batch_size
            else:
                num_prompts = settings.rollout_batch_size - len(kept)
            groups = self._draw(step, num_prompts, tally)
            informative = [group for group in groups if is_informative(group)]
            tally.add(groups, len(informative))
            kept = kept + (informative if settings.dynamic_sampling else groups)
        self.surplus = kept[settings.rollout_batch_size :]
        return tuple(kept[: settings.rollout_batch_size]), {**tally.metrics(), "num_surplus_groups": len(self.surplus)}

    def state_dict(self) -> dict[str, Any]:
        """Data position and surplus groups, in JSON types and exact."""
        return {"source": self.source.state_dict(), "surplus": [group_to_dict(group) for group in self.surplus]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises ValueError when it does not belong to this run's data or group size."""
        if state.keys() != {"source", "surplus"}:
            raise ValueError(f"the saved rollout state holds {sorted(state)}, but must hold 'source' and 'surplus'")
        surplus = [group_from_dict(group) for group in state["surplus"]]
        for group in surplus:
            require(
                len(group.samples) == self.settings.n_samples_per_prompt,
                "--n-samples-per-prompt",
                self.settings.n_samples_per_prompt,
                f"{len(group.samples)}, as in the checkpoint's surplus groups",
            )
        self.source.load_state_dict(state["source"])
        self.surplus = surplus

    def _draw(self, step: int, num_prompts: int, tally: _Tally) -> list[Group]:
        settings = self.settings
        prompts = [
            tokenize_problem(
                self.source.next_problem(),
                self.tokenizer,
                apply_chat_template=settings.apply_chat_template,
                max_prompt_len=settings.max_prompt_len,
            )
            for _ in range(num_prompts)
        ]
        start = self.clock()
        completions = generate_groups(
            prompts,
            self.generate,
            sampling=settings.sampling,
            num_samples=settings.n_samples_per_prompt,
            seed=settings.seed,
            step=step,
        )
        generated = self.clock()
        groups = grade_groups(prompts, completions, self.tokenizer, self.grader)
        tally.grading_s += self.clock() - generated
        tally.generation_s += generated - start
        return [self._with_penalty(group) for group in groups]

    def _with_penalty(self, group: Group) -> Group:
        settings = self.settings
        if settings.overlong_buffer_len is None:
            return group
        penalties = [
            overlong_penalty(
                len(sample.response_ids),
                settings.sampling.max_response_len,
                settings.overlong_buffer_len,
                settings.overlong_penalty_factor,
            )
            for sample in group.samples
        ]
        samples = [
            replace(sample, reward=sample.result.score + penalty) for sample, penalty in zip(group.samples, penalties)
        ]
        return replace(group, samples=tuple(samples))


def is_informative(group: Group) -> bool:
    """Whether the samples' accuracies are not all equal (then not all advantages are 0, the penalty aside)."""
    return len({sample.result.accuracy for sample in group.samples}) > 1


def generate_groups(
    prompts: Sequence[Prompt], generate: Generate, *, sampling: SamplingSettings, num_samples: int, seed: int, step: int
) -> list[list[Completion]]:
    """`num_samples` completions of every prompt, [prompt][sample], however the engine orders its answers."""
    requests = [
        GenerateRequest(
            uid=f"{prompt.problem.uid}/{i}",
            prompt_ids=prompt.token_ids,
            sampling=sampling,
            seed=sampling_seed(seed, step, prompt.problem.uid, i),
        )
        for prompt in prompts
        for i in range(num_samples)
    ]
    wanted = [request.uid for request in requests]
    assert len(set(wanted)) == len(wanted), "two requests share a uid"
    answers = generate(requests)
    completions = {completion.uid: completion for completion in answers}
    assert len(answers) == len(completions) == len(wanted), (len(answers), len(completions), len(wanted))
    assert completions.keys() == set(wanted), completions.keys() ^ set(wanted)
    return [
        [completions[uid] for uid in wanted[start : start + num_samples]]
        for start in range(0, len(wanted), num_samples)
    ]


def sampling_seed(seed: int, step: int, problem_uid: str, sample_index: int) -> int:
    """The 31-bit seed of one request, a hash of all four."""
    key = json.dumps([seed, step, problem_uid, sample_index]).encode()
    return int.from_bytes(sha256(key).digest()[:4]) & 0x7FFFFFFF


def grade_groups(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], tokenizer: Tokenizer, grader: Grader
) -> list[Group]:
    """The completions [prompt][sample], decoded and graded. The reward is the score.

    A reward is given the problem's `extra` and `finish_reason`. Raises RewardFailed when a grader gives no verdict.
    """
    pairs = [(prompt, completion) for prompt, row in zip(prompts, completions, strict=True) for completion in row]
    texts = [tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True) for _, completion in pairs]
    results = grader(
        texts,
        [prompt.problem.ground_truth for prompt, _ in pairs],
        [{**prompt.problem.extra, "finish_reason": completion.finish_reason} for prompt, completion in pairs],
    )
    samples = []
    for (prompt, completion), text, result in zip(pairs, texts, results, strict=True):
        if isinstance(result, GraderError):
            raise RewardFailed(
                f"the reward failed on problem {prompt.problem.uid} (sample {completion.uid}): {result.kind}: "
                f"{result.message}; the response begins {text[:100]!r}"
            )
        assert completion.logprobs.shape == completion.token_ids.shape, (completion.uid, completion.logprobs.shape)
        samples.append(
            Sample(
                uid=completion.uid,
                response_ids=completion.token_ids.astype(np.int64),
                rollout_logprobs=completion.logprobs.astype(np.float32),
                loss_mask=np.ones(len(completion.token_ids), dtype=bool)
                if completion.loss_mask is None
                else completion.loss_mask,
                token_versions=np.full(len(completion.token_ids), completion.weight_version, dtype=np.int64),
                finish_reason=completion.finish_reason,
                text=text,
                result=result,
                reward=result.score,
            )
        )
    remaining = iter(samples)
    return [Group(prompt, tuple(next(remaining) for _ in row)) for prompt, row in zip(prompts, completions)]


def make_train_sequences(groups: Sequence[Group]) -> list[TrainSequence]:
    """Every sample as prompt + response, with its group advantage on the positions that predict the response."""
    return [
        _train_sequence(group.prompt, sample, float(advantage))
        for group in groups
        for sample, advantage in zip(group.samples, _advantages(group), strict=True)
    ]


def _train_sequence(prompt: Prompt, sample: Sample, advantage: float) -> TrainSequence:
    num_prompt, num_response = len(prompt.token_ids), len(sample.response_ids)
    assert num_prompt >= 1, sample.uid
    predicting = slice(num_prompt - 1, num_prompt - 1 + num_response)  # entry i is about token i + 1
    loss_mask = np.zeros(num_prompt + num_response, dtype=bool)
    loss_mask[predicting] = sample.loss_mask
    rollout_logprobs = np.zeros(loss_mask.shape, dtype=np.float32)
    rollout_logprobs[predicting] = sample.rollout_logprobs
    token_versions = np.full(loss_mask.shape, -1, dtype=np.int64)
    token_versions[predicting] = np.where(sample.loss_mask, sample.token_versions, -1)
    return TrainSequence(
        uid=sample.uid,
        token_ids=np.concatenate([prompt.token_ids, sample.response_ids]),
        loss_mask=loss_mask,
        advantages=np.where(loss_mask, np.float32(advantage), np.float32(0.0)),
        rollout_logprobs=rollout_logprobs,
        token_versions=token_versions,
    )


def rollout_metrics(groups: Sequence[Group], max_response_len: int) -> dict[str, float]:
    """A rollout batch in the authors' names. Advantages and returns are averaged over response tokens, as in their
    code (`advantage/token_mean` is the same number under the name of the paper's figure); all else over samples.
    `response_length/clip_ratio` is the share of responses that are `max_response_len` long."""
    samples = [sample for group in groups for sample in group.samples]
    lengths = np.array([len(sample.response_ids) for sample in samples], dtype=np.float64)
    advantages = np.concatenate([_advantages(group) for group in groups])
    of_tokens = {
        "mean": float((advantages * lengths).sum() / max(lengths.sum(), 1.0)),
        "max": float(advantages.max()),
        "min": float(advantages.min()),
    }
    q25, median, q75 = np.quantile(lengths, [0.25, 0.5, 0.75])
    return {
        "num_samples": len(samples),
        "accuracy": float(np.mean([sample.result.accuracy for sample in samples])),
        **_spread("score", np.array([sample.result.score for sample in samples])),
        **_spread("reward", np.array([sample.reward for sample in samples])),
        **{f"advantage/{name}": value for name, value in of_tokens.items()},
        **{f"return/{name}": value for name, value in of_tokens.items()},
        "advantage/token_mean": of_tokens["mean"],
        **_spread("response_length", lengths),
        "response_length/median": float(median),
        "response_length/q25": float(q25),
        "response_length/q75": float(q75),
        "response_length/clip_ratio": float(np.mean(lengths >= max_response_len)),
        "prompt_length/mean": float(np.mean([len(group.prompt.token_ids) for group in groups for _ in group.samples])),
    }


def _advantages(group: Group) -> np.ndarray:
    return np.asarray(group_advantages([sample.reward for sample in group.samples]))


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    return {
        f"{name}/mean": float(values.mean()),
        f"{name}/max": float(values.max()),
        f"{name}/min": float(values.min()),
    }


@dataclass
class _Tally:
    """What a step has generated so far, kept or not."""

    num_batches: int = 0
    num_groups: int = 0
    num_informative: int = 0
    num_all_right: int = 0
    num_all_wrong: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    generation_s: float = 0.0
    grading_s: float = 0.0

    def add(self, groups: Sequence[Group], num_informative: int) -> None:
        accuracies = [[sample.result.accuracy for sample in group.samples] for group in groups]
        self.num_batches += 1
        self.num_groups += len(groups)
        self.num_informative += num_informative
        self.num_all_right += sum(min(values) >= 1 for values in accuracies)
        self.num_all_wrong += sum(max(values) <= 0 for values in accuracies)
        self.num_samples += sum(len(group.samples) for group in groups)
        self.num_tokens += sum(len(sample.response_ids) for group in groups for sample in group.samples)

    def metrics(self) -> dict[str, float]:
        """Counts and seconds; the fractions are left out when nothing was generated."""
        fractions = {
            "groups_informative_fraction": self.num_informative,
            "groups_all_right_fraction": self.num_all_right,
            "groups_all_wrong_fraction": self.num_all_wrong,
        }
        return {
            "num_gen_batches": self.num_batches,
            "num_generated_groups": self.num_groups,
            "num_generated_samples": self.num_samples,
            "num_generated_tokens": self.num_tokens,
            "time/rollout/generation": self.generation_s,
            "time/rollout/grading": self.grading_s,
            **{name: count / self.num_groups for name, count in fractions.items() if self.num_groups},
        }


def _cannot_fill(num_kept: int, settings: CollectorSettings, tally: _Tally) -> str:
    return (
        f"dynamic sampling cannot fill the batch: after {tally.num_batches} generation batches "
        f"(--max-generation-batches) of {settings.generation_batch_size} prompts it has {num_kept} of "
        f"{settings.rollout_batch_size} groups; of {tally.num_groups} groups {tally.num_informative} were informative, "
        f"{tally.num_all_right} all right, {tally.num_all_wrong} all wrong. Take problems nearer to the model's reach, "
        "or raise --max-generation-batches or --n-samples-per-prompt"
    )
