"""The run's record files: JSON Lines, one object with a `step` per line, appended to and repaired on resume."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import IO, Any

METRICS_FILE = "metrics.jsonl"  # one object per step
EVALUATIONS_FILE = "evaluations.jsonl"  # one object per evaluation; step 0 is the one before training
SAMPLES_FILE = "samples.jsonl"  # one object per sampled text
SURROGATES = "backslashreplace"  # half a surrogate pair, which UTF-8 cannot hold, becomes JSON's escape for it


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl (or evaluations.jsonl, samples.jsonl), in file order.

    Raises ValueError naming file and line for a line that is not a JSON object with an integer `step`, the last line
    included (resuming the run repairs a line that its end cut short), and for a step that does not follow on the one
    before: in a metrics.jsonl it is the next, elsewhere not an earlier one.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")  # not splitlines: texts may hold U+2028
    if lines[-1] == "":
        lines.pop()
    return _in_order([_parse(line, Path(path), number) for number, line in enumerate(lines, start=1)], Path(path))


def open_records(path: Path, *, resume_step: int | None) -> IO[str]:
    """Open a record file for appending; on resume first drop what a later, dead run wrote after `resume_step`.

    A last line without its newline was cut short by the writer's end and is dropped unless it parses. The file is
    replaced atomically. Raises ValueError when a fresh run (`resume_step` None) finds records, for a bad line, and for
    a metrics.jsonl that ends before `resume_step`: nobody could tell the gap from damage later.
    """
    if path.exists() and path.stat().st_size > 0:
        if resume_step is None:
            raise ValueError(
                f"{path} already holds the records of a run, but a fresh run must have an --output-dir of its own; "
                "--load resumes a run"
            )
        _rewrite_until(path, resume_step)
    return path.open("a", encoding="utf-8", errors=SURROGATES)


def append_record(file: IO[str], record: Mapping[str, Any]) -> None:
    """Write one object as one line and flush it, so that whoever reads along sees whole records.

    Raises ValueError naming the file when it cannot be written; resuming the run drops the piece of a line left there.
    """
    line = json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        file.write(line)
        file.flush()
    except OSError as error:
        raise ValueError(f"{file.name} cannot be written: {error}") from error


def plain(key: str, value: Any, step: int) -> Any:
    """`value` as what JSON holds: numbers and bools (NumPy's become Python's), lists and mappings of them.

    Raises ValueError naming the key for NaN, infinity and anything else.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        if not math.isfinite(value):
            raise ValueError(f"metric {key!r} is {float(value)} at step {step}, but must be finite")
        return float(value)
    if isinstance(value, Mapping):
        return {name: plain(f"{key}.{name}", item, step) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(f"{key}[{index}]", item, step) for index, item in enumerate(value)]
    raise ValueError(f"metric {key!r} is a {type(value).__name__} at step {step}, but must be a number or a list")


def _rewrite_until(path: Path, step: int) -> None:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    truncated = lines.pop()  # what follows the last newline
    records = [_parse(line, path, number) for number, line in enumerate(lines, start=1)]
    if truncated:
        with contextlib.suppress(ValueError):  # the one line a dying writer may leave behind
            records.append(_parse(truncated, path, len(lines) + 1))
    _in_order(records, path)
    if path.name == METRICS_FILE and records and records[-1]["step"] < step:
        raise ValueError(
            f"{path} ends with step {records[-1]['step']}, but the checkpoint to resume from has {step} steps: give an "
            "--output-dir of its own to a run whose earlier records are elsewhere, or lost"
        )
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("w", encoding="utf-8", errors=SURROGATES) as file:
            for record in records:
                if record["step"] <= step:
                    append_record(file, record)
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written anew: {error}") from error


def _in_order(records: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    for number, (before, record) in enumerate(itertools.pairwise(records), start=2):
        rise = record["step"] - before["step"]
        if rise < 0 or (rise != 1 and path.name == METRICS_FILE):
            raise ValueError(f"{path}:{number}: step {record['step']} after step {before['step']}: the file is damaged")
    return records


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: not JSON ({error}), but every line must be one JSON object") from None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError(f"{path}:{number}: {line[:80]!r} must be a JSON object with an integer 'step'")
    return record
