"""Filling a rollout batch: dynamic sampling, surplus groups, and responses that take several steps. Runs on rank 0."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_fipo.config import Algorithm, BatchSettings, RolloutSettings, require
from megatron_fipo.data.prompts import Tokenizer
from megatron_fipo.data.source import MAX_SKIPPED, ProblemSource
from megatron_fipo.data_config import DataSettings, OnRewardError
from megatron_fipo.losses.advantages import overlong_penalty
from megatron_fipo.trainer.generation import Generate, Grader, RewardFailed, answers_to, grade_responses
from megatron_fipo.trainer.partial import (
    UnfinishedGroup,
    begun_group,
    joined,
    next_requests,
    unfinished_from_dict,
    unfinished_to_dict,
)
from megatron_fipo.trainer.recording import group_from_dict, group_to_dict
from megatron_fipo.trainer.rollout_batch import accuracies_of, is_informative
from megatron_fipo.trainer.tally import Tally
from megatron_fipo.types import Group, Problem, Prompt, RewardResult, Sample, SamplingSettings


@dataclass(frozen=True)
class CollectorSettings:
    """What makes a rollout batch, with every default resolved (see `collector_settings`)."""

    seed: int
    rollout_batch_size: int
    n_samples_per_prompt: int
    generation_batch_size: int  # groups worked on at a time under dynamic sampling or with partial rollouts
    max_generation_batches: int
    dynamic_sampling: bool
    sampling: SamplingSettings
    overlong_buffer_len: int | None  # None: no overlong penalty
    overlong_penalty_factor: float
    on_reward_error: OnRewardError
    partial_rollout_len: int | None  # None: a response is finished in the step that begins it


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
        sampling=SamplingSettings(rollout.rollout_max_response_len, temperature=rollout.rollout_temperature),
        overlong_buffer_len=rollout.overlong_buffer_len if penalises else None,
        overlong_penalty_factor=rollout.overlong_penalty_factor,
        on_reward_error=data.on_reward_error,
        partial_rollout_len=rollout.partial_rollout_len,
    )


@dataclass(frozen=True, eq=False)
class CollectorPosition:
    """What a collector holds at a moment: the data position, and the groups that wait."""

    source: dict[str, Any]
    waiting: tuple[Group | UnfinishedGroup, ...]


class BatchCollector:
    """Draws, grades and filters groups until a rollout batch is full. Holds what is left over between steps.

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
        to_prompt: Callable[[Problem], Prompt | None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`to_prompt` gives None for a problem to be left out: the next one takes its place."""
        self.source = source
        self.generate = generate
        self.tokenizer = tokenizer
        self.grader = grader
        self.settings = settings
        self.to_prompt = to_prompt
        self.clock = clock
        self._waiting: list[Group | UnfinishedGroup] = []  # in prompt order

    @property
    def surplus(self) -> list[Group]:
        """Graded groups that no step has trained on yet, in prompt order."""
        return [group for group in self._waiting if isinstance(group, Group)]

    @property
    def unfinished(self) -> list[UnfinishedGroup]:
        """Groups that the next step continues, in prompt order."""
        return [group for group in self._waiting if isinstance(group, UnfinishedGroup)]

    def collect(self, step: int) -> tuple[tuple[Group, ...], dict[str, float]]:
        """The `rollout_batch_size` groups of a step, in prompt order, and how they came about.

        Every generation batch continues all unfinished groups before it begins others, and every step has one while
        there are any, so that a response takes at most ceil(max_response_len / partial_rollout_len) steps. Graded
        groups of earlier prompts come first (their old log-probs come from the trainer, like all). With dynamic
        sampling only groups whose accuracies differ are kept (DAPO, arXiv 2503.14476, eq. 11).

        Raises ValueError when `max_generation_batches` do not fill the batch, RewardFailed when a grader fails, or
        grades nothing of the batch.
        """
        settings = self.settings
        tally = Tally()
        while True:
            continued, num_kept = self.unfinished, len(self.surplus)
            num_missing = settings.rollout_batch_size - num_kept
            if num_missing <= 0 and (tally.num_batches > 0 or not continued):
                break
            if tally.num_batches == settings.max_generation_batches:
                raise ValueError(_cannot_fill(num_kept, len(continued), settings, tally))
            num_begun = _num_prompts(num_missing, len(continued), settings)
            self._generation_batch(step, continued, [self._next_prompt() for _ in range(num_begun)], tally)
        batch = self.surplus[: settings.rollout_batch_size]
        if not any(accuracies_of(group) for group in batch):
            raise RewardFailed("no response of the batch could be graded, which --on-reward-error drop cannot help")
        trained = {id(group) for group in batch}
        self._waiting = [group for group in self._waiting if id(group) not in trained]
        return tuple(batch), {
            **tally.metrics(),
            "num_surplus_groups": len(self.surplus),
            "num_unfinished_groups": len(self.unfinished),
            **_token_ages(batch, newest_version=step - 1),
        }

    def position(self) -> CollectorPosition:
        """Where the collector stands now, for `go_back`."""
        return CollectorPosition(self.source.state_dict(), tuple(self._waiting))

    def go_back(self, position: CollectorPosition) -> None:
        """Stand where `position` was taken, as if nothing had been collected since."""
        self.source.load_state_dict(position.source)
        self._waiting = list(position.waiting)

    def state_dict(self) -> dict[str, Any]:
        """Data position, and the groups that wait, in JSON types and exact."""
        waiting = [
            {"group": group_to_dict(group)} if isinstance(group, Group) else {"unfinished": unfinished_to_dict(group)}
            for group in self._waiting
        ]
        return {"source": self.source.state_dict(), "waiting": waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises ValueError when it does not belong to this run's data, group size or length."""
        if state.keys() != {"source", "waiting"}:
            raise ValueError(f"the saved rollout state holds {sorted(state)}, but must hold 'source' and 'waiting'")
        settings = self.settings
        waiting = [_waiting_from_dict(entry) for entry in state["waiting"]]
        for group in waiting:
            num_samples = len(group.samples if isinstance(group, Group) else group.responses)
            require(
                num_samples == settings.n_samples_per_prompt,
                "--n-samples-per-prompt",
                settings.n_samples_per_prompt,
                f"{num_samples}, as in the checkpoint's surplus groups",
            )
            if isinstance(group, UnfinishedGroup):
                going_on = [r for r in group.responses if r.finish_reason is None]
                longest = max(len(response.token_ids) for response in going_on)
                require(
                    longest < settings.sampling.max_response_len,
                    "--rollout-max-response-len",
                    settings.sampling.max_response_len,
                    f"> {longest}, the tokens that an unfinished response of the checkpoint has already",
                )
        self.source.load_state_dict(state["source"])
        self._waiting = waiting

    def _next_prompt(self) -> Prompt:
        for _ in range(MAX_SKIPPED):
            prompt = self.to_prompt(self.source.next_problem())
            if prompt is not None:
                return prompt
        raise ValueError(
            f"{MAX_SKIPPED} prompts in a row were left out (--on-long-prompt skip): raise --rollout-max-prompt-len"
        )

    def _generation_batch(
        self, step: int, continued: Sequence[UnfinishedGroup], prompts: Sequence[Prompt], tally: Tally
    ) -> None:
        """Continue those groups and begin those prompts, in one call of the engines; grade what is finished."""
        settings = self.settings
        begun = [begun_group(prompt, settings.n_samples_per_prompt) for prompt in prompts]
        requests = [
            request
            for group in (*continued, *begun)
            for request in next_requests(
                group,
                sampling=settings.sampling,
                partial_len=settings.partial_rollout_len,
                seed=settings.seed,
                step=step,
            )
        ]
        start = self.clock()
        completions = answers_to(requests, self.generate)
        generated = self.clock()
        answers = {request.uid: (request, completion) for request, completion in zip(requests, completions)}
        drawn = {
            id(group): joined(group, answers, settings.sampling.max_response_len) for group in (*continued, *begun)
        }
        graded = self._graded([group for group in drawn.values() if group.is_finished])
        tally.add_times(generated - start, self.clock() - generated)
        tally.add_drawn(completions, num_continued=len(continued))
        waiting: list[Group | UnfinishedGroup] = []
        for entry in (*self._waiting, *begun):
            now = drawn.get(id(entry), entry)
            if isinstance(now, UnfinishedGroup) and now.is_finished:
                group = graded[id(now)]
                is_kept = not settings.dynamic_sampling or is_informative(group)
                tally.add_graded(group, is_kept)
                if is_kept:
                    waiting.append(group)
            else:
                waiting.append(now)
        self._waiting = waiting

    def _graded(self, finished: Sequence[UnfinishedGroup]) -> dict[int, Group]:
        """The finished groups, graded, by the id() of what they were made of."""
        groups = grade_responses(
            [group.prompt for group in finished],
            [group.responses for group in finished],
            self.tokenizer,
            self.grader,
            on_error=self.settings.on_reward_error,
        )
        return {id(group): self._with_penalty(graded) for group, graded in zip(finished, groups, strict=True)}

    def _with_penalty(self, group: Group) -> Group:
        return replace(group, samples=tuple(self._penalised(sample) for sample in group.samples))

    def _penalised(self, sample: Sample) -> Sample:
        """The overlong penalty is on the response's whole length, a tool's tokens included, as the limit is."""
        settings = self.settings
        if settings.overlong_buffer_len is None or not isinstance(sample.result, RewardResult):
            return sample
        penalty = overlong_penalty(
            len(sample.response_ids),
            settings.sampling.max_response_len,
            settings.overlong_buffer_len,
            settings.overlong_penalty_factor,
        )
        return replace(sample, reward=sample.result.score + penalty)


def _num_prompts(num_missing: int, num_continued: int, settings: CollectorSettings) -> int:
    """Prompts to begin: what is missing, or what makes a generation batch of the groups that are continued."""
    if num_missing <= 0:
        return 0
    if settings.dynamic_sampling or settings.partial_rollout_len is not None:
        return max(0, settings.generation_batch_size - num_continued)
    return max(0, num_missing - num_continued)


def _waiting_from_dict(entry: Mapping[str, Any]) -> Group | UnfinishedGroup:
    """One entry of the saved 'waiting'."""
    if entry.keys() == {"group"}:
        return group_from_dict(entry["group"])
    if entry.keys() == {"unfinished"}:
        group = unfinished_from_dict(entry["unfinished"])
        if group.is_finished:
            raise ValueError(f"the saved group of problem {group.prompt.problem.uid} is finished, but was not graded")
        return group
    raise ValueError(f"the saved rollout state holds a {sorted(entry)}, but must hold a 'group' or 'unfinished'")


def _token_ages(batch: Sequence[Group], *, newest_version: int) -> dict[str, float]:
    """How many versions of the weights have passed since the batch's tokens were drawn."""
    ages = newest_version - np.concatenate(
        [sample.token_versions[sample.loss_mask] for group in batch for sample in group.samples]
    )
    if not ages.size:
        return {"token_age/mean": 0.0, "token_age/max": 0.0}
    return {"token_age/mean": float(ages.mean()), "token_age/max": float(ages.max())}


def _cannot_fill(num_kept: int, num_unfinished: int, settings: CollectorSettings, tally: Tally) -> str:
    found = (
        f"after {tally.num_batches} generation batches (--max-generation-batches) of "
        f"{settings.generation_batch_size} prompts it has {num_kept} of {settings.rollout_batch_size} groups; of "
        f"{tally.num_groups} groups {tally.num_informative} were informative, {tally.num_all_right} all right, "
        f"{tally.num_all_wrong} all wrong"
    )
    if tally.num_reward_errors:
        found += f"; {tally.num_reward_errors} of {tally.num_samples} responses could not be graded"
    if num_unfinished:
        return (
            f"the batch cannot be filled: {found}; {num_unfinished} groups are unfinished. --partial-rollout-len is "
            f"{settings.partial_rollout_len}: raise it, or --max-generation-batches"
        )
    return (
        f"dynamic sampling cannot fill the batch: {found}. Take problems nearer to the model's reach, "
        "or raise --max-generation-batches or --n-samples-per-prompt"
    )
