"""The responses of a long evaluation on disk, block by block, so that it can be killed and goes on where it stopped.

A directory holds evaluation_settings.json, which says what the responses depend on, and responses.jsonl, one response
per line in the order of data sets, problems and samples, with a checksum of the line. A block of problems is written
once all of it is graded.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_fipo.trainer.evaluation_result import EvaluatedProblem, EvaluatedResponse
from megatron_fipo.types import Prompt

SETTINGS_FILE = "evaluation_settings.json"
RESPONSES_FILE = "responses.jsonl"
CHECKSUM = "sha256"  # of a line's record without it; the first CHECKSUM_DIGITS digits
CHECKSUM_DIGITS = 16
NUM_SHOWN = 3


@dataclass(frozen=True)
class Block:
    """Problems of one data set that are answered together: what is lost at most when an evaluation is killed."""

    data_set: str
    prompts: tuple[Prompt, ...]


def blocks_of(data_sets: Mapping[str, Sequence[Prompt]], size: int) -> list[Block]:
    """Each data set in blocks of `size` problems, the last one shorter; in order."""
    assert size >= 1, size
    return [
        Block(name, tuple(prompts[start : start + size]))
        for name, prompts in data_sets.items()
        for start in range(0, len(prompts), size)
    ]


class ResponseFile:
    """The open responses.jsonl of an evaluation, new or to be gone on with. A context manager.

    `finished` are the problems of the first blocks, as they were answered before; what a killed process wrote of a
    block it did not finish is dropped. `settings` (JSON types) are all that the responses depend on, by the names that
    the user knows. Raises ValueError naming what differs when the directory holds an evaluation with other settings,
    the line that is not what belongs there, or that another process is writing there.
    """

    def __init__(
        self, directory: str | Path, settings: Mapping[str, Any], blocks: Sequence[Block], num_samples: int
    ) -> None:
        self.directory = Path(directory)
        self.blocks = tuple(blocks)
        self.num_samples = num_samples
        self.directory.mkdir(parents=True, exist_ok=True)
        self._path = self.directory / RESPONSES_FILE
        self._file = self._path.open("a+b")
        try:
            self._lock()
            _check_settings(self.directory, settings, has_responses=self._path.stat().st_size > 0)
            self.finished = self._read_finished()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ResponseFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with nullcontext() if kind is None else suppress(OSError):  # it would write again what could not be written
            self._file.close()

    def append(self, problems: Sequence[EvaluatedProblem]) -> None:
        """Add the next block's problems; they are on disk when this returns. Raises ValueError when the disk does not
        take them; the next start drops the piece left there."""
        block = self.blocks[len(self.finished)]
        assert [problem.uid for problem in problems] == [prompt.problem.uid for prompt in block.prompts]
        lines = b"".join(line_of(record) for record in _records(block, problems))
        try:
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ValueError(f"{self._path} cannot be written: {error}") from error
        self.finished.append(tuple(problems))

    def problems(self, data_set: str) -> list[EvaluatedProblem]:
        """The finished problems of a data set."""
        return [
            problem
            for block, problems in zip(self.blocks, self.finished)
            if block.data_set == data_set
            for problem in problems
        ]

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self._path} is being written by another evaluation") from None

    def _read_finished(self) -> list[tuple[EvaluatedProblem, ...]]:
        """The whole blocks in the file, which is cut off behind them."""
        self._file.seek(0)
        lines = enumerate(self._file, start=1)
        finished = []
        end = 0
        for block in self.blocks:
            read = self._read_block(block, lines)
            if read is None:
                break
            finished.append(read[0])
            end += read[1]
        else:
            if (surplus := next(lines, None)) is not None:
                raise ValueError(f"{self._path}:{surplus[0]}: more responses than the evaluation has")
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)
        return finished

    def _read_block(
        self, block: Block, lines: Iterator[tuple[int, bytes]]
    ) -> tuple[tuple[EvaluatedProblem, ...], int] | None:
        """A block's problems and its size in bytes; None where the file ends within it."""
        problems, size = [], 0
        for prompt in block.prompts:
            responses, text = [], ""
            for sample in range(self.num_samples):
                number, line = next(lines, (0, b""))
                if not line.endswith(b"\n"):
                    return None
                size += len(line)
                record = self._parsed(number, line, (block.data_set, prompt.problem.uid, sample))
                text = record.pop("prompt", text)
                responses.append(EvaluatedResponse(**record))
            problems.append(EvaluatedProblem(prompt.problem.uid, text, prompt.problem.ground_truth, tuple(responses)))
        return tuple(problems), size

    def _parsed(self, number: int, line: bytes, wanted: tuple[str, str, int]) -> dict[str, Any]:
        """The fields of a line's response, and its prompt if it has one."""
        where = f"{self._path}:{number}"
        try:
            record = json.loads(line)
            checksum = record.pop(CHECKSUM, None)
            wanted_line = line_of(record)
            found = tuple(record.pop(name) for name in ("data_set", "problem", "sample"))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{where}: not a response: {error!r}") from None
        if found != wanted:
            raise ValueError(f"{where} is the response {found}, but {wanted} belongs there")
        fields = EvaluatedResponse.__dataclass_fields__.keys()
        if record.keys() - {"prompt"} != fields:
            raise ValueError(f"{where} holds {sorted(record)}, but a response has {sorted(fields)}")
        if line != wanted_line:
            raise ValueError(f"{where} was changed: its {CHECKSUM} is {checksum!r}, which belongs to another line")
        return record


def line_of(record: Mapping[str, Any]) -> bytes:
    """A record with its checksum, as a line. Raises ValueError for NaN and infinities."""
    text = json.dumps(record, allow_nan=False)
    checksum = hashlib.sha256(text.encode()).hexdigest()[:CHECKSUM_DIGITS]
    return (json.dumps({**record, CHECKSUM: checksum}) + "\n").encode()


def _records(block: Block, problems: Sequence[EvaluatedProblem]) -> Iterator[dict[str, Any]]:
    for problem in problems:
        for sample, response in enumerate(problem.responses):
            prompt = {"prompt": problem.prompt} if sample == 0 else {}
            yield {"data_set": block.data_set, "problem": problem.uid, "sample": sample, **prompt, **asdict(response)}


def _check_settings(directory: Path, settings: Mapping[str, Any], *, has_responses: bool) -> None:
    """Compare with the settings there, or write them down where no response depends on any."""
    path = directory / SETTINGS_FILE
    wanted = json.loads(json.dumps(dict(settings)))
    if not has_responses:
        aside = path.with_name(f".{SETTINGS_FILE}.tmp")
        with aside.open("w", encoding="utf-8") as file:
            json.dump(wanted, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        return
    if not path.is_file():
        raise ValueError(f"{directory} holds responses, but no {SETTINGS_FILE} that says how they were drawn")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not an object of settings")
    names = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if names:
        shown = [f"{name} is {found.get(name)!r} there and {wanted.get(name)!r} here" for name in names[:NUM_SHOWN]]
        more = [f"{len(names) - NUM_SHOWN} more"] if len(names) > NUM_SHOWN else []
        raise ValueError(
            f"--output-dir {directory} holds an evaluation with other settings: {'; '.join(shown + more)}. Give "
            "another directory, or the same settings to go on with it"
        )
