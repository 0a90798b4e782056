"""What JSON that a checkpoint holds must look like: one error names the key that does not, what it is and what it must
be. A check is a function of a value and the key that led to it."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_fipo.actor.checkpoint_reading import CheckpointError, shown

Check = Callable[[Any, str], None]

_LARGEST = 2**63  # beyond it an integer fits into no tensor, and soon into no float


class _Wrong(Exception):
    """A value that is not what it must be."""


def require_shape(value: object, check: Check, *, key: str, path: Path) -> None:
    """Raise CheckpointError naming the file `path`, the key below `key`, the value found and the one wanted."""
    try:
        check(value, key)
    except _Wrong as error:
        raise CheckpointError(f"{shown(path)} says {error}") from error


def leaf(holds: Callable[[Any], bool], wanted: str) -> Check:
    """A value for which `holds`; `wanted` says which these are."""

    def check(value: Any, key: str) -> None:
        if not holds(value):
            raise _Wrong(f"{key} {ascii(reprlib.repr(value))[1:-1]}, but must say {wanted}")

    return check


def record(fields: Mapping[str, Check], *, one_of: Mapping[str, Check] | None = None) -> Check:
    """An object that has these fields, one of `one_of` where there are such, and no others."""
    others = one_of or {}
    wanted = ", ".join(fields) + (f"{' and ' if fields else ''}one of {', '.join(others)}" if others else "")

    def check(value: Any, key: str) -> None:
        is_object = isinstance(value, dict)
        rest = value.keys() - fields.keys() if is_object else set()
        is_whole = is_object and fields.keys() <= value.keys() and rest <= others.keys() and len(rest) == bool(others)
        if not is_whole:
            found = f"an object of {sorted(value)}" if is_object else value
            raise _Wrong(f"{key} {ascii(reprlib.repr(found))[1:-1]}, but must say an object of {wanted}")
        for name, inner in value.items():
            (fields.get(name) or others[name])(inner, f"{key}.{name}")

    return check


def items(of: Check) -> Check:
    """A list of such values."""

    def check(value: Any, key: str) -> None:
        LIST(value, key)
        for index, item in enumerate(value):
            of(item, f"{key}[{index}]")

    return check


def maybe(of: Check) -> Check:
    """Such a value, or null."""

    def check(value: Any, key: str) -> None:
        if value is not None:
            of(value, key)

    return check


def is_whole(value: object) -> bool:
    """Whether it is an integer that counts something."""
    return type(value) is int and 0 <= value < _LARGEST


def is_number(value: object) -> bool:
    """Whether it is an integer or a float, NaN and infinity among them."""
    return type(value) is float or (type(value) is int and -_LARGEST < value < _LARGEST)


WHOLE = leaf(is_whole, "a whole number >= 0")
POSITIVE = leaf(lambda value: is_whole(value) and value > 0, "a whole number > 0")
NUMBER = leaf(is_number, "a number")
TEXT = leaf(lambda value: isinstance(value, str), "a text")
TRUTH = leaf(lambda value: isinstance(value, bool), "true or false")
LIST = leaf(lambda value: isinstance(value, list), "a list")
OBJECT = leaf(lambda value: isinstance(value, dict), "an object")
WHOLES = leaf(lambda value: isinstance(value, list) and all(map(is_whole, value)), "a list of whole numbers >= 0")
NUMBERS = leaf(lambda value: isinstance(value, list) and all(map(is_number, value)), "a list of numbers")
