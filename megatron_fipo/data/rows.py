"""From one row of a prompt file to a Problem, checked, with errors that name file and row."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from megatron_fipo.types import Problem

ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")  # a template may compare roles, so they are not hidden as texts are


def problem_of_row(where: str, uid: str, row: dict[str, Any], input_key: str, label_key: str) -> Problem:
    """The problem in `row`; what is at neither key goes to the reward as `metadata`.

    A ground truth that is a number becomes text, a whole one without ".0". Raises ValueError, beginning with `where`,
    for a prompt that is neither text nor messages, and for a ground truth that is neither text nor a finite number.
    """
    prompt = _checked_prompt(where, input_key, value_at(where, row, "--input-key", input_key))
    label = value_at(where, row, "--label-key", label_key)
    if not isinstance(label, str | int | float) or isinstance(label, bool):
        raise ValueError(f"{where}: the ground truth {label_key!r} is {shown(label)}, wanted text or a number")
    if isinstance(label, float):
        if not math.isfinite(label):
            raise ValueError(f"{where}: the ground truth {label_key!r} is {label}, wanted a finite number or text")
        label = int(label) if label.is_integer() and abs(label) < 2**53 else label
    used = {key if key in row else key.split(".")[0] for key in (input_key, label_key)}
    metadata = {column: value for column, value in row.items() if column not in used}
    return Problem(uid, prompt, _encodable(where, label_key, str(label)), extra=_as_extra(where, metadata))


def value_at(where: str, row: dict[str, Any], flag: str, key: str) -> Any:
    """The value at `key`: a column of that very name, or else a descent along its dots."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            found = ", ".join(sorted(value)) if isinstance(value, dict) else shown(value)
            at = "columns" if value is row else f"what stands there before {part!r}"
            raise ValueError(f"{where}: {flag} is {key!r}, but there is no such value; found {at}: {found}")
        value = value[part]
    return value


def value_or_none(row: dict[str, Any], key: str) -> Any:
    """The value at `key` as in `value_at`, or None when there is none."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def shown(value: Any) -> str:
    """`value` as an error message shows it: cut after 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _as_extra(where: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """The other columns as JSON, in which problems travel to the graders: dates, decimals and bytes become text."""
    if not metadata:
        return {}
    try:
        return {"metadata": json.loads(json.dumps(metadata, default=str))}
    except (TypeError, ValueError) as error:  # a mapping whose keys are no text, an integer of thousands of digits
        raise ValueError(f"{where}: the other columns cannot be written as JSON for the reward: {error}") from error


def _checked_prompt(where: str, key: str, value: Any) -> str | tuple[Mapping[str, str], ...]:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{where}: the prompt {key!r} is empty")
        return _encodable(where, key, value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: the prompt {key!r} is {shown(value)}, wanted text or a list of chat messages")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(
                f"{where}: the prompt {key!r} holds the message {shown(message)}, "
                'wanted {"role": text, "content": text}'
            )
        if not ROLE.fullmatch(message["role"]):
            raise ValueError(
                f"{where}: the prompt {key!r} holds the role {shown(message['role'])}, wanted letters, digits, _ and -"
            )
    if not any(message["content"].strip() for message in value):
        raise ValueError(f"{where}: the prompt {key!r} is empty: no message says anything")
    return tuple({k: _encodable(where, key, message[k]) for k in ("role", "content")} for message in value)


def _encodable(where: str, key: str, text: str) -> str:
    """`text`, unless it holds half a surrogate pair (JSON can spell it, no tokenizer can read it)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {key!r} holds a lone surrogate at character {error.start}") from error
    return text
