"""Evaluation with a fake engine: what is drawn, what is counted, what is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fipo.metrics.scores import pass_at_k
from megatron_fipo.trainer.evaluation import evaluate
from megatron_fipo.trainer.evaluation_report import (
    problem_rows,
    problems_markdown,
    result_as_json,
    scores_markdown,
    write_problem_table,
)
from megatron_fipo.trainer.evaluation_result import (
    EvaluatedProblem,
    EvaluatedResponse,
    EvaluationResult,
    Example,
    summary,
)
from megatron_fipo.trainer.generation import Grader, RewardFailed
from megatron_fipo.types import (
    Completion,
    GenerateRequest,
    GraderError,
    Problem,
    Prompt,
    RewardResult,
    SamplingSettings,
)

PROMPTS = [Prompt(Problem(f"p{i}", f"{i}?", str(i)), np.array([ord(str(i)), ord("?")])) for i in range(6)]
SAMPLING = SamplingSettings(max_response_len=5, temperature=1.0, top_p=0.7)


class CharacterTokenizer:
    chat_template = None
    bos_token = None
    added_tokens_decoder: Mapping[int, Any] = {}

    def encode(self, text: str, **options: Any) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        return "".join(chr(token) for token in token_ids if token)

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str:
        raise AssertionError("prompts come tokenised")


def generate(requests: Sequence[GenerateRequest]) -> list[Completion]:
    """Sample 0 repeats the question's digit and ends; every other says 0 and goes on to the limit."""
    completions = []
    for request in requests:
        if request.uid.endswith("/0"):
            ids, reason = [int(request.prompt_ids[0]), 0], "stop"
        else:
            ids, reason = [ord("0")] * request.sampling.max_response_len, "length"
        logprobs = np.zeros(len(ids), np.float32)
        completions.append(Completion(request.uid, np.array(ids), logprobs, reason, 0))  # type: ignore[arg-type]
    return completions[::-1]


def grade(responses: Sequence[str], truths: Sequence[str], _: Any) -> list[RewardResult | GraderError]:
    return [
        RewardResult(2.0 if response == truth else -1.0, float(response == truth), f" {response}\n")
        for response, truth in zip(responses, truths)
    ]


def fail_on_long(responses: Sequence[str], truths: Sequence[str], extras: Any) -> list[RewardResult | GraderError]:
    return [
        GraderError("timeout", "no verdict after 1 s") if len(response) > 1 else verdict
        for response, verdict in zip(responses, grade(responses, truths, extras))
    ]


def evaluated(grader: Grader = grade, n_samples: int = 2, prompts: Sequence[Prompt] = PROMPTS, **more: Any) -> Any:
    settings = {"sampling": SAMPLING, "seed": 3, "on_reward_error": "fail", **more}
    return evaluate("tiny", prompts, generate, CharacterTokenizer(), grader, n_samples=n_samples, **settings)


def result_of(table: Mapping[str, Sequence[tuple[str | None, float]]], name: str = "set") -> EvaluationResult:
    """A result from the answers and accuracies of each problem."""
    problems = tuple(
        EvaluatedProblem(
            uid,
            "?",
            "42",
            tuple(EvaluatedResponse("", 10, "stop", accuracy, accuracy, answer) for answer, accuracy in responses),
        )
        for uid, responses in table.items()
    )
    return EvaluationResult(name, problems, seed=1)


def test_every_response_counts_once_in_the_order_of_the_problems() -> None:
    result = evaluated()
    assert result.accuracies.tolist() == [[1.0, 0.0]] * 6
    assert result.answers[1] == ["1", "00000"]
    assert result.accuracy == 0.5
    assert result.score == 0.5
    assert result.response_length == 3.5
    assert result.truncated_fraction == 0.5
    assert result.examples == tuple(Example(f"p{i}/0", f"{i}?", str(i), str(i), 1.0) for i in range(4))
    assert summary([result]) == {
        "accuracy": 0.5,
        "score/mean": 0.5,
        "response_length/mean": 3.5,
        "response_length/truncated_fraction": 0.5,
        "num_reward_errors": 0.0,
    }


def test_metrics_hold_exact_and_bootstrap_scores_under_the_name_of_the_data_set() -> None:
    found = evaluated(n_samples=3).metrics()
    assert found["tiny/avg@3"] == pytest.approx(1 / 3)
    assert found["tiny/pass@1"] == pytest.approx(1 / 3)
    assert found["tiny/pass@2"] == pytest.approx(2 / 3)
    assert found["tiny/pass@3"] == 1.0
    assert found["tiny/pass@2/bootstrap_mean"] == pytest.approx(1 - (2 / 3) ** 2, abs=0.02)
    assert found["tiny/pass@3/bootstrap_mean"] == pytest.approx(1 - (2 / 3) ** 3, abs=0.02)
    assert found["tiny/cons@3"] == 0.0  # sample 0 is outvoted, in problem 0 too: 00000 is not 0
    assert found["tiny/cons@2"] == pytest.approx(1 / 3)  # two pairs of three tie
    assert found["tiny/num_reward_errors"] == 0.0
    assert found["tiny/response_length/truncated_fraction"] == pytest.approx(2 / 3)
    assert found["tiny/score/mean"] == pytest.approx(0.0)
    assert all(name.startswith("tiny/") for name in found)
    assert found == evaluated(n_samples=3).metrics(), "the bootstrap repeats itself"


def test_one_sample_per_problem_will_do() -> None:
    result = evaluated(n_samples=1, prompts=PROMPTS[:1])
    found = result.metrics()
    assert [found[f"tiny/{name}@1"] for name in ("avg", "cons", "pass")] == [1.0, 1.0, 1.0]
    assert not any("bootstrap" in name for name in found)
    assert result.line() == "tiny: accuracy 1.000 on 1 problems, mean response 2.0 tokens"


def test_two_evaluations_draw_with_the_same_seeds() -> None:
    asked: list[list[GenerateRequest]] = []

    def remember(requests: Sequence[GenerateRequest]) -> list[Completion]:
        asked.append(list(requests))
        return generate(requests)

    for seed, prompts in ((3, PROMPTS), (3, PROMPTS[::-1]), (4, PROMPTS)):
        evaluate(
            "tiny",
            prompts,
            remember,
            CharacterTokenizer(),
            grade,
            sampling=SAMPLING,
            n_samples=2,
            seed=seed,
            on_reward_error="fail",
        )
    first, second, other = ({request.uid: request.seed for request in requests} for requests in asked)
    assert first == second
    assert len({*first.values(), *other.values()}) == 24
    assert all(request.sampling == SAMPLING for requests in asked for request in requests)


def test_nothing_to_evaluate_on_and_a_failed_reward_are_errors() -> None:
    with pytest.raises(ValueError, match="nothing to evaluate on in 'tiny'"):
        evaluated(prompts=[])
    with pytest.raises(RewardFailed, match=r"problem p0 .*: timeout: no verdict after 1 s"):
        evaluated(fail_on_long)


def test_a_response_without_a_verdict_is_not_right_casts_no_vote_and_is_reported() -> None:
    result = evaluated(fail_on_long, n_samples=3, on_reward_error="drop")
    assert result.accuracies.tolist() == [[1.0, 0.0, 0.0]] * 6
    assert result.answers[2] == ["2", None, None]
    assert result.errors == ("timeout: no verdict after 1 s",) * 12
    assert result.score == 2.0  # of those with a verdict
    found = result.metrics()
    assert found["tiny/num_reward_errors"] == 12.0
    assert found["tiny/cons@3"] == 1.0
    assert found["tiny/pass@2"] == pytest.approx(pass_at_k(result.accuracies, 2))
    assert "WARNING: the reward gave no verdict on 12 responses" in result.line()
    assert summary([result, evaluated()])["num_reward_errors"] == 12.0


def test_a_reward_that_never_gives_a_verdict_is_an_error_whatever_is_asked() -> None:
    def never(responses: Sequence[str], *_: Any) -> list[RewardResult | GraderError]:
        return [GraderError("crash", "exit status 1") for _ in responses]

    with pytest.raises(RewardFailed, match=r"no verdict on any of the 12 responses of 'tiny'.*crash"):
        evaluated(never, on_reward_error="drop")


def test_a_reward_that_names_no_answers_has_no_consensus() -> None:
    right_but_nameless = result_of({"a": [(None, 1.0), (None, 0.0)]})
    assert not any("cons@" in name for name in right_but_nameless.metrics())
    assert "names no answers" in scores_markdown([right_but_nameless])
    wrong_and_answerless = result_of({"a": [(None, 0.0), (None, 0.0)]})
    assert wrong_and_answerless.metrics()["set/cons@2"] == 0.0


def test_data_sets_weigh_alike_in_the_summary() -> None:
    small, large = result_of({"a": [("42", 1.0)]}), result_of({f"b{i}": [("1", 0.0)] for i in range(9)})
    assert summary([small, large])["accuracy"] == 0.5


def test_the_table_has_a_row_per_problem() -> None:
    result = result_of({"a": [("42", 1.0), ("41", 0.0), ("42", 1.0), (None, 0.0)], "b": [(None, 0.0)] * 4})
    rows = problem_rows(result)
    assert [row.uid for row in rows] == ["a", "b"]
    assert (rows[0].accuracy, rows[0].majority_answer, rows[0].majority_share) == (0.5, "42", 0.5)
    assert (rows[1].accuracy, rows[1].majority_answer, rows[1].majority_share) == (0.0, None, 0.0)
    lines = problems_markdown(result).splitlines()
    assert lines[2] == "| a | 42 | 0.500 | 42 | 50% | 10.0 | 0% | 0 |"
    assert lines[3].startswith("| b | 42 | 0.000 | - |")
    assert json.loads(json.dumps(result_as_json(result)))["problems"][0]["majority_share"] == 0.5


def test_what_a_model_says_is_no_markup() -> None:
    result = result_of({"a|b": [("x|y\n\n# <b>" + "9" * 200, 0.0)]})
    table = problems_markdown(result)
    assert len(table.splitlines()) == 3
    row = table.splitlines()[2]
    assert row.replace("\\|", "").count("|") == 9
    assert "\\<b\\>" in row
    assert len(row) < 200


def test_problem_tables_go_to_a_file_per_step_and_data_set(tmp_path: Path) -> None:
    result = result_of({"a": [("42", 1.0), ("41", 0.0)]}, name="aime/24")
    for _ in range(2):
        path = write_problem_table(result, tmp_path / "evaluations", 5)
    assert path == tmp_path / "evaluations" / "step_000005_aime_24.md"
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Evaluation after 5 steps\n")
    assert "**avg@2 0.5000**" in text
    assert "| 2 | 1.0000 |" in text
    assert "| a | 42 | 0.500 | 42 | 50% |" in text
    surrogate = result_of({"a": [("\ud800", 0.0)]})
    assert "\\ud800" in write_problem_table(surrogate, tmp_path, 0).read_text(encoding="utf-8")
