"""The task `small_arithmetic`: `What is 13 - 4?` with the answer begun as `13 - 4 = `; small enough to enumerate.

Operands are 2-20 for + and -, 2-9 for *. A third of all problems, held-out ones too, belongs to each operator.
"""

from __future__ import annotations

import functools
import operator
import random
from collections.abc import Callable

from megatron_fipo.config import require
from megatron_fipo.data.source import SeededSource, drawn_uid, stable_hash
from megatron_fipo.types import Problem

OPERATORS: dict[str, tuple[Callable[[int, int], int], range]] = {
    "+": (operator.add, range(2, 21)),
    "-": (operator.sub, range(2, 21)),
    "*": (operator.mul, range(2, 10)),
}
MAX_EVAL_PROBLEMS = 150  # leaves at least 8 products to train on


def small_arithmetic(seed: int, num_eval_problems: int) -> tuple[SeededSource, list[Problem]]:
    """The training source and the held-out problems, which are the same for every seed.

    A held-out `3 + 5` keeps `5 + 3` out of training as well, also when that one is not evaluated. Each operator's
    training problems come once per epoch, in an order shuffled anew from (seed, epoch).
    Raises ValueError when more problems are to be held out than training can spare.
    """
    require(
        num_eval_problems <= MAX_EVAL_PROBLEMS,
        "--num-eval-problems",
        num_eval_problems,
        f"at most {MAX_EVAL_PROBLEMS} for the task small_arithmetic",
    )
    held_out: list[Problem] = []
    training: dict[str, list[Problem]] = {}
    for i, symbol in enumerate(OPERATORS):
        num_held_out = num_eval_problems // 3 + (i < num_eval_problems % 3)
        of_operator, training[symbol] = _split(symbol, num_held_out)
        held_out += of_operator

    @functools.lru_cache(maxsize=len(OPERATORS))
    def order(symbol: str, epoch: int) -> list[int]:
        indices = list(range(len(training[symbol])))
        random.Random(f"small_arithmetic {seed} {symbol} {epoch}").shuffle(indices)
        return indices

    def problem_at(k: int) -> Problem:
        turn, place = divmod(k, len(OPERATORS))
        symbols = list(OPERATORS)
        random.Random(f"small_arithmetic {seed} turn {turn}").shuffle(symbols)
        problems = training[symbols[place]]
        epoch, i = divmod(turn, len(problems))
        return _problem_drawn(problems[order(symbols[place], epoch)[i]], epoch)

    description = f"task small_arithmetic, seed {seed}, {num_eval_problems} held out"
    return SeededSource(description, problem_at), held_out


def _split(symbol: str, num_held_out: int) -> tuple[list[Problem], list[Problem]]:
    """One operator's held-out and training problems, cut by a hash of the unordered operands."""
    compute, operands = OPERATORS[symbol]
    pairs = sorted(
        ((a, b) for a in operands for b in operands),
        key=lambda pair: (stable_hash(symbol, min(pair), max(pair)), pair),
    )
    held_out = pairs[:num_held_out]
    twins = {(b, a) for a, b in held_out}
    training = [pair for pair in pairs[num_held_out:] if pair not in twins]
    return (
        [_problem(symbol, a, b, compute(a, b)) for a, b in held_out],
        [_problem(symbol, a, b, compute(a, b)) for a, b in training],
    )


def _problem(symbol: str, a: int, b: int, result: int) -> Problem:
    expression = f"{a} {symbol} {b}"
    return Problem(
        uid=f"small_arithmetic:{a}{symbol}{b}",
        prompt=({"role": "user", "content": f"What is {expression}?"},),
        ground_truth=str(result),
        response_prefix=f"{expression} = ",
    )


def _problem_drawn(problem: Problem, epoch: int) -> Problem:
    return Problem(drawn_uid(problem.uid, epoch), problem.prompt, problem.ground_truth, problem.response_prefix)
