"""Evaluations as tables: the scores of a data set, a row per problem; in Markdown and JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fipo.metrics.scores import majority_votes
from megatron_fipo.trainer.evaluation_result import EvaluationResult, subset_sizes, summary

MAX_ANSWER_CHARACTERS = 60


@dataclass(frozen=True)
class ProblemRow:
    """One problem of an evaluation."""

    uid: str
    ground_truth: str
    accuracy: float
    majority_answer: str | None
    majority_share: float  # of all responses
    response_length: float  # mean, tokens
    truncated_fraction: float
    num_reward_errors: int


def problem_rows(result: EvaluationResult) -> list[ProblemRow]:
    """The per-problem table, in the order of the problems."""
    return [
        ProblemRow(
            uid=problem.uid,
            ground_truth=problem.ground_truth,
            accuracy=float(np.mean([response.accuracy for response in problem.responses])),
            majority_answer=vote.answer,
            majority_share=vote.share,
            response_length=float(np.mean([response.num_tokens for response in problem.responses])),
            truncated_fraction=float(np.mean([response.finish_reason == "length" for response in problem.responses])),
            num_reward_errors=sum(response.error is not None for response in problem.responses),
        )
        for problem, vote in zip(result.problems, majority_votes(result.answers), strict=True)
    ]


def result_as_json(result: EvaluationResult) -> dict[str, Any]:
    """Everything about a data set but the responses themselves, in JSON types."""
    return {
        "name": result.name,
        "num_problems": len(result.problems),
        "num_samples": result.num_samples,
        "metrics": result.scores,
        "problems": [asdict(row) for row in problem_rows(result)],
    }


def scores_markdown(results: Sequence[EvaluationResult]) -> str:
    """A table per data set: exact and bootstrap values at every k."""
    parts = []
    for result in results:
        n, found = result.num_samples, result.scores
        lines = [
            f"## {_text(result.name)}",
            "",
            f"{_count(len(result.problems), 'problem')}, {_count(n, 'response')} each; "
            f"**avg@{n} {found[f'avg@{n}']:.4f}**; "
            f"mean response {result.response_length:.1f} tokens, {result.truncated_fraction:.1%} cut off by the length "
            f"limit; mean score {result.score:.4f}; reward errors {len(result.errors)}.",
            "",
        ]
        if not result.has_votes:
            lines += ["The reward names no answers, so there is no majority and no cons@k.", ""]
        lines += [
            "| k | pass@k | bootstrap | cons@k | bootstrap |",
            "|---:|---:|---:|---:|---:|",
            *(
                f"| {k} | {_cell(found, f'pass@{k}')} | {_estimate(found, f'pass@{k}')} "
                f"| {_cell(found, f'cons@{k}')} | {_estimate(found, f'cons@{k}')} |"
                for k in subset_sizes(n)
            ),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def problems_markdown(result: EvaluationResult) -> str:
    """The per-problem table."""
    lines = [
        "| problem | ground truth | accuracy | majority answer | its share | mean tokens | cut off | reward errors |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in problem_rows(result):
        answer = "-" if row.majority_answer is None else _text(row.majority_answer)
        texts = [_text(row.uid), _text(row.ground_truth), f"{row.accuracy:.3f}", answer, f"{row.majority_share:.0%}"]
        numbers = [f"{row.response_length:.1f}", f"{row.truncated_fraction:.0%}", str(row.num_reward_errors)]
        lines.append(f"| {' | '.join([*texts, *numbers])} |")
    return "\n".join(lines) + "\n"


def write_problem_table(result: EvaluationResult, directory: str | Path, step: int) -> Path:
    """Write `directory/step_NNNNNN_NAME.md`, scores and per-problem table, and return its path.

    The directory is made where it is missing, and an earlier file replaced, in one go.
    """
    path = Path(directory) / f"step_{step:06d}_{file_name(result.name)}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"# Evaluation after {_count(step, 'step')}"
    _replace(path, f"{title}\n\n{scores_markdown([result])}\n{problems_markdown(result)}")
    return path


def write_results(
    directory: str | Path, title: str, settings: Mapping[str, Any], results: Sequence[EvaluationResult]
) -> tuple[Path, Path]:
    """Write results.json and results.md to `directory`, each in one go: settings, scores, and every problem."""
    means = summary(results)
    data = {
        "title": title,
        "summary": means,
        "data_sets": [result_as_json(result) for result in results],
        "settings": dict(settings),
    }
    lines = [f"# {title}", "", f"Accuracy, the mean over data sets of avg@k: **{means['accuracy']:.4f}**.", ""]
    text = "\n".join([*lines, scores_markdown(results)])
    for result in results:
        text += f"\n## Problems of {_text(result.name)}\n\n{problems_markdown(result)}"
    text += "\n## Settings\n\n"
    text += "".join(f"* {_text(name)}: `{json.dumps(value)}`\n" for name, value in settings.items())
    paths = Path(directory) / "results.json", Path(directory) / "results.md"
    _replace(paths[0], json.dumps(data, indent=1, allow_nan=False) + "\n")
    _replace(paths[1], text)
    return paths


def file_name(name: str) -> str:
    """A data set's name as part of a file's."""
    return re.sub(r"[^\w.-]", "_", name)[:100]


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(aside, path)


def _cell(found: dict[str, float], name: str) -> str:
    return f"{found[name]:.4f}" if name in found else "-"


def _estimate(found: dict[str, float], name: str) -> str:
    if f"{name}/bootstrap_mean" not in found:
        return "-"
    return f"{found[f'{name}/bootstrap_mean']:.4f} (std {found[f'{name}/bootstrap_std']:.4f})"


def _text(text: str) -> str:
    """What a model or a file says, as one cell of a table: nothing in it is markup."""
    line = " ".join(text.split())
    if len(line) > MAX_ANSWER_CHARACTERS:
        line = line[: MAX_ANSWER_CHARACTERS - 3] + "..."
    return re.sub(r"([\\|`*<>\[\]$~])", r"\\\1", line)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
