"""The reward of the math-verify library: answers compared as mathematics (`1/2` is 0.5), not as text."""

from __future__ import annotations

from typing import Any

from megatron_fipo.rewards.unsilenced import unsilenced
from megatron_fipo.types import RewardResult

FLOAT_DIGITS = 6  # decimals that two numbers share when one of them is no exact number
SILENCING_MODULES = frozenset(
    {
        "math_verify.parser",
        "math_verify.grader",
        "latex2sympy2_extended.latex2sympy2",
        "latex2sympy2_extended.math_normalization",
    }
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

    with unsilenced(SILENCING_MODULES):
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
