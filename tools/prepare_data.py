"""Makes, checks and describes prompt files.

    python tools/prepare_data.py describe FILE... [--hf-checkpoint DIR]
    python tools/prepare_data.py check FILE... --hf-checkpoint DIR [--rollout-max-prompt-len N]
    python tools/prepare_data.py convert FILE OUT [--without FILE ...]
    python tools/prepare_data.py make TASK OUT --num-problems N [--eval-out OUT] [--task-args JSON]

A FILE is a .jsonl or .parquet file, or a directory that save_to_disk of the library datasets wrote (DIRECTORY:SPLIT
when it holds several splits). The options about columns are those of a training run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fipo.config import require
from megatron_fipo.data import make_sources
from megatron_fipo.data.build import rows_shown, without_contradictions
from megatron_fipo.data.files import FileFormat, ProblemFile, read_problem_file
from megatron_fipo.data.prompts import PromptEncoder, PromptFormat
from megatron_fipo.data.source import question_key
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.data.write import write_objects, write_rows
from megatron_fipo.data_config import HELP, DataSettings
from megatron_fipo.types import Problem

DEFAULTS = DataSettings(prompt_data="-")
QUANTILES = (0, 0.25, 0.5, 0.75, 0.95, 1)
NUM_SHOWN = 20  # rows named by check
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 when `check` found something, 2 for an error (one line on stderr)."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.command(args))
    except (ValueError, OSError) as error:
        _say(f"error: {error}")
        return 1 if args.command is check else 2


def describe(args: argparse.Namespace) -> int:
    """Print what each file holds, and how many questions each pair of files shares."""
    encoder = _encoder(args)
    files = [_read(path, args) for path in args.files]
    for found in files:
        problems = found.problems
        print(f"{found.path}\n  rows {found.num_rows}, problems {len(problems)}, repeated {found.num_repeated}")
        if found.num_same_problem_other_key:
            print(f"  values of {args.dedup_key} that ask what another one asks: {found.num_same_problem_other_key}")
        if found.contradictions:
            print(f"  questions with more than one ground truth: {len(found.contradictions)} ({rows_shown(found)})")
        lengths = _lengths(found.name, problems, encoder)
        unit = "characters" if encoder is None else "tokens"
        quantiles = ", ".join(f"{q:.0%} {value:.0f}" for q, value in zip(QUANTILES, np.quantile(lengths, QUANTILES)))
        print(f"  prompt length in {unit}: mean {np.mean(lengths):.1f}, quantiles {quantiles}")
        print(f"  prompts: {_counts(_prompt_kind(problem) for problem in problems)}")
        print(f"  ground truths: {_counts(_truth_kind(problem.ground_truth) for problem in problems)}")
        sources = [problem.extra.get("metadata", {}).get("data_source") for problem in problems]
        if any(source is not None for source in sources):
            print(f"  data_source: {_counts(map(str, sources))}")
    for left, right in itertools.combinations(files, 2):
        shared = _shared(left.problems, right.problems)
        first = f", the first: {shared[0][0].uid} = {shared[0][1].uid}" if shared else ""
        print(f"{left.path} and {right.path}: {len(shared)} questions in both{first}")
    return 0


def check(args: argparse.Namespace) -> int:
    """Name the rows that a run would refuse, leave out or cut. 1 when there are any."""
    encoder = _encoder(args)
    assert encoder is not None, "--hf-checkpoint is required"
    num_wrong = 0
    files = []
    for path in args.files:
        found = _read(path, args)
        files.append(found)
        lines = [
            f"{found.path}: {found.place}s {' and '.join(map(str, rows))}: one question, different ground truths"
            for rows in found.contradictions
        ]
        lines += [
            f"{found.path}: {found.place} {kept.number}: the ground truth is empty"
            for kept in found.kept
            if not kept.problem.ground_truth.strip()
        ]
        limit = args.rollout_max_prompt_len
        lines += [
            f"{found.path}: {found.place} {kept.number}: {length} tokens, --rollout-max-prompt-len is {limit}"
            for kept, length in zip(found.kept, _lengths(found.name, found.problems, encoder))
            if limit is not None and length > limit
        ]
        for line in lines[:NUM_SHOWN]:
            print(line)
        if len(lines) > NUM_SHOWN:
            print(f"{found.path}: and {len(lines) - NUM_SHOWN} more")
        print(found.note(args.dedup_key) or f"{found.name}: {len(found.kept)} problems, none repeated")
        num_wrong += len(lines)
    for left, right in itertools.combinations(files, 2):
        for one, other in _shared(left.problems, right.problems):
            print(f"{left.path} and {right.path}: {one.uid} asks what {other.uid} asks")
            num_wrong += 1
    print("nothing found" if num_wrong == 0 else f"{num_wrong} found")
    return 0 if num_wrong == 0 else 1


def convert(args: argparse.Namespace) -> int:
    """Write a file's problems, once each, with all their columns."""
    out = _output(args.out, args)
    found = _read(args.file, args)
    kept_problems, note = without_contradictions(found)
    for line in (found.note(args.dedup_key), note):
        if line is not None:
            _say(line)
    kept_uids = {problem.uid for problem in kept_problems}
    for other_path in args.without:
        shared = _shared(kept_problems, _read(other_path, args).problems)
        _say(f"{found.name}: {len(shared)} problems are left out that {other_path} asks too")
        kept_uids -= {problem.uid for problem, _ in shared}
    numbers = [kept.number for kept in found.kept if kept.problem.uid in kept_uids]
    if not numbers:
        raise ValueError(f"{args.file}: no problem is left to write")
    with _Progress("writing") as progress:
        write_rows(args.file, numbers, out, progress)
    _say(f"wrote {len(numbers)} problems to {out}")
    return 0


def make(args: argparse.Namespace) -> int:
    """Write training problems of a seeded task, and with --eval-out its held-out ones, which share no question."""
    out = _output(args.out, args)
    eval_out = None if args.eval_out is None else _output(args.eval_out, args)
    require(args.num_problems >= 1, "--num-problems", args.num_problems, ">= 1")
    if eval_out is not None and eval_out.resolve() == out.resolve():
        raise ValueError(f"--eval-out is {args.eval_out!r}, the file of the training problems; give another one")
    try:
        task_args = json.loads(args.task_args)
    except json.JSONDecodeError as error:
        raise ValueError(f"--task-args is {args.task_args!r}, which is not JSON: {error}") from error
    settings = DataSettings(task=args.task, task_args=task_args, num_eval_problems=args.num_eval_problems)
    source, held_out, _ = make_sources(settings, args.seed)
    found: dict[str, Problem] = {}
    drawn = 0
    with _Progress("making") as progress:
        while len(found) < args.num_problems:
            problem = source.next_problem()
            found.setdefault(question_key(problem), problem)
            drawn += 1
            progress(len(found), args.num_problems)
            if drawn > 20 * args.num_problems + 1000:
                raise ValueError(
                    f"--num-problems is {args.num_problems}, but {drawn} of {args.task} hold only {len(found)}"
                )
    for path, problems in ((out, list(found.values())), (eval_out, held_out[args.task])):
        if path is not None:
            write_objects([_row(args.task, i, problem) for i, problem in enumerate(problems)], path)
            _say(f"wrote {len(problems)} problems to {path}")
    return 0


def _row(task: str, index: int, problem: Problem) -> dict[str, Any]:
    if problem.response_prefix:
        raise ValueError(f"the task {task} begins the answers itself, which a prompt file cannot; use it with --task")
    return {
        "data_source": task,
        "prompt": list(_messages(problem)),
        "label": problem.ground_truth,
        "extra_info": {"index": index, "uid": problem.uid},
    }


def _messages(problem: Problem) -> Iterator[dict[str, str]]:
    if isinstance(problem.prompt, str):
        yield {"role": "user", "content": problem.prompt}
    else:
        yield from (dict(message) for message in problem.prompt)


def _read(path: str, args: argparse.Namespace) -> ProblemFile:
    file_format = FileFormat(args.input_key, args.label_key, args.deduplicate, args.dedup_key)
    with _Progress(f"reading {path}") as progress:
        return read_problem_file("the file", path, file_format, progress)


def _encoder(args: argparse.Namespace) -> PromptEncoder | None:
    if args.hf_checkpoint is None:
        return None
    return PromptEncoder(
        load_tokenizer(args.hf_checkpoint),
        PromptFormat(args.apply_chat_template, args.prompt_template, args.system_prompt),
    )


def _lengths(name: str, problems: Sequence[Problem], encoder: PromptEncoder | None) -> list[int]:
    """Tokens of each prompt, or characters when there is no tokenizer."""
    if encoder is None:
        return [
            len(p.prompt) if isinstance(p.prompt, str) else sum(len(m["content"]) for m in p.prompt) for p in problems
        ]
    lengths = []
    with _Progress(f"tokenizing {name}") as progress:
        for i, problem in enumerate(problems):
            lengths.append(len(encoder.encode(problem)))
            progress(i + 1, len(problems))
    return lengths


def _shared(left: Sequence[Problem], right: Sequence[Problem]) -> list[tuple[Problem, Problem]]:
    of_question = {question_key(problem): problem for problem in right}
    return [(problem, of_question[key]) for problem in left if (key := question_key(problem)) in of_question]


def _prompt_kind(problem: Problem) -> str:
    return "text" if isinstance(problem.prompt, str) else "messages " + "+".join(m["role"] for m in problem.prompt)


def _truth_kind(truth: str) -> str:
    text = truth.strip()
    if not text:
        return "empty"
    if NUMBER.fullmatch(text):
        return "decimal number" if "." in text else "integer"
    return "LaTeX" if "\\" in text else "text"


def _counts(kinds: Iterator[str] | Any) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in Counter(kinds).most_common(10))


def _output(path: str, args: argparse.Namespace) -> Path:
    if Path(path).suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path} must end in .jsonl or .parquet")
    if Path(path).exists() and not args.overwrite:
        raise ValueError(f"{path} exists; give another name, or --overwrite")
    return Path(path)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


class _Progress:
    """A line on stderr that is rewritten twice a second on a terminal, and said every ten seconds elsewhere."""

    def __init__(self, what: str) -> None:
        self._what, self._said = what, False
        self._last = time.monotonic()
        self._interval_s = 0.5 if sys.stderr.isatty() else 10.0

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last < self._interval_s:
            return
        self._last, self._said = time.monotonic(), True
        line = f"{self._what}: {done / max(total, 1):.0%}"
        print(f"\r{line}" if sys.stderr.isatty() else line, end="" if sys.stderr.isatty() else "\n", file=sys.stderr)

    def __enter__(self) -> Callable[[int, int], None]:
        return self

    def __exit__(self, *_: object) -> None:
        if self._said and sys.stderr.isatty():
            _say("")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="describe|check|convert|make")
    columns = argparse.ArgumentParser(add_help=False)
    for name in ("input_key", "label_key", "dedup_key"):
        shown = f"{HELP[name]} (default: %(default)s)"
        columns.add_argument(f"--{name.replace('_', '-')}", default=getattr(DEFAULTS, name), metavar="KEY", help=shown)
    columns.add_argument(
        "--deduplicate", action=argparse.BooleanOptionalAction, default=True, help=f"{HELP['deduplicate']} (default)"
    )
    tokens = argparse.ArgumentParser(add_help=False)
    tokens.add_argument("--apply-chat-template", action="store_true", help=HELP["apply_chat_template"])
    tokens.add_argument("--prompt-template", default=None, metavar="TEXT", help=HELP["prompt_template"])
    tokens.add_argument("--system-prompt", default=None, metavar="TEXT", help=HELP["system_prompt"])

    command = commands.add_parser("describe", parents=[columns, tokens], help="what files hold", allow_abbrev=False)
    command.add_argument("files", nargs="+", metavar="FILE")
    command.add_argument("--hf-checkpoint", default=None, metavar="DIR", help="measure prompts in its tokens")
    command.set_defaults(command=describe)
    command = commands.add_parser(
        "check", parents=[columns, tokens], help="what a run would refuse", allow_abbrev=False
    )
    command.add_argument("files", nargs="+", metavar="FILE")
    command.add_argument("--hf-checkpoint", required=True, metavar="DIR", help="the tokenizer")
    command.add_argument(
        "--rollout-max-prompt-len",
        type=int,
        metavar="N",
        help="name longer prompts; without it length is not looked at",
    )
    command.set_defaults(command=check)
    command = commands.add_parser("convert", parents=[columns], help="a file without repeated rows", allow_abbrev=False)
    command.add_argument("file", metavar="FILE")
    command.add_argument("--without", nargs="+", default=[], metavar="FILE", help="leave out what these files ask")
    command.add_argument("out", metavar="OUT", help="a .jsonl or .parquet file")
    command.add_argument("--overwrite", action="store_true", help="replace OUT")
    command.set_defaults(command=convert)
    command = commands.add_parser("make", help="a seeded task's problems", allow_abbrev=False)
    command.add_argument("task", metavar="TASK", help="a data set of reasoning-gym, such as chain_sum")
    command.add_argument("out", metavar="OUT", help="a .jsonl or .parquet file")
    command.add_argument("--overwrite", action="store_true", help="replace OUT")
    command.add_argument("--num-problems", type=int, required=True, metavar="N", help="problems to write to OUT")
    command.add_argument("--seed", type=int, default=1, help="of OUT's problems (default: %(default)s)")
    command.add_argument("--task-args", default="{}", help="the task's parameters as JSON")
    command.add_argument("--eval-out", default=None, metavar="OUT", help="the held-out problems")
    command.add_argument(
        "--num-eval-problems",
        type=int,
        default=DEFAULTS.num_eval_problems,
        metavar="N",
        help="problems held out of OUT (default: %(default)s)",
    )
    command.set_defaults(command=make)
    return parser


if __name__ == "__main__":
    sys.exit(main())
