"""What a step has generated so far, kept or not: counts and seconds, and the metrics made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_fipo.trainer.rollout_batch import accuracies_of, is_informative
from megatron_fipo.types import Completion, GraderError, Group, RewardResult

REWARD_ERRORS: tuple[str, ...] = ("exception", "timeout", "crash", "memory")
"""The kinds of GraderError."""


@dataclass
class Tally:
    """Groups and samples are counted when they are graded, tokens when they are drawn."""

    num_batches: int = 0
    num_groups: int = 0
    num_kept: int = 0
    num_informative: int = 0
    num_all_right: int = 0
    num_all_wrong: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_continued_groups: int = 0
    reward_errors: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REWARD_ERRORS, 0))
    scores: tuple[float, float] | None = None  # the least and the greatest
    generation_s: float = 0.0
    grading_s: float = 0.0

    @property
    def num_reward_errors(self) -> int:
        """Responses that could not be graded."""
        return sum(self.reward_errors.values())

    def add_times(self, generation_s: float, grading_s: float) -> None:
        """One generation batch's seconds."""
        self.generation_s += generation_s
        self.grading_s += grading_s

    def add_drawn(self, completions: Sequence[Completion], *, num_continued: int) -> None:
        """One generation batch: its answers, and how many groups it continued."""
        self.num_batches += 1
        self.num_tokens += sum(len(completion.token_ids) for completion in completions)
        self.num_continued_groups += num_continued

    def add_graded(self, group: Group, is_kept: bool) -> None:
        """One group with its verdicts."""
        results = [sample.result for sample in group.samples]
        scores = [result.score for result in results if isinstance(result, RewardResult)]
        accuracies = accuracies_of(group)
        self.num_groups += 1
        self.num_kept += is_kept
        self.num_all_right += bool(accuracies) and min(accuracies) >= 1
        self.num_all_wrong += bool(accuracies) and max(accuracies) <= 0
        self.num_informative += is_informative(group)
        self.num_samples += len(results)
        if scores:
            low, high = self.scores or (scores[0], scores[0])
            self.scores = (min(low, *scores), max(high, *scores))
        for result in results:
            if isinstance(result, GraderError):
                self.reward_errors[result.kind] += 1

    def metrics(self) -> dict[str, float]:
        """Counts and seconds; fractions and scores are left out when nothing was graded."""
        of_groups = {
            "groups_informative_fraction": self.num_informative,
            "groups_all_right_fraction": self.num_all_right,
            "groups_all_wrong_fraction": self.num_all_wrong,
            "groups_kept_fraction": self.num_kept,
        }
        scores = (
            {}
            if self.scores is None
            else {"generated_score/min": self.scores[0], "generated_score/max": self.scores[1]}
        )
        return {
            "num_gen_batches": self.num_batches,
            "num_generated_groups": self.num_groups,
            "num_generated_samples": self.num_samples,
            "num_generated_tokens": self.num_tokens,
            "num_continued_groups": self.num_continued_groups,
            "num_reward_errors": self.num_reward_errors,
            **{f"num_reward_errors/{kind}": count for kind, count in self.reward_errors.items()},
            "time/rollout/generation": self.generation_s,
            "time/rollout/grading": self.grading_s,
            **{name: count / self.num_groups for name, count in of_groups.items() if self.num_groups},
            **scores,
        }
