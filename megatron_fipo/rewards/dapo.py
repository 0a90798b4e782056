"""The rule reward of DAPO (arXiv 2503.14476) for competition mathematics: a final line `Answer: ...`, compared as text.

The normalisation is Minerva's (arXiv 2206.14858, appendix D.1). Runs are compared by this rule, so it is kept to the
letter, its false negatives too: `**Answer:** 42` and `42.` are wrong for 42.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_fipo.types import RewardResult

NUM_TAIL_CHARACTERS = 300
ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")

REPLACEMENTS = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
# In this order, each wherever it occurs: the order decides what is left of words that overlap.
UNITS = (
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}",
)  # fmt: skip
MARKUP = (
    "\\text{\ns}",
    "\\text{}^2",
    "\\text{}^3",
    "\\text{\n}",
    "\\text{}",
    r"\mathrm{th}",
    r"^\circ",
    r"^{\circ}",
    r"\;",
    r",\!",
    "{,}",
    '"',
    "\\dots",
)
PATTERNS = (
    (re.compile(r"(.*?)(\$)(.*?)(\$)(.*)"), r"$\3$"),  # the first $...$ only
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),  # \frac12
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),  # \sqrt2
)


def dapo_math(response: str, ground_truth: str, **extra: Any) -> RewardResult:
    """+1 if the last `Answer:` line in the response's last 300 characters equals the ground truth, both normalised;
    else -1. Accuracy is 1 or 0."""
    matches = ANSWER_LINE.findall(response[-NUM_TAIL_CHARACTERS:])
    if not matches:
        return RewardResult(-1.0, 0.0, None)
    answer = normalize_answer(matches[-1])
    right = answer == normalize_answer(ground_truth)
    return RewardResult(1.0 if right else -1.0, float(right), answer)


def normalize_answer(text: str) -> str:
    """What follows the last "=", without articles, units and LaTeX dress: `x = \\frac12` becomes `\\frac{1}{2}`."""
    text = text.rsplit("=", maxsplit=1)[-1]
    for before, after in REPLACEMENTS:
        text = text.replace(before, after)
    for expression in (*UNITS, *MARKUP):
        text = text.replace(expression, "")
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    text = text.replace("$", "")
    without_commas = text.replace(",", "")
    return without_commas.strip() if without_commas.isdigit() else text.strip()
