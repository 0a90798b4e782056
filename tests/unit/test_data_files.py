"""Prompt files: what is read, what is refused and how the error names the place."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_fipo.data import make_sources
from megatron_fipo.data.build import eval_paths
from megatron_fipo.data_config import DataSettings
from megatron_fipo.types import Problem

ROWS = [{"prompt": f"Question {i}?", "label": str(i)} for i in range(7)]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: str, num_problems: int, seed: int = 1, **settings: Any) -> list[Problem]:
    source, _, _ = make_sources(DataSettings(prompt_data=path, **settings), seed)
    return [source.next_problem() for _ in range(num_problems)]


def test_jsonl_rows_become_problems_in_order(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", ROWS)
    assert read(path, 8, rollout_shuffle=False) == [
        *[Problem(f"train.jsonl:{i + 1}", f"Question {i}?", str(i)) for i in range(7)],
        Problem("train.jsonl:1@1", "Question 0?", "0"),
    ]


def test_every_epoch_is_a_new_permutation_made_from_seed_and_epoch(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", ROWS)
    problems = [problem.prompt for problem in read(path, 21)]
    epochs = [problems[:7], problems[7:14], problems[14:]]
    assert all(sorted(map(str, epoch)) == [row["prompt"] for row in ROWS] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [problem.prompt for problem in read(path, 21)] == problems
    assert [problem.prompt for problem in read(path, 21, seed=2)] != problems


def test_a_file_source_resumes_and_notices_a_changed_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", ROWS)
    problems = read(path, 30)
    source, _, _ = make_sources(DataSettings(prompt_data=path), seed=1)
    for _ in range(11):
        source.next_problem()
    saved = json.loads(json.dumps(source.state_dict()))
    resumed, _, _ = make_sources(DataSettings(prompt_data=path), seed=1)
    resumed.load_state_dict(saved)
    assert [resumed.next_problem() for _ in range(19)] == problems[11:]
    write_jsonl(tmp_path / "train.jsonl", [*ROWS[:-1], {"prompt": "Question 6?", "label": "7"}])
    changed, _, _ = make_sources(DataSettings(prompt_data=path), seed=1)
    with pytest.raises(ValueError, match="the saved data position belongs to"):
        changed.load_state_dict(saved)


def test_chat_messages_nested_labels_numbers_and_other_columns(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    row = {"prompt": messages, "reward_model": {"ground_truth": 2, "style": "rule"}, "extra_info": {"index": 9}}
    path = write_jsonl(tmp_path / "train.jsonl", [row])
    (problem,) = read(path, 1, label_key="reward_model.ground_truth")
    assert problem == Problem("train.jsonl:1", tuple(messages), "2", extra={"metadata": {"extra_info": {"index": 9}}})


def test_a_column_whose_name_has_dots_comes_before_a_descent(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "?", "a.b": "flat", "a": {"b": "deep"}}])
    (problem,) = read(path, 1, label_key="a.b")
    assert (problem.ground_truth, problem.extra) == ("flat", {"metadata": {"a": {"b": "deep"}}})


def test_blank_lines_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(ROWS[0])}\r\n\n  \n{json.dumps(ROWS[1])}".encode())
    problems = read(str(path), 2, rollout_shuffle=False)
    assert [(problem.uid, problem.prompt) for problem in problems] == [
        ("train.jsonl:1", "Question 0?"),
        ("train.jsonl:4", "Question 1?"),
    ]


def test_texts_are_kept_as_they_are_and_numbers_become_the_shortest_text(tmp_path: Path) -> None:
    odd = " \x00 <|im_end|> \u2028 \U0001f600 "
    labels = [odd, -7, 2.0, 0.5, 10**40, 1e300]
    path = write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"{odd}{i}", "label": x} for i, x in enumerate(labels)])
    problems = read(path, len(labels), rollout_shuffle=False)
    assert problems[0].prompt == f"{odd}0"
    assert [problem.ground_truth for problem in problems] == [odd, "-7", "2", "0.5", str(10**40), "1e+300"]


GOOD = json.dumps(ROWS[0]).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD * 16 + b'{"prompt": "x"\n', r"train\.jsonl, line 17: not JSON: "),
        (GOOD + b"[1, 2]\n", r"train\.jsonl, line 2: found \[1, 2\], wanted an object"),
        (GOOD + b'{"prompt": "\xff"}\n', r"train\.jsonl, line 2: not UTF-8"),
        (GOOD + b'{"question": "x", "label": "1"}', r"line 2: --input-key is 'prompt'.*columns: label, question"),
        (GOOD + b'{"prompt": "x"}', r"line 2: --label-key is 'label'.*columns: prompt"),
        (
            GOOD + b'{"prompt": "x", "label": null}',
            r"line 2: the ground truth 'label' is None, wanted text or a number",
        ),
        (GOOD + b'{"prompt": "x", "label": ["1"]}', r"line 2: the ground truth 'label' is \['1'\]"),
        (GOOD + b'{"prompt": "x", "label": true}', r"line 2: the ground truth 'label' is True"),
        (GOOD + b'{"prompt": "x", "label": NaN}', r"line 2: the ground truth 'label' is nan, wanted a finite number"),
        (
            GOOD + b'{"prompt": [{"role": "user", "content": " "}], "label": "1"}',
            r"line 2: the prompt 'prompt' is empty: no message says anything",
        ),
        (
            GOOD + b'{"prompt": [{"role": "a <|im_end|>", "content": "x"}], "label": "1"}',
            r"line 2: the prompt 'prompt' holds the role 'a <\|im_end\|>', wanted letters",
        ),
        (GOOD + b'{"prompt": " ", "label": "1"}', r"line 2: the prompt 'prompt' is empty"),
        (GOOD + b'{"prompt": [], "label": "1"}', r"line 2: the prompt 'prompt' is \[\]"),
        (GOOD + b'{"prompt": 5, "label": "1"}', r"line 2: the prompt 'prompt' is 5"),
        (GOOD + b'{"prompt": [{"role": "user"}], "label": "1"}', r"line 2: .*message \{'role': 'user'\}"),
        (GOOD + b'{"prompt": "\\ud800", "label": "1"}', r"line 2: 'prompt' holds a lone surrogate"),
        (GOOD + b"[" * 100_000, r"line 2: nested too deeply|line 2: not JSON"),
        (
            GOOD + b'{"prompt": "x", "label": ' + b"9" * 5000 + b"}",
            r"train\.jsonl, line 2: Exceeds the limit .* digits",
        ),
        (b"", r"--prompt-data is .*train\.jsonl', which holds no problem"),
        (b"\n\n", "holds no problem"),
    ],
)
def test_a_bad_file_is_an_error_that_names_the_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(str(path), 1)


def test_a_missing_step_of_a_dotted_key_shows_what_stands_there(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "x", "reward_model": {"style": "rule"}}])
    with pytest.raises(ValueError, match=r"line 1: --label-key is 'reward_model\.truth'.*before 'truth': style"):
        read(path, 1, label_key="reward_model.truth")


def test_missing_files_and_unknown_endings_name_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--prompt-data is .*nowhere\.jsonl', but no such file"):
        read(str(tmp_path / "nowhere.jsonl"), 1)
    (tmp_path / "data.csv").write_text("prompt,label\n")
    with pytest.raises(ValueError, match=r"must end in \.jsonl or \.parquet"):
        read(str(tmp_path / "data.csv"), 1)


def test_parquet_reads_like_jsonl(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"content": f"Question {i}?", "role": "user"}],
            "reward_model": {"ground_truth": str(i)},
            "when": datetime.date(2025, 1, 2),
        }
        for i in range(1500)
    ]
    path = str(tmp_path / "train.parquet")
    parquet.write_table(pa.Table.from_pylist(rows), path)
    problems = read(path, 1500, label_key="reward_model.ground_truth", rollout_shuffle=False)
    assert problems[1499] == Problem(
        "train.parquet:1500",
        ({"role": "user", "content": "Question 1499?"},),
        "1499",
        extra={"metadata": {"when": "2025-01-02"}},
    )
    with pytest.raises(ValueError, match=r"train\.parquet, row 1: --label-key is 'label'"):
        read(path, 1)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"train\.parquet: not readable as parquet"):
        read(str(tmp_path / "train.parquet"), 1)


def test_files_that_share_a_prompt_are_refused_however_it_is_written(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ROWS)
    as_message = {"prompt": [{"role": "user", "content": " Question  3? "}], "label": "3"}
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "Another?", "label": "1"}, as_message])
    with pytest.raises(ValueError, match=r"but 1 training problems .*: train\.jsonl:4 = eval\.jsonl:2: .*Question 3"):
        make_sources(DataSettings(prompt_data=train, eval_prompt_data=(held_out,)), seed=1)


def test_evaluation_problems_come_from_their_file_or_there_are_none(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ROWS)
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "Another?", "label": "1"}])
    _, problems, _ = make_sources(DataSettings(prompt_data=train, eval_prompt_data=(held_out,)), seed=1)
    assert problems == {"eval": [Problem("eval.jsonl:1", "Another?", "1")]}
    assert make_sources(DataSettings(prompt_data=train), seed=1)[1:] == ({}, ())
    with pytest.raises(ValueError, match=r"--eval-prompt-data is 'nowhere\.jsonl', but no such file exists"):
        make_sources(DataSettings(prompt_data=train, eval_prompt_data=("nowhere.jsonl",)), seed=1)


def test_several_evaluation_sets_have_their_given_names_or_their_files(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ROWS)
    first = write_jsonl(tmp_path / "aime-2024.jsonl", [{"prompt": "A?", "label": "1"}])
    second = write_jsonl(tmp_path / "x=y.jsonl", [{"prompt": "B?", "label": "2"}, {"prompt": "A?", "label": "1"}])
    _, held_out, _ = make_sources(DataSettings(prompt_data=train, eval_prompt_data=(first, f"AIME25={second}")), seed=1)
    assert {name: [problem.prompt for problem in problems] for name, problems in held_out.items()} == {
        "aime-2024": ["A?"],
        "AIME25": ["B?", "A?"],
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("a/m.jsonl", "b/m.parquet"), r"names 'm' twice, a/m\.jsonl and b/m\.parquet; give one of them another name"),
        (("m=a.jsonl", "m=b.jsonl"), "names 'm' twice"),
        (("a b.jsonl",), r"is 'a b\.jsonl', but must be NAME=PATH with a name of .* found the name 'a b'"),
        (("=a.jsonl",), "found the name ''"),
        (("score=a.jsonl",), "none of accuracy, response_length, score; found the name 'score'"),
        (("é=a.jsonl",), "found the name 'é'"),
        (("a" * 65 + "=b",), "found the name 'aaa"),
        (("m=",), "is 'm=', but must be NAME=PATH with a path"),
    ],
)
def test_bad_names_of_evaluation_sets_are_refused(values: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match="--eval-prompt-data .*" + message):
        eval_paths(values)


def test_a_name_stands_before_the_first_equals_sign_unless_that_is_in_a_path() -> None:
    assert eval_paths(("m=a=b.jsonl", "runs/k=1/n.jsonl", "data/set:test", "o=data/set:train", "p/q.v2")) == {
        "m": "a=b.jsonl",
        "n": "runs/k=1/n.jsonl",
        "set-test": "data/set:test",
        "o": "data/set:train",
        "q.v2": "p/q.v2",
    }
