"""What a checkpoint holds of the run besides Megatron's state, and what that must look like to go on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_fipo.actor.checkpoint_files import RUN_STATE
from megatron_fipo.actor.saved_shapes import (
    NUMBER,
    NUMBERS,
    OBJECT,
    TEXT,
    WHOLE,
    WHOLES,
    Check,
    items,
    leaf,
    maybe,
    record,
    require_shape,
)

NOTHING_DONE: dict[str, Any] = {"collector": None, "guards": None, "num_updates": 0}
"""As it is before the first step; rank 0's."""


def require_own_state(directory: Path, saved: dict[str, Any]) -> None:
    """Raise CheckpointError unless the checkpoint in `directory`, whose run_state is `saved`, can be gone on from.

    Whether it is of this run's data and flags shows where it is loaded (BatchCollector.load_state_dict)."""
    path = directory / RUN_STATE
    require_shape(saved["trainer"], _OWN_STATE, key="trainer", path=path)
    require_shape(saved.get("score"), maybe(NUMBER), key="score", path=path)


def _counts(value: Any, key: str) -> None:
    OBJECT(value, key)
    for name, count in value.items():
        WHOLE(count, f"{key}.{name}")


def _prompt_text(value: Any, key: str) -> None:
    """Plain text, or the messages of a chat."""
    if not isinstance(value, str):
        _MESSAGES(value, key)


def _message(value: Any, key: str) -> None:
    OBJECT(value, key)
    for name, text in value.items():
        TEXT(text, f"{key}.{name}")


_MESSAGES: Check = items(_message)
_FINISH_REASON = leaf(lambda value: value in ("stop", "length"), "'stop' or 'length'")
_PROMPT: dict[str, Check] = {
    "problem": record(
        {"uid": TEXT, "prompt": _prompt_text, "ground_truth": TEXT, "response_prefix": TEXT, "extra": OBJECT}
    ),
    "prompt_ids": WHOLES,
}
_SAMPLE = record(
    {
        "uid": TEXT,
        "response_ids": WHOLES,
        "rollout_logprobs": NUMBERS,
        "loss_mask": WHOLES,
        "token_versions": WHOLES,
        "finish_reason": _FINISH_REASON,
        "text": TEXT,
        "reward": NUMBER,
    },
    one_of={
        "result": record({"score": NUMBER, "accuracy": NUMBER, "answer": maybe(TEXT)}),
        "error": record({"kind": TEXT, "message": TEXT}),
    },
)
_RESPONSE = record(
    {
        "uid": TEXT,
        "token_ids": WHOLES,
        "logprobs": NUMBERS,
        "loss_mask": WHOLES,
        "token_versions": WHOLES,
        "finish_reason": maybe(_FINISH_REASON),
    }
)
_WAITING = record(
    {},
    one_of={
        "group": record({**_PROMPT, "samples": items(_SAMPLE)}),
        "unfinished": record({**_PROMPT, "responses": items(_RESPONSE)}),
    },
)
_OWN_STATE = record(
    {
        "collector": maybe(record({"source": OBJECT, "waiting": items(_WAITING)})),
        "guards": record(
            {"inert_steps": WHOLE, "first_lengths": NUMBERS, "skipped_in_a_row": WHOLE, "steps_wrong": _counts}
        ),
        "num_updates": WHOLE,
    }
)
