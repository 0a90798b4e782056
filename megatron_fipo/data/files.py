"""Prompt files: JSONL, parquet, or a Hugging Face dataset on disk; a problem per row, repeated rows taken once."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_fipo.data.duplicates import Deduplication, KeptProblem
from megatron_fipo.data.rows import problem_of_row, shown
from megatron_fipo.data.source import SeededSource, drawn_uid, stable_hash
from megatron_fipo.data.tables import Progress, Table, first_rows, open_dataset, open_parquet, rows_at
from megatron_fipo.data_config import DataSettings
from megatron_fipo.types import Problem

DEFAULT_DEDUP_KEY = next(str(field.default) for field in fields(DataSettings) if field.name == "dedup_key")


@dataclass(frozen=True)
class FileFormat:
    """Where a file's rows keep what a problem is made of, as DataSettings names it."""

    input_key: str = "prompt"
    label_key: str = "label"
    deduplicate: bool = True
    dedup_key: str = DEFAULT_DEDUP_KEY


@dataclass(frozen=True, eq=False)
class ProblemFile:
    """What a file holds. Rows are counted from 1 (lines, in JSONL).

    `contradictions` are the rows of each question that has more than one ground truth; its problems are still among
    `kept`. `num_same_problem_other_key` counts the values of the key column that ask what another value asks.
    """

    name: str  # the file's name, as in uids
    path: str
    place: str  # "row" or "line"
    kept: list[KeptProblem]
    num_rows: int
    num_same_problem_other_key: int
    contradictions: list[list[int]]
    has_key: bool

    @property
    def problems(self) -> list[Problem]:
        return [kept.problem for kept in self.kept]

    @property
    def num_repeated(self) -> int:
        return self.num_rows - len(self.kept)

    def note(self, key: str) -> str | None:
        """One line about the rows that were not taken, None when all were."""
        if not self.num_repeated:
            return None
        other = self.num_same_problem_other_key
        detail = f"; {other} values of {key} ask what another one asks" if other else ""
        return f"{self.name}: {len(self.kept)} problems of {self.num_rows} rows, {self.num_repeated} repeated{detail}"


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
        f"file {Path(path).name} of {len(problems)} problems (content {content:08x}), {how}", problem_at, problems
    )


def read_problem_file(
    flag: str,
    path: str,
    file_format: FileFormat = FileFormat(),
    progress: Progress | None = None,
) -> ProblemFile:
    """All problems of a .jsonl or .parquet file, or of a directory that `save_to_disk` of the library datasets wrote
    (`directory:split` of one with several splits).

    The prompt lies at `input_key`: text, or a list of chat messages {"role", "content"}; the ground truth at
    `label_key`: text or a number. Dots descend into objects. A row's other columns reach the reward as the keyword
    argument `metadata`. The uid is `<file name>:<row>`. Repeated rows (data/duplicates.py) are taken once unless
    `deduplicate` is off; the first stands for all. A file without the column `dedup_key` is compared by question and
    ground truth.

    Raises ValueError, naming the file and the row, for whatever does not fit; `flag` is the option that gave the file.
    """
    opened = open_rows(flag, path)
    rows: _TableRows | _JsonlRows
    if isinstance(opened, Table):
        rows = _TableRows(opened, file_format, progress)
    else:
        rows = _JsonlRows(opened, file_format, progress)
    location, split = _location(path)
    name = location.name if split is None else f"{location.name}:{split}"
    place = rows.place
    deduplication = Deduplication(path, place, file_format.dedup_key)
    kept = deduplication.kept
    for number, row in rows:
        problem = problem_of_row(
            f"{path}, {place} {number}", f"{name}:{number}", row, file_format.input_key, file_format.label_key
        )
        if file_format.deduplicate:
            deduplication.add(number, row, problem)
        else:
            kept.append(KeptProblem(problem, number))
    if not kept:
        raise ValueError(f"{flag} is {path!r}, which holds no problem")
    return ProblemFile(
        name,
        path,
        place,
        kept,
        rows.num_rows,
        deduplication.same_problem_other_key,
        deduplication.contradictions(),
        deduplication.has_key,
    )


def open_rows(flag: str, path: str) -> Table | Path:
    """The table at `path`, or the path of its JSONL file. Raises ValueError naming `flag` for anything else."""
    location, split = _location(path)
    if location.is_dir():
        return open_dataset(location, split)
    if not location.is_file():
        raise ValueError(f"{flag} is {path!r}, but no such file exists")
    if location.suffix == ".parquet":
        return open_parquet(location)
    if location.suffix == ".jsonl":
        return location
    raise ValueError(
        f"{flag} is {path!r}, but must end in .jsonl or .parquet, or be a directory written by save_to_disk of the "
        "library datasets"
    )


def dataset_name(path: str) -> str:
    """A name for the data set at `path`: the file's without its ending; `directory-split` for a split of one."""
    location = Path(path)
    name = location.stem if location.suffix in (".jsonl", ".parquet") else location.name
    return name.replace(":", "-")


def jsonl_rows(file: Path, progress: Progress | None = None) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """`(line number, line, object)` of every line that is not blank; None in place of a line seen before.

    Raises ValueError naming the line that is not an object in UTF-8 JSON.
    """
    seen: set[bytes] = set()
    size, done = file.stat().st_size, 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            done += len(line)
            if progress is not None and number % 10_000 == 0:
                progress(done, size)
            if not line.strip():
                continue
            digest = hashlib.blake2b(line, digest_size=16).digest()
            yield number, line, None if digest in seen else parsed_line(file, number, line)
            seen.add(digest)


def parsed_line(file: Path, number: int, line: bytes) -> dict[str, Any]:
    """The object on a JSONL line. Raises ValueError naming the line when there is none."""
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}, line {number}: not UTF-8 text ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(f"{file}, line {number}: nested too deeply") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise ValueError(f"{file}, line {number}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{file}, line {number}: found {shown(row)}, wanted an object {{...}}")
    return row


class _TableRows:
    """A table's rows that may differ: those that repeat another one's prompt, ground truth and key are left out."""

    place = "row"

    def __init__(self, table: Table, file_format: FileFormat, progress: Progress | None) -> None:
        self.num_rows = table.num_rows
        self._table, self._format, self._progress = table, file_format, progress

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        numbers: range | list[int] = range(self.num_rows)
        if self._format.deduplicate:
            keys = (self._format.dedup_key, self._format.input_key, self._format.label_key)
            names = self._table.schema.names
            columns = [key if key in names else key.split(".")[0] for key in keys] + ["data_source"]
            if all(column in names for column in columns[1:3]):  # else the first row says what is missing
                numbers = first_rows(self._table, list(dict.fromkeys(columns)), self._progress)
        for number, row in rows_at(self._table, numbers, self._progress):
            yield number + 1, row


class _JsonlRows:
    """A JSONL file's objects; lines that are equal byte for byte come once, unless rows are not compared."""

    place = "line"

    def __init__(self, file: Path, file_format: FileFormat, progress: Progress | None) -> None:
        self.num_rows = 0
        self._file, self._format, self._progress = file, file_format, progress

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line, row in jsonl_rows(self._file, self._progress):
            self.num_rows += 1
            if row is not None:
                yield number, row
            elif not self._format.deduplicate:
                yield number, parsed_line(self._file, number, line)


def _location(path: str) -> tuple[Path, str | None]:
    """The path, and the split where `path` is `directory:split`."""
    location = Path(path)
    directory, colon, split = path.rpartition(":")
    if colon and not location.exists() and Path(directory).is_dir():
        return Path(directory), split
    return location, None
