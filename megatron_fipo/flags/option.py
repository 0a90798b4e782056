"""One flag as data, its values, and the options that come out of our own settings dataclasses."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

VALUE: Final = "<value>"
"""What an option's `flags` hold for a flag that takes a value; a switch holds the value it stores."""


@dataclass(frozen=True)
class ValueType:
    """What may follow a flag. `object` is a JSON object; `size` is an integer that may end in k, M, G, T or in Ki, Mi,
    Gi, Ti, as SGLang takes it."""

    kind: Literal["bool", "int", "float", "str", "json", "object", "size"]
    choices: tuple[Any, ...] = ()
    many: bool = False  # one or more values
    accepts_none: bool = False  # the word none


@dataclass(frozen=True)
class Option:
    """One setting and the flags that set it.

    `settings` are the places the value goes to, as dotted paths ("loss.half_life"); the first one names the option.
    `flags` maps each option string to VALUE or to what the switch stores.
    """

    settings: tuple[str, ...]
    flags: Mapping[str, Any]
    type: ValueType
    group: str
    help: str = ""
    default: str = ""  # as shown; empty: none worth showing
    listed: bool = True  # shown by plain --help

    @property
    def setting(self) -> str:
        """The setting that names this option."""
        return self.settings[0]


def options_of(
    section: str, settings_class: type, group: str | Callable[[str], str], defaults: Mapping[str, str] | None = None
) -> list[Option]:
    """An option for every field of a settings dataclass that carries help text: field `x_y` becomes `--x-y`.

    `metadata["flag"]` replaces the name. A bool that is off by default gets one flag; one that is on, or decided by
    something else (None), also gets `--no-...`. `defaults` replaces the default shown.
    """
    hints = typing.get_type_hints(settings_class)
    options = []
    for field in dataclasses.fields(settings_class):
        if "help" not in field.metadata:
            continue
        flag = field.metadata.get("flag", "--" + field.name.replace("_", "-"))
        value_type = _type_of_hint(hints[field.name])
        flags: dict[str, Any] = {flag: VALUE}
        if value_type.kind == "bool":
            flags = {flag: True}
            if field.default is not False:
                flags["--no-" + flag.removeprefix("--")] = False
        options.append(
            Option(
                settings=(f"{section}.{field.name}",),
                flags=flags,
                type=value_type,
                group=group if isinstance(group, str) else group(field.name),
                help=field.metadata["help"],
                default=(defaults or {}).get(field.name, shown_default(field.default)),
            )
        )
    return options


def parse_value(flag: str, text: str, value_type: ValueType) -> Any:
    """The value that `text` stands for. Raises ValueError naming the flag, the value found and the value wanted."""
    if value_type.accepts_none and text.lower() == "none":
        return None
    value = _PARSERS[value_type.kind](flag, text)
    if value_type.choices and value not in value_type.choices:
        choices = ", ".join(str(choice) for choice in value_type.choices)
        wanted = f"one of {choices}" if len(value_type.choices) > 1 else choices
        raise ValueError(f"{flag} is {text!r}, but must be {wanted}")
    return value


def shown_default(default: Any) -> str:
    """A default as the help and the docs show it; empty where there is none to show."""
    if default is dataclasses.MISSING or default is None or default is False or default in ("", ()):
        return ""
    return "on" if default is True else str(default)


def _type_of_hint(hint: Any) -> ValueType:
    """The value type of a resolved annotation of our own settings."""
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        assert len(members) == 1, hint
        inner = _type_of_hint(members[0])
        return dataclasses.replace(inner, accepts_none=inner.kind in ("int", "float"))
    if typing.get_origin(hint) is Literal:
        return ValueType("str", choices=tuple(members))
    if typing.get_origin(hint) is tuple:
        return dataclasses.replace(_type_of_hint(members[0]), many=True)
    if typing.get_origin(hint) in (Mapping, dict):
        return ValueType("object")
    kinds: dict[Any, ValueType] = {
        bool: ValueType("bool"),
        int: ValueType("int"),
        float: ValueType("float"),
        str: ValueType("str"),
    }
    return kinds[hint]


def _integer(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{flag} is {text!r}, but must be an integer") from None


def _number(flag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{flag} is {text!r}, but must be a number, and finite")
    return value


def _size(flag: str, text: str) -> int:
    factors = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    for suffix, factor in factors.items():
        if text.endswith(suffix):
            scaled = _number(flag, text.removesuffix(suffix)) * factor
            if not scaled.is_integer():
                raise ValueError(f"{flag} is {text!r}, but must be a whole number")
            return int(scaled)
    return _integer(flag, text)


def _json(flag: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # no JSON, or an integer of more digits than Python converts
        raise ValueError(f"{flag} is {text!r}, but must be JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{flag} is nested too deeply") from None


def _object(flag: str, text: str) -> Any:
    value = _json(flag, text)
    if not isinstance(value, dict):
        raise ValueError(f'{flag} is {text!r}, but must be a JSON object: {{"name": value}}')
    return value


def _text(flag: str, text: str) -> str:
    return text


_PARSERS: Mapping[str, Callable[[str, str], Any]] = {
    "int": _integer,
    "float": _number,
    "str": _text,
    "json": _json,
    "object": _object,
    "size": _size,
}
