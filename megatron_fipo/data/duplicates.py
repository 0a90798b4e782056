"""Which rows of a prompt file are one problem, and which contradict each other.

Two rows are one problem when they share the value of the key column (within one data_source, where that column
exists), or question and ground truth. Two rows of one key must ask the same; a question with two ground truths
teaches one wrong answer at least.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from megatron_fipo.data.rows import shown, value_or_none
from megatron_fipo.data.source import question_key
from megatron_fipo.types import Problem


@dataclass(frozen=True, eq=False)
class KeptProblem:
    """A problem and the number of the first row that asks it, as errors and uids count."""

    problem: Problem
    number: int


@dataclass(eq=False)
class Deduplication:
    """Takes a file's rows in order. `key` is the column that rows of one problem share; "": none.

    `same_problem_other_key` counts the keys under which another one's question and ground truth are repeated.
    """

    name: str
    place: str  # "row" or "line", for errors
    key: str
    kept: list[KeptProblem] = field(default_factory=list)
    has_key: bool = False
    same_problem_other_key: int = 0
    _of_key: dict[Any, tuple[bytes, str, int]] = field(default_factory=dict)
    _of_question: dict[bytes, dict[str, int]] = field(default_factory=dict)

    def add(self, number: int, row: dict[str, Any], problem: Problem) -> None:
        """Take row `number`. Raises ValueError naming both rows when one key asks two questions, or wants two ground
        truths for one."""
        question = hashlib.blake2b(question_key(problem).encode(), digest_size=16).digest()
        truth = problem.ground_truth.strip()
        key = value_or_none(row, self.key) if self.key else None
        if key is not None:
            self.has_key = True
            known = self._of_key.setdefault((repr(row.get("data_source")), repr(key)), (question, truth, number))
            if known[:2] != (question, truth):
                what = "ask different questions" if known[0] != question else "want different ground truths"
                raise ValueError(
                    f"{self.name}: {self.place}s {known[2]} and {number} share {self.key} {shown(key)} but {what}. "
                    "Rows of one problem alone may share it: name another column with --dedup-key, or '' to compare "
                    "question and ground truth only"
                )
            if known[2] != number:
                return
        truths = self._of_question.setdefault(question, {})
        if truth in truths:
            self.same_problem_other_key += key is not None
            return
        truths[truth] = number
        self.kept.append(KeptProblem(problem, number))

    def contradictions(self) -> list[list[int]]:
        """The rows of every question that has more than one ground truth."""
        return [sorted(truths.values()) for truths in self._of_question.values() if len(truths) > 1]
