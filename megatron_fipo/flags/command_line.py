"""From words to values: which flag was given with what. Knows the flags' table, not what the settings mean."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fipo.flags.megatron_ignored import ignored_note
from megatron_fipo.flags.megatron_lm_names import FORMER_FLAGS, MEGATRON_LM_FLAGS
from megatron_fipo.flags.megatron_unsupported import NEWER_CORE, unsupported_reason
from megatron_fipo.flags.option import VALUE, Option, parse_value
from megatron_fipo.flags.sglang_names import SGLANG_VERSION
from megatron_fipo.flags.sglang_table import PREFIX, refused_sglang_flags


@dataclass(frozen=True)
class Given:
    """What the command line says about one option, and by which of its flags."""

    option: Option
    flag: str
    value: Any


def read_arguments(argv: Sequence[str], options: Sequence[Option]) -> tuple[dict[str, Given], list[str]]:
    """What was given, by the options' first setting, and notes about flags that are accepted without effect.

    The same flag again replaces its value (so that a script's flags can be overridden by appending); two different
    flags that say different things about one setting are an error. Flags are never abbreviated. A value that begins
    with two dashes is written `--flag=--value`.

    Raises ValueError with one line that says of every flag amiss what is wrong with it: the flag, the value found and
    the value wanted.
    """
    by_flag = {flag: option for option in options for flag in option.flags}
    given: dict[str, Given] = {}
    notes: list[str] = []
    errors: list[str] = []
    last_words = dict(_flags_with_values(argv))
    for flag, values in last_words.items():
        option = by_flag.get(flag)
        try:
            note = ignored_note(flag, values, is_option=option is not None)
            if note is None and option is None:
                errors.append(_explain(flag, by_flag))
            elif note is None:
                assert option is not None
                _give(given, option, flag, _value(flag, values, option))
            elif note:
                notes.append(note)
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("; ".join(errors))
    return given, notes


def _give(given: dict[str, Given], option: Option, flag: str, value: Any) -> None:
    """Note what a flag says, unless another flag says otherwise."""
    earlier = given.get(option.setting)
    if earlier is not None and earlier.value != value:
        raise ValueError(f"{earlier.flag} and {flag} contradict each other: give one of them")
    given[option.setting] = Given(option, flag, value)


def _flags_with_values(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the words up to the next flag; `--flag=word` puts a word first."""
    flag: str | None = None
    values: list[str] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            if flag is not None:
                yield flag, values
            flag, has_value, value = word.partition("=")
            values = [value] if has_value else []
        elif flag is None:
            raise ValueError(f"unexpected argument {word!r}: everything is given by flags, see --help")
        else:
            values.append(word)
    if flag is not None:
        yield flag, values


def _value(flag: str, values: list[str], option: Option) -> Any:
    stored = option.flags[flag]
    if stored is not VALUE:
        if values:
            raise ValueError(f"{flag} takes no value, but is followed by {' '.join(values)!r}")
        return stored
    if not values:
        raise ValueError(f"{flag} is given without a value")
    if option.type.many:
        return [parse_value(flag, value, option.type) for value in values]
    if len(values) > 1:
        raise ValueError(f"{flag} takes one value, but is followed by {' '.join(values)!r}")
    return parse_value(flag, values[0], option.type)


def _explain(flag: str, by_flag: Mapping[str, Option]) -> str:
    """Why a flag is not accepted, and what was probably meant."""
    refused = refused_sglang_flags()
    if flag in refused:
        return f"{flag} is decided by the run itself: {refused[flag]}"
    if flag in MEGATRON_LM_FLAGS or flag in FORMER_FLAGS:
        reason = "it needs a newer megatron-core" if flag in NEWER_CORE else unsupported_reason(flag)
        return f"{flag} is a Megatron-LM flag that is not supported here" + (f": {reason}" if reason else "")
    text = f"unknown flag {flag}"
    if flag.startswith(PREFIX):
        text += f" (not an option of SGLang {SGLANG_VERSION})"
    candidates = [known for known in by_flag if known.startswith(PREFIX) == flag.startswith(PREFIX)]
    close = difflib.get_close_matches(flag.replace("_", "-").lower(), candidates, n=1)
    return text + (f"; did you mean {close[0]}?" if close else "; see --help")
