"""Guards: what is watched in every step's record, and the warning or the stop when it looks wrong. Rank 0 only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_fipo.run_config import GuardSettings

Record = Mapping[str, Any]

INERT_STEPS = 2  # steps running without any influence weight before FIPO counts as inert
LENGTH_STEPS = 5  # first steps whose mean length is what later ones are compared with
REPEAT_INTERVAL = 10  # steps after which a warning that still holds is repeated


class GuardStopped(RuntimeError):
    """A guard whose action is stop. The message names the guard, the value found, the bound and the flag."""


class Guards:
    """Checks each step's record, in order. Holds what outlives a step: counts in a row, the first steps' length."""

    def __init__(self, settings: GuardSettings) -> None:
        self._settings = settings
        self._inert_steps = 0
        self._first_lengths: list[float] = []
        self._skipped_in_a_row = 0
        self._steps_wrong: dict[str, int] = {}  # guard -> steps running in which it looked wrong
        self._latest: dict[str, float] = {}

    def check(self, record: Record) -> list[str]:
        """Warnings about one step's record (as `log_step` takes it), each beginning with its guard's name.

        A guard warns at the first step that looks wrong and at every 10th after it while that lasts. Metrics that the
        record does not hold are not watched. Raises GuardStopped when the action is stop, naming every such guard;
        `metrics()` is up to date then too.
        """
        problems = self._observe(record)
        stops = [text for name, text in problems.items() if self._action(name) == "stop"]
        if stops:
            raise GuardStopped(f"step {record['step']}: {'; '.join(stops)}")
        return [text for name, text in problems.items() if self._steps_wrong[name] % REPEAT_INTERVAL == 1]

    def metrics(self) -> dict[str, float]:
        """What the latest `check` found, for the step's record: `guards/NAME` is 1 where it looked wrong and 0 where
        not, absent where the guard is off or had nothing to look at; `guards/skipped_updates` counts updates skipped in
        a row."""
        return dict(self._latest)

    def state_dict(self) -> dict[str, Any]:
        """What outlives a step, in JSON types: with it a resumed run warns and stops as the undisturbed one would."""
        return {
            "inert_steps": self._inert_steps,
            "first_lengths": list(self._first_lengths),
            "skipped_in_a_row": self._skipped_in_a_row,
            "steps_wrong": dict(self._steps_wrong),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave. Raises ValueError when a part of it is missing."""
        wanted = self.state_dict().keys()
        if not isinstance(state, Mapping) or state.keys() != wanted:
            raise ValueError(f"the saved state of the guards is {state!r}, but must hold {', '.join(wanted)}")
        self._inert_steps = state["inert_steps"]
        self._first_lengths = list(state["first_lengths"])
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self._steps_wrong = dict(state["steps_wrong"])

    def _action(self, name: str) -> str:
        return "stop" if name == "skipped_updates" else str(getattr(self._settings, f"guard_{name}"))

    def _observe(self, record: Record) -> dict[str, str]:
        """Guard -> what is wrong, in words, of the guards that are not off. Takes the record into account."""
        problems: dict[str, str] = {}
        self._latest = {}
        for name, watch in self._watched().items():
            found = watch(record)
            if found is None or self._action(name) == "off":
                continue
            self._latest[f"guards/{name}"] = float(bool(found))
            self._steps_wrong[name] = self._steps_wrong.get(name, 0) + 1 if found else 0
            if found:
                problems[name] = f"{name}: {found}"
        self._latest["guards/skipped_updates"] = float(self._skipped_in_a_row)
        return problems

    def _watched(self) -> Mapping[str, Callable[[Record], str | None]]:
        """Guard -> a function of the record: what is wrong, "" when nothing is, None when it cannot be told."""
        return {
            "fipo_inert": self._fipo_inert,
            "noise_gauge": self._noise_gauge,
            "entropy_collapse": self._entropy_collapse,
            "length_collapse": self._length_collapse,
            "constant_reward": self._constant_reward,
            "skipped_updates": self._skipped_updates,
        }

    def _fipo_inert(self, record: Record) -> str | None:
        weighed = _influence_is_one(record.get("updates", ()))
        if weighed is None:
            return None
        self._inert_steps = self._inert_steps + 1 if weighed else 0
        if self._inert_steps < INERT_STEPS:
            return ""
        return (
            f"every influence weight was 1 in all updates after the first, {self._inert_steps} steps running, so FIPO "
            "did nothing: the log-probs do not move between the updates of a step "
            "(--guard-fipo-inert warn|off goes on nevertheless)"
        )

    def _noise_gauge(self, record: Record) -> str | None:
        found, limit = record.get("noise_gauge"), self._settings.noise_gauge_limit
        if found is None or found <= limit:
            return None if found is None else ""
        return (
            f"the Future-KL spreads by {found:.3g} in the step's first update, where it should be 0, and "
            f"--noise-gauge-limit is {limit:g}: old and new log-probs are not the same computation"
        )

    def _entropy_collapse(self, record: Record) -> str | None:
        found, floor = record.get("entropy"), self._settings.entropy_floor
        if found is None or found >= floor:
            return None if found is None else ""
        return f"the mean entropy is {found:.3g} nats per token, and --entropy-floor is {floor:g}"

    def _length_collapse(self, record: Record) -> str | None:
        found = record.get("response_length/mean")
        if found is None:
            return None
        if len(self._first_lengths) < LENGTH_STEPS:
            self._first_lengths.append(found)
            return None
        first = sum(self._first_lengths) / LENGTH_STEPS
        share = self._settings.length_floor
        if found >= share * first:
            return ""
        return (
            f"the mean response has {found:.1f} tokens, and had {first:.1f} over the first {LENGTH_STEPS} steps: less "
            f"than --length-floor {share:g} times that"
        )

    def _constant_reward(self, record: Record) -> str | None:
        """`generated_score` is of all that the step generated, before dynamic sampling kept some of it."""
        for name in ("generated_score", "score"):
            low, high = record.get(f"{name}/min"), record.get(f"{name}/max")
            if low is not None and high is not None:
                break
        else:
            return None
        if not math.isclose(low, high, rel_tol=1e-9):
            return ""
        return f"every response of the step scored {low:g}, so there is nothing to learn from (--guard-constant-reward)"

    def _skipped_updates(self, record: Record) -> str | None:
        """A run of skipped updates may begin in an earlier step and end within this one."""
        most = 0
        for update in record.get("updates", ()):
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if update.get("skipped") else 0
            most = max(most, self._skipped_in_a_row)
        limit = self._settings.max_skipped_updates
        if most <= limit:
            return ""
        return (
            f"updates skipped in a row for a NaN or an infinity in the loss or the gradient: {most}, and "
            f"--max-skipped-updates is {limit}"
        )


def _influence_is_one(updates: Sequence[Record]) -> bool | None:
    """Whether every influence weight was 1 in the updates in which it could have been another.

    That is after an update of this step that moved the parameters: not one that was skipped or had nothing to train
    on, nor one at learning rate 0 (the warm-up's first) or of gradient 0. None when there is no such update, or no
    influence weights (not FIPO).
    """
    moved, judged = False, False
    for update in updates:
        if update.get("skipped") or update.get("num_kept") == 0:
            continue
        if moved and "influence_weights_min" in update:
            judged = True
            if not update["influence_weights_min"] == update["influence_weights_max"] == 1.0:
                return False
        moved = moved or (update.get("lr", 1.0) > 0 and update.get("grad_norm", 1.0) > 0)
    return True if judged else None
