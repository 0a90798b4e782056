"""Writing prompt files, under a temporary name until they are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_fipo.data.files import jsonl_rows, open_rows, parsed_line
from megatron_fipo.data.tables import Progress, Table, batches_of, rows_at


def write_rows(path: str, numbers: Sequence[int], out: Path, progress: Progress | None = None) -> None:
    """Write the rows `numbers` (ascending, from 1) of the prompt file `path` to `out`, .jsonl or .parquet.

    Parquet from parquet, or from a dataset on disk, keeps its schema; JSONL from JSONL its lines. Dates, decimals and
    bytes become text in JSONL. Raises ValueError when JSONL rows make no common schema.
    """
    opened = open_rows("the file", path)
    if isinstance(opened, Table):
        indices = [number - 1 for number in numbers]
        if out.suffix == ".parquet":
            _write_batches(opened, indices, out)
        else:
            _write_lines((_as_line(row) for _, row in rows_at(opened, indices, progress)), out)
        return
    wanted = set(numbers)
    lines = ((number, line) for number, line, _ in jsonl_rows(opened, progress) if number in wanted)
    if out.suffix == ".parquet":
        write_objects([parsed_line(opened, number, line) for number, line in lines], out)
    else:
        _write_lines((_without_mark(number, line) for number, line in lines), out)


def write_objects(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write `rows` to `out`, .jsonl or .parquet. Raises ValueError when parquet has no common schema for them."""
    if out.suffix == ".jsonl":
        _write_lines(map(_as_line, rows), out)
        return
    import pyarrow
    from pyarrow import parquet

    try:
        table = pyarrow.Table.from_pylist(list(rows))
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise ValueError(f"{out}: the rows have no common parquet schema: {error}; write .jsonl") from error
    with _renamed_when_whole(out) as aside:
        parquet.write_table(table, aside)


def _write_batches(table: Table, indices: Sequence[int], out: Path) -> None:
    from pyarrow import parquet

    with _renamed_when_whole(out) as aside, parquet.ParquetWriter(aside, table.schema) as writer:
        for _, batch in batches_of(table, indices):
            writer.write_batch(batch)


def _write_lines(lines: Iterator[bytes], out: Path) -> None:
    with _renamed_when_whole(out) as aside, aside.open("wb") as file:
        file.writelines(line.rstrip(b"\r\n") + b"\n" for line in lines)


def _as_line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "strict")


def _without_mark(number: int, line: bytes) -> bytes:
    return line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


@contextmanager
def _renamed_when_whole(out: Path) -> Iterator[Path]:
    aside = out.with_name(f".{out.name}.partial")
    try:
        yield aside
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
