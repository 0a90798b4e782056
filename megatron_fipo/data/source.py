"""What every source of problems has in common: an endless, seeded stream whose whole state is a position.

The k-th problem of a source depends on its seed and k alone, so that a run resumes by loading one number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from megatron_fipo.types import Problem

MAX_SKIPPED = 10_000  # held-out problems in a row before a source is taken to hold nothing else


class ProblemSource(Protocol):
    """An endless stream of training problems. Every problem it gives has a `uid` it never gives again."""

    def next_problem(self) -> Problem:
        """The next problem."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, small and made of JSON types."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raises ValueError when it is not a state of this source."""


class SeededSource:
    """The ProblemSource over a function of the position.

    `problem_at(k)` gives the k-th problem, or None where the k-th place is held out for evaluation.
    `description` says what the stream is made of; a state saved under another description is refused. `problems` are
    all there are, where that is a list (a file), so that they can be checked before the first is drawn.
    """

    def __init__(
        self,
        description: str,
        problem_at: Callable[[int], Problem | None],
        problems: Sequence[Problem] | None = None,
    ) -> None:
        self.description = description
        self.problem_at = problem_at
        self.problems = problems
        self.position = 0

    def next_problem(self) -> Problem:
        """The next problem that is not held out. Raises ValueError when MAX_SKIPPED in a row are."""
        for _ in range(MAX_SKIPPED):
            problem = self.problem_at(self.position)
            self.position += 1
            if problem is not None:
                return problem
        raise ValueError(
            f"{self.description}: {MAX_SKIPPED} problems in a row are held out for evaluation, so none is left to "
            "train on; lower --num-eval-problems or widen the task with --task-args"
        )

    def state_dict(self) -> dict[str, Any]:
        """`{"source": description, "position": k}`."""
        return {"source": self.description, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the saved position. Raises ValueError for another source's state or a position that is none."""
        if not isinstance(state, dict) or state.keys() != {"source", "position"}:
            raise ValueError(f"the saved data position is {state!r}, but must hold exactly 'source' and 'position'")
        if state["source"] != self.description:
            raise ValueError(
                f"the saved data position belongs to: {state['source']}; but this run reads: {self.description}. "
                "Resume with the same data flags and --seed"
            )
        position = state["position"]
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise ValueError(f"the saved data position is {position!r}, but must be a whole number >= 0")
        self.position = position


def stable_hash(*parts: object) -> int:
    """A 31-bit number made of the parts' texts: the same on every machine and in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) & 0x7FFFFFFF


def drawn_uid(uid: str, epoch: int) -> str:
    """The uid of a problem drawn for the `epoch`-th time (0 first), so that no draw shares its uid with another."""
    return uid if epoch == 0 else f"{uid}@{epoch}"


def question_key(problem: Problem) -> str:
    """What two problems share when they ask the same: all messages and the prefix, runs of white space as one space.

    A plain text counts as one message of the user, as which a chat template renders it.
    """
    messages = ({"role": "user", "content": problem.prompt},) if isinstance(problem.prompt, str) else problem.prompt
    texts = [f"{message['role']}: {message['content']}" for message in messages] + [problem.response_prefix]
    return "\n".join(" ".join(text.split()) for text in texts)
