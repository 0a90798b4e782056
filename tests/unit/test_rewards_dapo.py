"""Golden verdicts of `dapo_math`, worked out by hand from its rule: tail of 300 characters, last `Answer:`, the
normalisation step by step in its order, comparison as text."""

from __future__ import annotations

import pytest

from megatron_fipo.rewards.dapo import UNITS, dapo_math, normalize_answer
from megatron_fipo.types import RewardResult

# response, ground truth, extracted and normalised answer (None: no match), right
FOUND = [
    ("Answer: $42$", "42", "42", True),
    ("Answer: \\boxed{42}", "42", "42", True),
    ("Answer: 42 degrees", "42", "42", True),
    ("Answer:\n42", "42", "42", True),
    ("**Answer:** 42", "42", "**42", False),
    ("Answer: 42.", "42", "42.", False),
    ("Answer: 42.0", "42", "42.0", False),
    ("Answer: 042", "42", "042", False),
    ("Answer: $$42$$", "42", "", False),  # the first $...$ is the empty one
    ("Answer: 42<|im_end|>", "42", "42<|im_end|>", False),
    ("42", "42", None, False),
    ("", "42", None, False),
    # which line
    ("Answer: 41\nAnswer: 42", "42", "42", True),
    ("Answer: 42\nAnswer: 43", "42", "43", False),
    ("Answer: 42\nThat was easy.", "42", "42", True),
    ("Answer: 42\n\nAnswer:", "42", "42", True),  # the last one holds nothing and is no match
    ("Answer: 42\nAnswer: \n", "42", "", False),  # the last one holds a space
    ("Answer: Answer: 42", "42", "Answer:42", False),
    ("Answer:\nAnswer: 42", "42", "Answer:42", False),
    ("Answer:\n\n \n42\nmore", "42", "42", True),
    # how it begins
    ("Answer :42", "42", "42", True),
    ("answer: 42", "42", "42", True),
    ("ANSWER: 42", "42", "42", True),
    ("aNsWeR\t:\t42", "42", "42", True),
    ("answer\n:\n42", "42", "42", True),
    ("Answer\u00a0: 42", "42", "42", True),
    ("An\u017fwer: 42", "42", "42", True),  # the long s is an s to (?i)
    ("MyAnswer: 42", "42", "42", True),
    ("Answers: 42", "42", None, False),
    ("Answer\uff1a42", "42", None, False),  # a full-width colon
    ("Answer 42", "42", None, False),
    ("Answer is: 42", "42", None, False),
    # where its line ends
    ("Answer: 42\r\nmore", "42", "42", True),
    ("Answer: 1,234\r\nmore", "1234", "1,234", False),  # with its \r it is no number, so its comma stays
    ("Answer: 42\t", "42", "42", True),
    ("Answer: 42\u00a0", "42", "42", True),
    ("Answer: 42\u2028", "42", "42", True),
    ("Answer: 42\u2028more", "42", "42\u2028more", False),
    ("Answer: 42\u200b", "42", "42\u200b", False),
    ("Answer: 42\x00", "42", "42\x00", False),
    # what follows the last "="
    ("Answer: x = 5", "5", "5", True),
    ("Answer: x=y=5", "5", "5", True),
    ("Answer: 5 = x", "5", "x", False),
    ("Answer: 5 =", "5", "", False),
    ("Answer: 5", "x = 5", "5", True),
    # articles, spaces, dollars
    ("Answer: an apple", "apple", "apple", True),
    ("Answer: a dog", "dog", "dog", True),
    ("Answer: banana split", "banana split", "banansplit", True),
    ("Answer: a", "a", "a", True),
    ("Answer: A dog", "dog", "Adog", False),
    ("Answer: $42.$", "42", "42", True),
    ("Answer: \\$42", "42", "42", True),
    ("Answer: $42", "42", "42", True),
    ("Answer: the total is $42$ apples", "42", "42", True),
    ("Answer: so $5$ or $6$", "5", "5", True),
    ("Answer: ( 1, 2 )", "(1,2)", "(1,2)", True),
    ("Answer: 5\\ cm", "5", "5", True),
    # units and \text
    ("Answer: 9 square units", "9", "9", True),
    ("Answer: 7 children tickets", "7", "7", True),
    ("Answer: 7 Degrees", "7", "7Degrees", False),
    ("Answer: 7 kilometers", "7", "7kilo", False),
    ("Answer: 7 ckmm", "7", "7", True),  # km goes first and leaves a cm
    ("Answer: 7 kcmm", "7", "7km", False),
    ("Answer: 5\\text{ m}", "5", "5", True),
    ("Answer: 5\\text{ cm}^2", "5", "5", True),
    ("Answer: 5\\text{ m}^3", "5", "5", True),
    ("Answer: 5\\mbox{ cm}", "5", "5", True),
    ("Answer: 5\\text{s}", "5", "5", True),
    ("Answer: 5\\text{.}", "5", "5", True),
    ("Answer: 7", "7\\text{\ns}", "7", True),
    ("Answer: 7", "7\\text{\n}", "7", True),
    ("Answer: 1\\text{ and }2", "1,2", "12", True),
    ("Answer: x,\\mbox{ and }y", "x,y", "x,y", True),
    ("Answer: \\text{yes}", "yes", "yes", True),
    ("Answer: \\text{4}\\text{2}", "42", "42", True),
    ("Answer: \\textbf{42}", "42", "42", True),
    ("Answer: \\text{\\textbf{4}}", "4", "4", True),
    ("Answer: \\textbf{\\text{4}}", "4", "4", True),
    ("Answer: \\textit{4}", "4", "\\textit{4}", False),
    ("Answer: \\overline{AB}", "AB", "AB", True),
    # other markup
    ("Answer: 5\\mathrm{th}", "5", "5", True),
    ("Answer: 90^\\circ", "90", "90", True),
    ("Answer: 90^{\\circ}", "90", "90", True),
    ("Answer: 5\\;", "5", "5", True),
    ("Answer: 1,\\!000", "1000", "1000", True),
    ("Answer: 1{,}000", "1000", "1000", True),
    ('Answer: "yes"', "yes", "yes", True),
    ("Answer: 1,2,\\dots,n", "1,2,,n", "1,2,,n", True),
    ("Answer: 1,2,\\ldots,n", "1,2,,n", "1,2,,n", True),
    ("Answer: $\\boxed{42}$", "42", "42", True),
    ("Answer: \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "\\frac{1}{2}", True),
    ("Answer: \\boxed{4}+\\boxed{5}", "4+5", "4}+\\boxed{5", False),
    ("Answer: \\fbox{4}", "4", "\\fbox{4}", False),
    ("Answer: \\(42\\)", "42", "\\(42\\)", False),
    ("Answer: {42}", "42", "{42}", False),
    # fractions and roots
    ("Answer: \\frac12", "\\frac{1}{2}", "\\frac{1}{2}", True),
    ("Answer: \\frac 1 2", "\\frac{1}{2}", "\\frac{1}{2}", True),
    ("Answer: \\frac123", "\\frac{1}{2}3", "\\frac{1}{2}3", True),
    ("Answer: \\frac{1}2", "\\frac{1}{2}", "\\frac{1}2", False),
    ("Answer: \\frac1{2}", "\\frac{1}{2}", "\\frac{1}{{}2}", False),
    ("Answer: \\dfrac12", "\\dfrac{1}{2}", "\\dfrac{1}{2}", True),
    ("Answer: \\dfrac{1}{2}", "\\frac{1}{2}", "\\dfrac{1}{2}", False),
    ("Answer: 1/2", "\\frac{1}{2}", "1/2", False),
    ("Answer: \\sqrt2", "\\sqrt{2}", "\\sqrt{2}", True),
    ("Answer: \\sqrt23", "\\sqrt{2}3", "\\sqrt{2}3", True),
    ("Answer: \\sqrt[3]{5}", "\\sqrt[3]{5}", "\\sqrt{[}3]{5}", True),
    # numbers
    ("Answer: 1,234", "1234", "1234", True),
    ("Answer: 1234", "1,234", "1234", True),
    ("Answer: 1,2", "12", "12", True),
    ("Answer: 42,", "42", "42", True),
    ("Answer: 1,234.5", "1234.5", "1,234.5", False),
    ("Answer: -1,234", "-1234", "-1,234", False),
    ("Answer: -42", "-42", "-42", True),
    ("Answer: \u221242", "-42", "\u221242", False),  # the typographic minus
    ("Answer: +42", "42", "+42", False),
    ("Answer: 42%", "42", "42%", False),
    ("Answer: \uff14,\uff12", "42", "\uff14\uff12", False),  # full-width digits are digits, but others
    ("Answer: 4\ud8002", "42", "4\ud8002", False),
    ("Answer: 42\u0301", "42", "42\u0301", False),
]


@pytest.mark.parametrize(("response", "ground_truth", "answer", "right"), FOUND)
def test_golden_verdicts(response: str, ground_truth: str, answer: str | None, right: bool) -> None:
    expected = RewardResult(1.0 if right else -1.0, float(right), answer)
    assert dapo_math(response, ground_truth) == expected
    assert dapo_math("Some reasoning. " * 100 + "\n" + response, ground_truth, finish_reason="length") == expected


# What follows "Answer: 42" (10 characters): the whole line lies in the last 300 characters or begins before them.
@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        (" " * 290, " " * 291),
        ("\n" * 290, "\n" * 291),
        ("\n" + "." * 289, "\n" + "." * 290),
        ("\n" + "\U0001f600" * 289, "\n" + "\U0001f600" * 290),  # characters, not bytes
        ("\n" + "e\u0301" * 144, "\n" + "e\u0301" * 145),  # code points, not what one sees
        ("\r\n" * 145, "\r\n" * 145 + "\n"),
    ],
)
def test_only_the_last_300_characters_count(inside: str, outside: str) -> None:
    for before in ("", "Answer: 41\n", "x" * 1000):
        assert dapo_math(before + "Answer: 42" + inside, "42") == RewardResult(1.0, 1.0, "42")
        assert dapo_math(before + "Answer: 42" + outside, "42") == RewardResult(-1.0, 0.0, None)


def test_a_line_cut_by_the_tail_loses_its_beginning() -> None:
    assert dapo_math("Answer: " + "1" * 292, "1" * 292).accuracy == 1.0
    assert dapo_math("Answer: " + "1" * 293, "1" * 293).answer is None
    assert dapo_math("Answer: 4\n" + "Answer: " + "1" * 293, "4").answer is None


@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_is_dropped_before_and_after_a_number(unit: str) -> None:
    assert normalize_answer(f"7 {unit}") == normalize_answer(f"{unit} 7") == normalize_answer(f"$7${unit}") == "7"


def test_the_units_and_their_order_are_the_rules() -> None:
    assert " ".join(UNITS) == (
        "square ways integers dollars mph inches hours km units \\ldots sue points feet minutes digits cents degrees "
        "cm gm pounds meters meals edges students childrentickets multiples \\text{s} \\text{.}"
    )


def test_a_ground_truth_goes_through_the_same_normalisation() -> None:
    assert len(FOUND) >= 60
    for _, ground_truth, answer, right in FOUND:
        assert right == (answer == normalize_answer(ground_truth)), ground_truth


def test_normalisation_is_not_repeated() -> None:
    assert normalize_answer("\\text{\\text{4}}") == "\\text{4}"
    assert normalize_answer("ckmm") == ""
