"""The reward of the math-verify library: answers compared as mathematics (`1/2` is 0.5), not as text."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from megatron_fipo.types import RewardResult

FLOAT_DIGITS = 6  # decimals that two numbers share when one of them is no exact number
SWALLOWING_MODULES = (
    "math_verify.parser",
    "math_verify.grader",
    "latex2sympy2_extended.latex2sympy2",
    "latex2sympy2_extended.math_normalization",
)


def math_verify(response: str, ground_truth: str, **extra: Any) -> RewardResult:
    """1 if math-verify finds that the response's answer equals the ground truth, a LaTeX expression; else 0.

    Set up as in verl: the ground truth is read as the inside of \\boxed{}, the response's answer is its last LaTeX or
    plain expression, one in \\boxed{} or after "final answer is" or "answer" first. What math-verify can neither read
    nor prove equal is wrong; `answer` is the expression as text, without its LaTeX environment.

    The library's own time limits, which turn into wrong answers, are off: the grader process has one. Lost memory and
    recursion that is too deep, which the library takes for "not equal", are raised: MemoryError, RecursionError.
    Raises ValueError for a ground truth that it cannot read.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    with _without_silent_failures():
        wanted = parse(f"\\boxed{{{ground_truth}}}", (LatexExtractionConfig(),), parsing_timeout=None)
        if not wanted:
            raise ValueError(f"the ground truth {ground_truth[:80]!r} is nothing that math-verify can read")
        found = parse(response, (ExprExtractionConfig(), LatexExtractionConfig()), parsing_timeout=None)
        right = float(verify(wanted, found, float_rounding=FLOAT_DIGITS, timeout_seconds=None))
    return RewardResult(right, right, next((text for text in found if isinstance(text, str)), None))


def warm_up_math_verify() -> None:
    """Load and compile what the first verdict needs, which takes longer than many verdicts."""
    for answer in ("$x + 1$", "\\boxed{1.50}", "41"):
        math_verify(f"The final answer is {answer}", "1 + x")


class _Unswallowed(BaseException):
    """Carries an exception past `except Exception`."""


@contextlib.contextmanager
def _without_silent_failures() -> Iterator[None]:
    """Raise the MemoryError or RecursionError that math-verify's many `except Exception: pass` would swallow, and let
    numbers have any number of digits.

    A trace function watches the frames that swallow. When it cannot run itself for lack of either, Python removes it,
    which is seen at the end.
    """
    watched = [vars(sys.modules[name]) for name in SWALLOWING_MODULES]
    first, second, third, fourth = watched

    def trace(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        namespace = frame.f_globals  # compared by hand: this runs at every call of a Python function
        if namespace is second or namespace is first or namespace is third or namespace is fourth:
            frame.f_trace_lines = False
            return trace_exceptions
        return None

    def trace_exceptions(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "exception" and issubclass(argument[0], MemoryError | RecursionError):
            raise _Unswallowed(argument[0])
        return trace_exceptions

    trace_before, max_digits_before = sys.gettrace(), sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    sys.settrace(trace)
    try:
        yield
        lost: type[BaseException] | None = None if sys.gettrace() is trace else RecursionError
    except _Unswallowed as error:
        lost = error.args[0]
    finally:
        sys.settrace(trace_before)
        sys.set_int_max_str_digits(max_digits_before)
    if lost is not None:
        raise lost("in math-verify, which would have called the answer wrong")
