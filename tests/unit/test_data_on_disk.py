"""Data sets that the library `datasets` wrote, and parquet files that are damaged."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_fipo.data import make_sources
from megatron_fipo.data.files import FileFormat, read_problem_file
from megatron_fipo.data_config import DataSettings
from megatron_fipo.types import Problem

ROWS = [
    {"prompt": [{"role": "user", "content": f"Question {i % 1100}?"}], "answer": {"value": i % 1100}, "n": i}
    for i in range(2500)
]
FORMAT = FileFormat(label_key="answer.value")


def problem(name: str, number: int) -> Problem:
    row = ROWS[number - 1]
    extra = {"metadata": {"n": row["n"]}}
    return Problem(f"{name}:{number}", tuple(row["prompt"]), str(row["answer"]["value"]), extra=extra)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `one` (a Dataset), `two` (a DatasetDict of two splits) and `single` (of one split)."""
    import datasets

    directory = tmp_path_factory.mktemp("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(directory / "one"))
    few = dataset.select(range(3, 6))
    datasets.DatasetDict({"train": few, "test": few.select([2, 0])}).save_to_disk(str(directory / "two"))
    datasets.DatasetDict({"only": few}).save_to_disk(str(directory / "single"))
    return directory


def test_a_dataset_on_disk_reads_like_a_file(on_disk: Path) -> None:
    found = read_problem_file("--prompt-data", str(on_disk / "one"), FORMAT)
    assert found.problems == [problem("one", number) for number in range(1, 1101)]
    assert found.note("extra_info.index") == "one: 1100 problems of 2500 rows, 1400 repeated"
    everything = FileFormat(label_key="answer.value", deduplicate=False)
    assert read_problem_file("x", str(on_disk / "one"), everything).problems[2499] == problem("one", 2500)


def test_a_split_is_named_or_the_only_one(on_disk: Path) -> None:
    def texts(path: str) -> list[Any]:
        return [(p.uid, p.prompt[0]["content"]) for p in read_problem_file("x", path, FORMAT).problems]  # type: ignore[index]

    assert texts(f"{on_disk}/two:test") == [("two:test:1", "Question 5?"), ("two:test:2", "Question 3?")]
    assert texts(f"{on_disk}/single") == [(f"single:{i}", f"Question {i + 2}?") for i in (1, 2, 3)]
    with pytest.raises(ValueError, match=r"two holds the splits test, train; name one: .*two:SPLIT"):
        texts(f"{on_disk}/two")
    with pytest.raises(ValueError, match=r"two has no split 'dev'; found: test, train"):
        texts(f"{on_disk}/two:dev")
    with pytest.raises(ValueError, match=r"one has no split 'test': it holds one dataset"):
        texts(f"{on_disk}/one:test")


def test_evaluation_splits_are_named_after_directory_and_split(on_disk: Path) -> None:
    settings = DataSettings(
        prompt_data=f"{on_disk}/single", eval_prompt_data=(f"{on_disk}/two:test",), label_key="answer.value"
    )
    with pytest.raises(ValueError, match=r"evaluation data set two-test must share no prompt, but 2 .* --without"):
        make_sources(settings, seed=1)


def test_other_and_damaged_directories_are_named(on_disk: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a directory, but holds no dataset that save_to_disk"):
        read_problem_file("x", str(tmp_path), FORMAT)
    for name, damage in (("state.json", b"{"), ("data-00000-of-00001.arrow", b"ARROW?"), ("state.json", b"[]")):
        damaged = tmp_path / f"damaged{len(damage)}"
        shutil.copytree(on_disk / "one", damaged, dirs_exist_ok=True)
        (damaged / name).write_bytes(damage)
        with pytest.raises(ValueError, match=r"damaged\d: not readable as a dataset on disk: \w+"):
            read_problem_file("x", str(damaged), FORMAT)


def test_without_the_library_the_error_says_what_to_install(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the library datasets, installed with: pip install datasets"):
        read_problem_file("x", str(on_disk / "one"), FORMAT)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("no column", [{"question": "x", "answer": {"value": 1}}]),
        ("no field", [{"prompt": "x", "answer": {"other": 1}}]),
        ("null prompt", [{"prompt": "x", "answer": {"value": 1}}, {"prompt": None, "answer": {"value": 1}}]),
        ("null truth", [{"prompt": "x", "answer": {"value": None}}, {"prompt": "y", "answer": {"value": 1}}]),
        ("prompt is a number", [{"prompt": 3, "answer": {"value": 1}}]),
        ("message without text", [{"prompt": [{"role": "user", "content": None}], "answer": {"value": 1}}]),
        ("bytes", [{"prompt": b"x", "answer": {"value": 1}}]),
        ("nothing", []),
    ],
)
def test_wrong_parquet_columns_are_named(tmp_path: Path, name: str, wrong: list[dict[str, Any]]) -> None:
    messages = {
        "no column": r"row 1: --input-key is 'prompt', but there is no such value; found columns: answer, question",
        "no field": r"row 1: --label-key is 'answer\.value', .* found what stands there before 'value': other",
        "null prompt": r"row 2: the prompt 'prompt' is None, wanted text or a list",
        "null truth": r"row 1: the ground truth 'answer\.value' is None",
        "prompt is a number": r"row 1: the prompt 'prompt' is 3",
        "message without text": r"row 1: .* holds the message .*'content': None",
        "bytes": r"row 1: the prompt 'prompt' is b'x'",
        "nothing": r"which holds no problem",
    }
    path = tmp_path / "train.parquet"
    parquet.write_table(pa.Table.from_pylist(wrong), path)
    with pytest.raises(ValueError, match=messages[name]):
        read_problem_file("--prompt-data", str(path), FORMAT)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "middle"])
def test_a_damaged_parquet_file_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "train.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path, compression="zstd", row_group_size=500)
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[: len(content) // 2],
            "text": b'{"prompt": "x"}\n',
            "middle": content[:4] + b"\xff" * 2000 + content[2004:],
        }[damage]
    )
    with pytest.raises(ValueError, match=r"train\.parquet: (not readable as parquet|damaged, not readable to its end)"):
        read_problem_file("--prompt-data", str(path), FORMAT)
