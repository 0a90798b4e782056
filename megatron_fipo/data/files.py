"""Prompt files: JSONL or parquet, one problem per row, checked row by row with errors that name file and row."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_fipo.data.source import SeededSource, drawn_uid, stable_hash
from megatron_fipo.types import Problem

PARQUET_BATCH_ROWS = 1024


def file_source(path: str, problems: list[Problem], seed: int, *, shuffle: bool) -> SeededSource:
    """The file's problems again and again; with `shuffle` every epoch has an order of its own, from (seed, epoch)."""

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> list[int]:
        indices = list(range(len(problems)))
        if shuffle:
            random.Random(f"file {seed} {epoch}").shuffle(indices)
        return indices

    def problem_at(k: int) -> Problem:
        epoch, i = divmod(k, len(problems))
        problem = problems[order(epoch)[i]]
        uid = drawn_uid(problem.uid, epoch)
        return Problem(uid, problem.prompt, problem.ground_truth, problem.response_prefix, problem.extra)

    content = stable_hash(*((problem.uid, problem.prompt, problem.ground_truth) for problem in problems))
    how = f"shuffled by seed {seed}" if shuffle else "in order"
    return SeededSource(
        f"file {Path(path).name} of {len(problems)} problems (content {content:08x}), {how}", problem_at
    )


def read_problems(flag: str, path: str, input_key: str, label_key: str) -> list[Problem]:
    """All problems of a JSONL or parquet file.

    The prompt lies at `input_key`: text, or a list of chat messages {"role", "content"}; the ground truth at
    `label_key`: text or a number. Dots descend into objects. A row's other columns reach the reward as the keyword
    argument `metadata`. The uid is `<file name>:<row>`, rows counted from 1 (lines, in JSONL).

    Raises ValueError, naming the file and the row, for whatever does not fit; `flag` is the option that gave the file.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{flag} is {path!r}, but no such file exists")
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if file.suffix not in readers:
        raise ValueError(f"{flag} is {path!r}, but must end in .jsonl or .parquet")
    problems = [
        _problem(f"{path}, {place} {number}", f"{file.name}:{number}", row, input_key, label_key)
        for place, number, row in readers[file.suffix](file)
    ]
    if not problems:
        raise ValueError(f"{flag} is {path!r}, which holds no problem")
    return problems


def _read_jsonl(file: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}, line {number}: not UTF-8 text ({error.reason})") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
            except RecursionError as error:
                raise ValueError(f"{file}, line {number}: nested too deeply") from error
            except ValueError as error:  # an integer of more digits than Python converts
                raise ValueError(f"{file}, line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}: found {_shown(row)}, wanted an object {{...}}")
            yield "line", number, row


def _read_parquet(file: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{file}: reading parquet needs the package pyarrow ({error})") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=PARQUET_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield "row", number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not readable as parquet after {number} rows: {error}") from error


def _problem(where: str, uid: str, row: dict[str, Any], input_key: str, label_key: str) -> Problem:
    prompt = _checked_prompt(where, input_key, _value_at(where, row, "--input-key", input_key))
    label = _value_at(where, row, "--label-key", label_key)
    if not isinstance(label, str | int | float) or isinstance(label, bool):
        raise ValueError(f"{where}: the ground truth {label_key!r} is {_shown(label)}, wanted text or a number")
    used = {key if key in row else key.split(".")[0] for key in (input_key, label_key)}
    metadata = {column: value for column, value in row.items() if column not in used}
    # Dates, decimals and bytes of a parquet file become text: problems travel to the graders as JSON.
    extra = {"metadata": json.loads(json.dumps(metadata, default=str))} if metadata else {}
    return Problem(uid, prompt, _encodable(where, label_key, str(label)), extra=extra)


def _value_at(where: str, row: dict[str, Any], flag: str, key: str) -> Any:
    """The value at `key`: a column of that very name, or else a descent along its dots."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            found = ", ".join(sorted(value)) if isinstance(value, dict) else _shown(value)
            at = "columns" if value is row else f"what stands there before {part!r}"
            raise ValueError(f"{where}: {flag} is {key!r}, but there is no such value; found {at}: {found}")
        value = value[part]
    return value


def _checked_prompt(where: str, key: str, value: Any) -> str | tuple[Mapping[str, str], ...]:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{where}: the prompt {key!r} is empty")
        return _encodable(where, key, value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: the prompt {key!r} is {_shown(value)}, wanted text or a list of chat messages")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(
                f"{where}: the prompt {key!r} holds the message {_shown(message)}, "
                'wanted {"role": text, "content": text}'
            )
    return tuple({k: _encodable(where, key, message[k]) for k in ("role", "content")} for message in value)


def _encodable(where: str, key: str, text: str) -> str:
    """`text`, unless it holds half a surrogate pair (JSON can spell it, no tokenizer can read it)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {key!r} holds a lone surrogate at character {error.start}") from error
    return text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
