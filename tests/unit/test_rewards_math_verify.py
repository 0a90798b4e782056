"""The math-verify reward: what is equal, what it reads, and that no failure inside the library becomes a label."""

from __future__ import annotations

import signal
import sys
from typing import Any

import pytest

from megatron_fipo.rewards import REWARDS
from megatron_fipo.types import RewardResult

math_verify = REWARDS["math_verify"]


@pytest.mark.parametrize(
    ("response", "ground_truth", "answer"),
    [
        ("The answer is \\boxed{42}.", "42", "42"),
        ("The answer is 42", "42", "42"),
        ("**Answer:** 42.", "42", "42"),
        ("so \\boxed{\\frac{1}{2}}", "0.5", "\\frac{1}{2}"),
        ("\\boxed{x^2+2x+1}", "(x+1)^2", "x^2+2x+1"),
        ("$\\{2, 1\\}$", "\\{1,2\\}", "\\{2, 1\\}"),
        ("It is 1,234 in all", "1234", "1234"),
        ("41 at first, then 42", "42", "42"),
        ("\\boxed{042}", "42", "042"),
        ("\\boxed{0.333333}", "\\frac13", "0.333333"),
        ("\\boxed{42}", "$42$", "42"),
        ("\\boxed{\\text{yes}}", "\\text{yes}", "\\text{yes}"),
    ],
)
def test_equal_mathematics_is_right(response: str, ground_truth: str, answer: str) -> None:
    assert math_verify(response, ground_truth, finish_reason="stop") == RewardResult(1.0, 1.0, answer)


@pytest.mark.parametrize(
    ("response", "ground_truth", "answer"),
    [
        ("\\boxed{43}", "42", "43"),
        ("", "42", None),
        ("I do not know.", "42", None),
        ("42 or rather \\boxed{43}", "42", "43"),
        ("\\boxed{x^2+2x+2}", "(x+1)^2", "x^2+2x+2"),
        ("\\boxed{1<x<2<3}", "1<x<2", "1<x<2<3"),
    ],
)
def test_anything_else_is_wrong(response: str, ground_truth: str, answer: str | None) -> None:
    assert math_verify(response, ground_truth) == RewardResult(0.0, 0.0, answer)


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
@pytest.mark.parametrize(
    ("place", "response"),
    [("math_verify.grader.simplify", "\\boxed{x-y+2z}"), ("math_verify.parser.latex2sympy", "\\boxed{x-y+3z}")],
)
def test_memory_and_recursion_that_the_library_swallows_are_raised(
    monkeypatch: pytest.MonkeyPatch, place: str, response: str, error: type[Exception]
) -> None:
    assert math_verify("\\boxed{y+z}", "z-x+5").accuracy == 0.0

    def fail(*arguments: Any, **options: Any) -> None:
        raise error("inside")

    monkeypatch.setattr(place, fail)
    with pytest.raises(error, match="would have called the answer wrong"):
        math_verify(response, "z-x+5")


def test_an_expression_too_deep_for_python_is_a_recursion_error() -> None:
    assert math_verify("1" + "+1" * 30, "31").accuracy == 1.0
    with pytest.raises(RecursionError):
        math_verify("1" + "+1" * 3000, "3001")


def test_numbers_may_have_many_digits() -> None:
    assert math_verify("\\boxed{" + "9" * 5000 + "}", "9" * 5000).accuracy == 1.0
    assert math_verify("9" * 5000, "9" * 4999).accuracy == 0.0


def test_the_interpreter_is_left_as_it_was() -> None:
    def handler(*_: Any) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGALRM, handler)
    try:
        state = (sys.gettrace(), sys.get_int_max_str_digits())
        math_verify("\\boxed{1}", "1")
        with pytest.raises(RecursionError):
            math_verify("1" + "+1" * 3000, "3001")
        assert (sys.gettrace(), sys.get_int_max_str_digits()) == state
        assert signal.getsignal(signal.SIGALRM) is handler
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("ground_truth", ["", " "])
def test_a_ground_truth_that_cannot_be_read_is_an_error(ground_truth: str) -> None:
    with pytest.raises(ValueError, match=r"the ground truth .* is nothing that math-verify can read"):
        math_verify("\\boxed{1}", ground_truth)
