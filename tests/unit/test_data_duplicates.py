"""Repeated rows of prompt files: taken once and counted, whatever the format; contradictions are never silent."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_fipo.data import make_sources
from megatron_fipo.data.files import FileFormat, ProblemFile, read_problem_file
from megatron_fipo.data.tables import first_rows, open_parquet
from megatron_fipo.data_config import DataSettings

DAPO = FileFormat(label_key="reward_model.ground_truth")


def dapo_row(index: Any, question: str, truth: str, source: str = "math_dapo") -> dict[str, Any]:
    """A row with the columns of DAPO-Math-17k and AIME as published."""
    return {
        "data_source": source,
        "prompt": [{"content": f"Solve it.\n\n{question}\n\nEnd with Answer: $Answer", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": truth, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: str, file_format: FileFormat = DAPO) -> ProblemFile:
    return read_problem_file("--prompt-data", path, file_format)


@pytest.fixture(params=["jsonl", "parquet"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[list[dict[str, Any]]], str]:
    """Writes rows as a file of either format; both are read alike."""
    return lambda rows: write(tmp_path / f"train.{request.param}", rows)


Written = Callable[[list[dict[str, Any]]], str]


def test_a_file_that_repeats_its_rows_is_taken_once_with_a_count(written: Written) -> None:
    rows = [dapo_row(f"id-{i}", f"Question {i}?", str(i % 5)) for i in range(23)] * 10
    random.Random(1).shuffle(rows)
    path = written(rows)
    found = read(path)
    assert (found.num_rows, len(found.kept), found.num_repeated) == (230, 23, 207)
    first = {row["extra_info"]["index"]: number for number, row in reversed(list(enumerate(rows, start=1)))}
    assert [kept.number for kept in found.kept] == sorted(first.values())
    for kept in found.kept:
        row = rows[kept.number - 1]
        assert kept.problem.uid == f"{Path(path).name}:{kept.number}"
        assert (kept.problem.prompt, kept.problem.ground_truth) == (
            tuple(row["prompt"]),
            row["reward_model"]["ground_truth"],
        )
        assert kept.problem.extra["metadata"]["extra_info"] == row["extra_info"]
    settings = DataSettings(prompt_data=path, label_key="reward_model.ground_truth")
    assert make_sources(settings, seed=1)[2] == (f"{Path(path).name}: 23 problems of 230 rows, 207 repeated",)


def test_without_deduplication_every_row_counts(written: Written) -> None:
    path = written([dapo_row("a", "Question?", "1")] * 3)
    found = read(path, FileFormat(label_key=DAPO.label_key, deduplicate=False))
    assert [kept.number for kept in found.kept] == [1, 2, 3]
    assert found.note("extra_info.index") is None


def test_equal_question_and_truth_are_one_problem_under_any_index_or_none(written: Written) -> None:
    rows = [dapo_row(i, f"Question {i % 3}?", str(i % 3)) for i in range(96)]
    found = read(written(rows))
    assert [kept.number for kept in found.kept] == [1, 2, 3]
    assert found.num_same_problem_other_key == 93
    assert found.note("extra_info.index") == (
        f"{found.name}: 3 problems of 96 rows, 93 repeated; 93 values of extra_info.index ask what another one asks"
    )
    without_index = [{**row, "extra_info": {"index": None, "n": i}} for i, row in enumerate(rows)]
    assert len(read(written(without_index)).kept) == 3
    without_column = [{k: v for k, v in row.items() if k != "extra_info"} for row in rows]
    assert read(written(without_column)).note("extra_info.index") == f"{found.name}: 3 problems of 96 rows, 93 repeated"


def test_white_space_does_not_make_a_question_another_one(written: Written) -> None:
    found = read(written([dapo_row("a", "1 + 1?", "2"), dapo_row("b", " 1  +\n1? ", " 2 ")]))
    assert [kept.number for kept in found.kept] == [1]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (dapo_row("same", "Other?", "1"), "rows? 1 and 3 share extra_info.index 'same' but ask different questions"),
        (dapo_row("same", "Question?", "2"), "1 and 3 share extra_info.index 'same' but want different ground truths"),
    ],
)
def test_an_index_with_two_contents_is_an_error_that_names_both_rows(
    written: Written, second: dict[str, Any], message: str
) -> None:
    path = written([dapo_row("same", "Question?", "1"), dapo_row("x", "X?", "1"), second])
    with pytest.raises(ValueError, match=message.replace("rows?", "(rows|lines)") + r"\. .*--dedup-key"):
        read(path)


def test_an_index_that_counts_per_data_source_is_no_contradiction(written: Written) -> None:
    path = written([dapo_row(0, "A?", "1", "gsm8k"), dapo_row(0, "B?", "1", "math"), dapo_row(0, "A?", "1", "gsm8k")])
    assert [kept.number for kept in read(path).kept] == [1, 2]


def test_an_empty_key_compares_contents_only(written: Written) -> None:
    path = written([dapo_row(0, "A?", "1"), dapo_row(0, "B?", "1"), dapo_row(1, "A?", "1")])
    found = read(path, FileFormat(label_key=DAPO.label_key, dedup_key=""))
    assert [kept.number for kept in found.kept] == [1, 2]


def test_another_key_is_followed_and_must_exist(written: Written) -> None:
    path = written([{**dapo_row(i, f"Q{i}?", "1"), "id": "same" if i else "x"} for i in range(3)])
    with pytest.raises(ValueError, match=r"2 and 3 share id 'same' but ask different questions"):
        read(path, FileFormat(label_key=DAPO.label_key, dedup_key="id"))
    settings = DataSettings(prompt_data=path, label_key=DAPO.label_key, dedup_key="nothing.there")
    with pytest.raises(ValueError, match=r"--dedup-key is 'nothing\.there', but no row of --prompt-data .* has such"):
        make_sources(settings, seed=1)


def test_a_question_with_two_ground_truths_is_not_trained_on_and_said(written: Written) -> None:
    rows = [dapo_row("a", "A?", "1"), dapo_row("b", "B?", "1"), dapo_row("c", "A?", "2"), dapo_row("a", "A?", "1")]
    path = written(rows)
    source, _, notes = make_sources(DataSettings(prompt_data=path, label_key=DAPO.label_key), seed=1)
    assert {source.next_problem().uid.partition("@")[0] for _ in range(5)} == {f"{Path(path).name}:2"}
    assert notes[0] == f"{Path(path).name}: 3 problems of 4 rows, 1 repeated"
    assert "1 questions have more than one ground truth, their 2 problems are left out: " in notes[1]
    assert "s 1 and 3" in notes[1]
    with pytest.raises(ValueError, match=r"holds no problem to train on: .* more than one ground truth"):
        make_sources(DataSettings(prompt_data=written([rows[0], rows[2]]), label_key=DAPO.label_key), seed=1)


def test_a_benchmark_with_two_ground_truths_is_an_error_that_names_the_rows(tmp_path: Path) -> None:
    train = write(tmp_path / "train.parquet", [dapo_row("z", "Z?", "1")])
    aime = write(tmp_path / "aime.parquet", [dapo_row(i, f"{'AB'[i % 2]}?", str(i // 2)) for i in range(4)])
    settings = DataSettings(prompt_data=train, eval_prompt_data=(aime,), label_key=DAPO.label_key)
    with pytest.raises(ValueError, match=r"--eval-prompt-data .*: 2 questions .*: rows 1 and 3; rows 2 and 4$"):
        make_sources(settings, seed=1)


def test_aime_repeated_32_times_is_thirty_problems_in_the_order_of_the_file(tmp_path: Path) -> None:
    train = write(tmp_path / "train.parquet", [dapo_row("z", "Z?", "1")])
    rows = [dapo_row(i, f"Problem {i % 30}?", str(i % 30)) for i in range(960)]
    aime = write(tmp_path / "aime-2024.parquet", rows)
    settings = DataSettings(prompt_data=train, eval_prompt_data=(aime,), label_key=DAPO.label_key)
    _, held_out, notes = make_sources(settings, seed=1)
    assert [problem.uid for problem in held_out["aime-2024"]] == [f"aime-2024.parquet:{i}" for i in range(1, 31)]
    assert notes[0].startswith("aime-2024.parquet: 30 problems of 960 rows, 930 repeated")


ODD_COLUMNS = {
    "integers": (pa.array([-1, -2, -1, None, 0, None]), [0, 1, 3, 4]),
    "numbers": (pa.array([0.5, 1.5, 0.5, None, 2.0, 2.0]), [0, 1, 3, 4]),
    "texts": (pa.array(["None", None, "", "None", "", "x" * 500]), [0, 1, 2, 5]),
    "large texts": (pa.array(["a", "b", "a", "b", "c", "a"], pa.large_string()), [0, 1, 4]),
    "dictionaries": (pa.array(["a", "b", "a", "b", "c", None]).dictionary_encode(), [0, 1, 4, 5]),
    "lists": (pa.array([["a"], ["a", "b"], [], None, ["b", "a"], ["a", "b"]]), [0, 1, 2, 3, 4]),
    "objects": (pa.array([{"a": 1}, {"a": 2}, {"a": None}, None, {"a": 1}, {"a": None}]), [0, 1, 2, 3]),
    "decimals": (pa.array([1, 2, 1, 3, 2, 1], pa.int64()).cast(pa.decimal128(20)), [0, 1, 3]),
    "nested lists": (pa.array([[[1], [2]], [[1, 2]], [[1], [2]], [[], [1, 2]], [None, [1, 2]], None]), [0, 1, 3, 4, 5]),
}


@pytest.mark.parametrize("kind", ODD_COLUMNS)
def test_rows_differ_exactly_when_their_values_do(tmp_path: Path, kind: str) -> None:
    column, first = ODD_COLUMNS[kind]
    parquet.write_table(pa.table({"x": column}), tmp_path / "x.parquet")
    assert first_rows(open_parquet(tmp_path / "x.parquet"), ["x", "not there"]) == first


def test_first_rows_are_those_of_a_plain_comparison(tmp_path: Path) -> None:
    draw = random.Random(3)
    rows = [
        {"p": [{"role": draw.choice("ab"), "content": draw.choice("xyz")} for _ in range(draw.randint(0, 3))],
         "k": draw.choice([None, 1, 2]), "t": draw.choice(["", "1"])}
        for _ in range(3000)
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=501)
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        seen.setdefault(json.dumps(row), number)
    assert first_rows(open_parquet(tmp_path / "x.parquet"), ["t", "p", "k"]) == sorted(seen.values())
