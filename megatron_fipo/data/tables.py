"""Prompt files with columns, parquet or a Hugging Face dataset on disk: which rows differ, and those rows.

A published file may repeat its rows a hundred times. Which rows differ is found from the few columns that say so, a
batch at a time, by 64 bits that stand for a row's values; only the rows that differ are then read whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KEY_BATCH_ROWS = 32_768
WHOLE_BATCH_ROWS = 1024

Progress = Callable[[int, int], None]
"""Told how much is done, of how much."""


@dataclass(frozen=True)
class Table:
    """A file of rows: `schema` (pyarrow.Schema), `batches(columns, batch_rows)` gives all of it as record batches, and
    `batches_at(numbers)` gives `(first row, record batch)` for every part that holds one of the ascending `numbers`.
    Rows count from 0 here."""

    name: str
    schema: Any
    num_rows: int
    batches: Callable[[list[str], int], Iterator[Any]]
    batches_at: Callable[[Sequence[int]], Iterator[tuple[int, Any]]]


def open_parquet(file: Path) -> Table:
    """Raises ValueError naming the file when it is no parquet file, now or further in, or pyarrow is missing."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{file}: reading parquet needs the package pyarrow ({error})") from error
    try:
        source = parquet.ParquetFile(file, pre_buffer=False)  # else all that is read ahead stays in memory
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not readable as parquet: {error}") from error
    sizes = [source.metadata.row_group(i).num_rows for i in range(source.metadata.num_row_groups)]
    starts = np.cumsum([0, *sizes])

    def batches(columns: list[str], batch_rows: int) -> Iterator[Any]:
        return _readable(str(file), source.iter_batches(batch_size=batch_rows, columns=columns))

    def batches_at(numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        wanted = np.asarray(numbers)
        for i, size in enumerate(sizes):
            inside = wanted[(wanted >= starts[i]) & (wanted < starts[i] + size)]
            start = int(starts[i])
            parts = source.iter_batches(batch_size=WHOLE_BATCH_ROWS, row_groups=[i]) if len(inside) else ()
            for batch in _readable(str(file), iter(parts)):
                yield start, batch
                start += batch.num_rows
                if start > inside[-1]:
                    break

    return Table(str(file), source.schema_arrow, source.metadata.num_rows, batches, batches_at)


def open_dataset(directory: Path, split: str | None) -> Table:
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote; of the latter `split`, or its only one.

    Raises ValueError naming the directory: no such dataset, a split that is not there or not chosen, no library.
    """
    is_dict = (directory / "dataset_dict.json").is_file()
    if not is_dict and not (directory / "state.json").is_file():
        raise ValueError(
            f"{directory} is a directory, but holds no dataset that save_to_disk of the library datasets wrote; give a "
            "file in it by name (.jsonl, .parquet)"
        )
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{directory}: reading it needs the library datasets, installed with: pip install datasets ({error})"
        ) from error
    _require_files_inside(directory)
    try:
        dataset: Any = datasets.load_from_disk(str(directory))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # whatever damaged JSON leads to
        raise ValueError(f"{directory}: not readable as a dataset on disk: {type(error).__name__}: {error}") from error
    name = str(directory)
    if is_dict:
        found = ", ".join(sorted(dataset))
        if split is None and len(dataset) != 1:
            raise ValueError(f"{directory} holds the splits {found}; name one: {directory}:SPLIT")
        split = split if split is not None else next(iter(dataset))
        if split not in dataset:
            raise ValueError(f"{directory} has no split {split!r}; found: {found}")
        dataset, name = dataset[split], f"{directory}:{split}"
    elif split is not None and split != str(dataset.split):
        raise ValueError(f"{directory} has no split {split!r}: it holds one dataset, split {dataset.split}")

    def parts(dataset: Any, batch_rows: int) -> Iterator[Any]:
        for table in dataset.with_format("arrow").iter(batch_size=batch_rows):
            yield table.combine_chunks().to_batches(max_chunksize=batch_rows)[0]

    def batches(columns: list[str], batch_rows: int) -> Iterator[Any]:
        return _readable(name, parts(dataset.select_columns(columns), batch_rows))

    def batches_at(numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        for place in sorted({number // WHOLE_BATCH_ROWS for number in numbers}):
            start = place * WHOLE_BATCH_ROWS
            rows = dataset.select(range(start, min(start + WHOLE_BATCH_ROWS, len(dataset))))
            yield start, next(_readable(name, parts(rows, WHOLE_BATCH_ROWS)))

    return Table(name, dataset.data.schema, len(dataset), batches, batches_at)


def _require_files_inside(directory: Path) -> None:
    """Raise ValueError when the data set names a file or a split that lies outside of its directory."""
    for path in (directory / "dataset_dict.json", *directory.glob("state.json"), *directory.glob("*/state.json")):
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_bytes())
            names = [*found.get("splits", ()), *(file["filename"] for file in found.get("_data_files") or ())]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{directory}: not readable as a dataset on disk: {type(error).__name__} in {path.name}: {error}"
            ) from error
        for name in names:
            if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
                raise ValueError(f"{path} names {name!r}, wanted a name in {path.parent}")


def first_rows(table: Table, columns: Sequence[str], progress: Progress | None = None) -> list[int]:
    """The first row, ascending, of every combination of values in `columns`; columns that are not there are alike."""
    present = [name for name in columns if name in table.schema.names]
    if not present:
        return list(range(min(1, table.num_rows)))
    seen: set[int] = set()
    found: list[int] = []
    start = 0
    for batch in table.batches(present, KEY_BATCH_ROWS):
        codes, places = np.unique(
            _mixed([_codes(batch.column(batch.schema.names.index(name))) for name in present]), return_index=True
        )
        new = [(place, code) for place, code in zip(places.tolist(), codes.tolist()) if code not in seen]
        seen.update(code for _, code in new)
        found += sorted(start + place for place, _ in new)
        start += batch.num_rows
        if progress is not None:
            progress(start, table.num_rows)
    return found


def rows_at(
    table: Table, numbers: Sequence[int], progress: Progress | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(number, row)` of the ascending row `numbers`, each row a dict of Python values."""
    wanted = np.asarray(numbers, dtype=np.int64)
    for done, (start, batch) in enumerate(batches_of(table, wanted)):
        yield from zip(start, batch.to_pylist())
        if progress is not None and done % 16 == 0:
            progress(start[-1] + 1, table.num_rows)


def batches_of(table: Table, numbers: Sequence[int] | np.ndarray) -> Iterator[tuple[list[int], Any]]:
    """`(row numbers, record batch of just these rows)` until all of the ascending `numbers` have come."""
    wanted = np.asarray(numbers, dtype=np.int64)
    for start, batch in table.batches_at(wanted.tolist()):
        inside = wanted[(wanted >= start) & (wanted < start + batch.num_rows)]
        if len(inside):
            yield inside.tolist(), batch.take(_arrow_array(inside - start))


def _arrow_array(values: np.ndarray) -> Any:
    import pyarrow

    return pyarrow.array(values)


def _readable(name: str, batches: Iterator[Any]) -> Iterator[Any]:
    import pyarrow

    try:
        yield from batches
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name}: damaged, not readable to its end: {error}") from error


def _codes(array: Any) -> np.ndarray:
    """64 bits for each row of an arrow array, [rows] uint64, made of its value: equal values have equal bits."""
    import pyarrow as pa

    kind = array.type
    present = ~array.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_struct(kind):
        return _mixed([present, *(_codes(array.field(i)) for i in range(kind.num_fields))])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        # `flatten` leaves out what lies under a null, as do these lengths.
        lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        items = _codes(array.flatten())
        codes = _mixed([present, lengths])
        for i in range(int(lengths.max(initial=0))):
            (rows,) = np.nonzero(lengths > i)
            codes[rows] = _mixed([codes[rows], items[starts[rows] + i]])
        return codes
    if pa.types.is_dictionary(kind):
        return _codes(array.dictionary_decode())
    if _is_flat(kind):
        encoded = array.dictionary_encode()
        values = [*encoded.dictionary.to_pylist(), None]
        places = encoded.indices.fill_null(len(values) - 1).to_numpy(zero_copy_only=False)
        return _digests(values)[places]
    return _digests(array.to_pylist())


def _mixed(columns: Sequence[np.ndarray]) -> np.ndarray:
    """64 bits of each row of several columns. Two of n different rows share theirs with probability n^2 / 2^65 (3e-8
    of a million), as random ones do: each step is a bijection of the bits so far (the finaliser of splitmix64)."""
    bits = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        bits ^= column.astype(np.uint64)
        bits += np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
    return bits


def _digests(values: Sequence[Any]) -> np.ndarray:
    """Python's own 64-bit hash of each value, the same throughout this process; -1 and -2 share theirs, their texts
    do not."""
    hashes = (hash(value) if isinstance(value, str) else hash((repr(value),)) for value in values)
    return np.fromiter(hashes, np.int64, len(values)).view(np.uint64)


def _is_flat(kind: Any) -> bool:
    import pyarrow as pa

    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
    )
