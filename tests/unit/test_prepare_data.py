"""tools/prepare_data.py: what it prints and writes, and its exit status."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_fipo.data.files import read_problem_file

TOOL = Path(__file__).resolve().parents[2] / "tools" / "prepare_data.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the tool in this process: (exit status, stdout, stderr)."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        status = tool.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer of one token per word."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    directory = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(directory)
    return directory


def row(prompt: str, label: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "label": label, "data_source": "math", **more}


ROWS = [row("one two", "1"), row("one two three", "-2.5"), row("one two", "1"), row("four", "x^2"), row("five", "\\pi")]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_describe_counts_lengths_kinds_and_overlap(tmp_path: Path, run: Run, checkpoint: Path) -> None:
    train = write(tmp_path / "train.jsonl", ROWS)
    other = write(tmp_path / "other.parquet", [row(" four ", "x^2"), row("six", "6")])
    status, out, _ = run("describe", train, other)
    assert status == 0
    assert out.splitlines() == [
        str(train),
        "  rows 5, problems 4, repeated 1",
        "  prompt length in characters: mean 7.0, quantiles 0% 4, 25% 4, 50% 6, 75% 8, 95% 12, 100% 13",
        "  prompts: text 4",
        "  ground truths: integer 1, decimal number 1, text 1, LaTeX 1",
        "  data_source: math 4",
        str(other),
        "  rows 2, problems 2, repeated 0",
        "  prompt length in characters: mean 4.5, quantiles 0% 3, 25% 4, 50% 4, 75% 5, 95% 6, 100% 6",
        "  prompts: text 2",
        "  ground truths: text 1, integer 1",
        "  data_source: math 2",
        f"{train} and {other}: 1 questions in both, the first: train.jsonl:4 = other.parquet:1",
    ]
    _, out, _ = run("describe", train, "--hf-checkpoint", checkpoint, "--prompt-template", "Q: {prompt}")
    assert "prompt length in tokens: mean 2.8, quantiles 0% 2, 25% 2, 50% 2, 75% 3, 95% 4, 100% 4\n" in out


def test_check_names_rows_and_fails(tmp_path: Path, run: Run, checkpoint: Path) -> None:
    train = write(tmp_path / "train.jsonl", [*ROWS, row("five", "3"), row("six", " "), row("one " * 9, "9")])
    other = write(tmp_path / "other.jsonl", [row("four", "x^2")])
    status, out, _ = run("check", train, other, "--hf-checkpoint", checkpoint, "--rollout-max-prompt-len", 3)
    assert status == 1
    assert out.splitlines() == [
        f"{train}: lines 5 and 6: one question, different ground truths",
        f"{train}: line 7: the ground truth is empty",
        f"{train}: line 8: 9 tokens, --rollout-max-prompt-len is 3",
        "train.jsonl: 7 problems of 8 rows, 1 repeated",
        "other.jsonl: 1 problems, none repeated",
        f"{train} and {other}: train.jsonl:4 asks what other.jsonl:1 asks",
        "4 found",
    ]
    status, out, _ = run("check", other, "--hf-checkpoint", checkpoint)
    assert (status, out.splitlines()[-1]) == (0, "nothing found")


def test_what_cannot_be_read_is_one_line_and_a_status(tmp_path: Path, run: Run, checkpoint: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"\n')
    assert run("check", tmp_path / "bad.jsonl", "--hf-checkpoint", checkpoint)[::2] == (
        1,
        f"error: {tmp_path}/bad.jsonl, line 1: not JSON: Expecting ',' delimiter at column 15\n",
    )
    assert run("describe", tmp_path / "nowhere.parquet")[0] == 2
    assert run("describe", tmp_path / "bad.jsonl", "--hf-checkpoint", tmp_path)[::2] == (
        2,
        f"error: --hf-checkpoint is '{tmp_path}', which holds no tokenizer: tokenizer.json, tokenizer.model or "
        "vocab.json is wanted\n",
    )


@pytest.mark.parametrize("before", ["in.jsonl", "in.parquet"])
@pytest.mark.parametrize("after", ["out.jsonl", "out.parquet"])
def test_convert_writes_each_problem_once_with_its_columns(tmp_path: Path, run: Run, before: str, after: str) -> None:
    rows = [{**row, "extra_info": {"index": row["prompt"], "more": [1, None]}} for row in ROWS]
    rows += [
        row("twice", "1", extra_info={"index": "a", "more": []}),
        row("twice", "2", extra_info={"index": "b", "more": []}),
    ]
    source, out = write(tmp_path / before, rows), tmp_path / after
    without = write(tmp_path / "eval.jsonl", [row("four", "x^2")])
    status, _, said = run("convert", source, out, "--without", without)
    assert status == 0
    assert said.splitlines()[-2:] == [
        f"{before}: 1 problems are left out that {without} asks too",
        f"wrote 3 problems to {out}",
    ]
    assert f"{before}: 1 questions have more than one ground truth, their 2 problems are left out: " in said
    wanted = [rows[i] for i in (0, 1, 4)]
    if after == "out.jsonl":
        assert [json.loads(line) for line in out.read_text().splitlines()] == wanted
    else:
        assert parquet.read_table(out).to_pylist() == wanted
        if before == "in.parquet":
            assert parquet.read_schema(out) == parquet.read_schema(source)
    assert [problem.prompt for problem in read_problem_file("x", str(out)).problems] == [
        "one two",
        "one two three",
        "five",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([before, after, "eval.jsonl"])


def test_convert_refuses_what_it_cannot_do(tmp_path: Path, run: Run) -> None:
    source = write(tmp_path / "in.jsonl", [row("a", "1", x=1), row("b", "2", x="text")])
    assert "must end in .jsonl or .parquet" in run("convert", source, tmp_path / "out.csv")[2]
    status, _, said = run("convert", source, source)
    assert (status, "exists; give another name, or --overwrite" in said) == (2, True)
    status, _, said = run("convert", source, tmp_path / "out.parquet")
    assert (status, "the rows have no common parquet schema" in said) == (2, True)
    status, _, said = run("convert", source, tmp_path / "out.jsonl", "--without", source)
    assert (status, "no problem is left to write" in said) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_make_writes_a_task_and_what_it_holds_out(tmp_path: Path, run: Run) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.parquet"
    arguments = ["--num-problems", 30, "--eval-out", held_out, "--num-eval-problems", 4]
    assert run("make", "chain_sum", train, *arguments, "--task-args", '{"max_digits": 1, "max_terms": 2}')[0] == 0
    questions, held = (
        {problem.prompt[0]["content"] for problem in read_problem_file("x", str(path)).problems}  # type: ignore[index]
        for path in (train, held_out)
    )
    assert (len(questions), len(held), questions & held) == (30, 4, set())
    first = json.loads(train.read_text().splitlines()[0])
    assert first["data_source"] == "chain_sum"
    assert first["extra_info"]["index"] == 0
    status, _, said = run("make", "small_arithmetic", tmp_path / "x.jsonl", "--num-problems", 3)
    assert (status, "begins the answers itself" in said) == (2, True)
    status, _, said = run("make", "coin_flip", tmp_path / "x.jsonl", "--num-problems", 3, "--task-args", "{")
    assert (status, "--task-args is '{', which is not JSON" in said) == (2, True)


def test_make_writes_no_empty_file_and_none_over_another(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "train.jsonl"
    status, _, said = run("make", "coin_flip", out, "--num-problems", 0)
    assert (status, "--num-problems is 0, but must be >= 1" in said) == (2, True)
    same = tmp_path / "." / "train.jsonl"
    status, _, said = run("make", "coin_flip", out, "--num-problems", 3, "--eval-out", same)
    assert (status, "the file of the training problems" in said) == (2, True)
    assert not list(tmp_path.iterdir())
