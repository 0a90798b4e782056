"""A task on which longer reasoning pays: apply a permutation n times, in small safe leaps or in large risky ones.

`^ F3 7 k16 =` asks for F3 applied 16 times to 7. A response is steps `j<leap> k<applications left> <value>` and then
`# <answer> $`. Only the answer is graded. Light imports: the grader's processes load this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_fipo.data.source import SeededSource, drawn_uid, stable_hash
from megatron_fipo.types import Problem, RewardResult

NUM_FUNCTIONS, NUM_VALUES, LONGEST_LEAP = 8, 10, 4
FEWEST_APPLICATIONS, MOST_APPLICATIONS = 8, 16
NUM_HELD_OUT = 40  # of the 80 problems with the most applications
TASK_SEED = 20260319  # the permutations and the held-out problems are the task's, not a run's

END, BEGIN = "$", "^"
TOKENS: tuple[str, ...] = (
    *(END, BEGIN, "=", "#"),
    *(f"F{i}" for i in range(NUM_FUNCTIONS)),
    *(str(i) for i in range(NUM_VALUES)),
    *(f"j{i}" for i in range(1, LONGEST_LEAP + 1)),
    *(f"k{i}" for i in range(MOST_APPLICATIONS + 1)),
)
ID_OF = {token: i for i, token in enumerate(TOKENS)}
PROMPT_LEN = 5

_FUNCTIONS = np.stack([np.random.default_rng([TASK_SEED, i]).permutation(NUM_VALUES) for i in range(NUM_FUNCTIONS)])

ANSWERS_AT_ONCE = 0.3  # share of the sloppy annotations that are no more than a guess
PERSONA_SHARES = (0.35, 0.35, 0.3)  # of careful, medium and sloppy annotators among the others
PERSONA_LEAPS = (  # their probabilities of a leap of 1, 2, 3, 4
    (1.0, 0.0, 0.0, 0.0),
    (0.2, 0.6, 0.2, 0.0),
    (0.0, 0.2, 0.4, 0.4),
)
ERROR_RATES = (0.0, 0.15, 0.3, 0.5)  # of a leap of 1, 2, 3, 4: the value is then any value


class LeapsTokenizer:
    """One token per word of the task; what this project asks of a tokenizer (data/prompts.py)."""

    chat_template: Any = None
    bos_token: str | None = None  # prompts begin with their own
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def encode(self, text: str, **options: Any) -> list[int]:
        """Token ids of the words of `text`. Raises KeyError for a word that is none of TOKENS."""
        return [ID_OF[word] for word in text.split()]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, **options: Any) -> str:
        """The words, with spaces between them; the end-of-answer token is the special one."""
        words = [TOKENS[i] for i in token_ids]
        return " ".join(word for word in words if not (skip_special_tokens and word == END))

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str:
        """There are no chats here. Raises ValueError."""
        raise ValueError(f"the task's prompts are plain texts, but a chat was given: {conversation}")


def apply(function: int, value: int, times: int) -> int:
    """F applied `times` times to `value`."""
    for _ in range(times):
        value = int(_FUNCTIONS[function, value])
    return value


def make_problem(function: int, value: int, times: int) -> Problem:
    """The problem that asks for F applied `times` times to `value`."""
    return Problem(
        uid=f"F{function}/{value}/{times}",
        prompt=f"{BEGIN} F{function} {value} k{times} =",
        ground_truth=str(apply(function, value, times)),
    )


def split_problems() -> tuple[list[Problem], list[Problem]]:
    """(training problems, held-out problems): all there are, and no problem is in both.

    Held out is half of the problems with the most applications; the warm-up does not see them either.
    """
    everything = [
        (function, value, times)
        for times in range(FEWEST_APPLICATIONS, MOST_APPLICATIONS + 1)
        for function in range(NUM_FUNCTIONS)
        for value in range(NUM_VALUES)
    ]
    longest = [key for key in everything if key[2] == MOST_APPLICATIONS]
    chosen = np.random.default_rng([TASK_SEED, NUM_FUNCTIONS]).permutation(len(longest))[:NUM_HELD_OUT]
    held_out = {longest[i] for i in chosen}
    train = [make_problem(*key) for key in everything if key not in held_out]
    return train, [make_problem(*key) for key in sorted(held_out)]


def training_source(problems: Sequence[Problem], seed: int) -> SeededSource:
    """The problems in an order that `seed` decides, shuffled anew in every epoch; endless."""

    def problem_at(position: int) -> Problem:
        epoch, place = divmod(position, len(problems))
        order = np.random.default_rng(stable_hash("chain of leaps", seed, epoch)).permutation(len(problems))
        problem = problems[order[place]]
        return Problem(drawn_uid(problem.uid, epoch), problem.prompt, problem.ground_truth)

    return SeededSource(f"chain of leaps, seed {seed}", problem_at)


def grade(response: str, ground_truth: str, *, finish_reason: str = "stop", **extra: Any) -> RewardResult:
    """Score and accuracy 1 when a finished response ends in `# <answer>` with the right answer, else 0.

    The steps are not looked at: whether they pay is what the policy has to find out.
    """
    words = response.split()
    answers = finish_reason == "stop" and words.count("#") == 1 and words[-2:-1] == ["#"]
    answer = words[-1] if answers else None
    accuracy = float(answer == ground_truth)
    return RewardResult(accuracy, accuracy, answer)


def warm_up_batches(
    problems: Sequence[Problem], num_batches: int, batch_size: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Supervised batches (token ids [B, L] int64, loss mask [B, L] bool, aligned to the predicting position).

    The first half shows perfect responses to `problems`, the second half sloppy ones.
    """
    generator = np.random.default_rng([TASK_SEED, seed])
    tokenizer = LeapsTokenizer()
    for number in range(num_batches):
        rows = []
        for index in generator.integers(len(problems), size=batch_size):
            problem = problems[index]
            key = _key(problem)
            response = perfect_response(*key) if number < num_batches // 2 else sloppy_response(*key, generator)
            rows.append(tokenizer.encode(f"{problem.prompt} {response}"))
        token_ids = np.zeros((batch_size, max(map(len, rows))), dtype=np.int64)
        loss_mask = np.zeros(token_ids.shape, dtype=bool)
        for i, row in enumerate(rows):
            token_ids[i, : len(row)] = row
            loss_mask[i, PROMPT_LEN - 1 : len(row) - 1] = True
        yield token_ids, loss_mask


def perfect_response(function: int, value: int, times: int) -> str:
    """The response of someone who makes leaps of one and no error."""
    steps = [f"j1 k{times - done} {apply(function, value, done)}" for done in range(1, times + 1)]
    return " ".join([*steps, "#", str(apply(function, value, times)), END])


def sloppy_response(function: int, value: int, times: int, generator: np.random.Generator) -> str:
    """An annotator's response: a guess at once, or a chain of leaps whose size and errors depend on the persona."""
    if generator.random() < ANSWERS_AT_ONCE:
        return f"# {generator.integers(NUM_VALUES)} {END}"
    leaps = PERSONA_LEAPS[generator.choice(len(PERSONA_SHARES), p=PERSONA_SHARES)]
    words = []
    while times:
        leap = min(int(generator.choice(LONGEST_LEAP, p=leaps)) + 1, times)
        value, times = apply(function, value, leap), times - leap
        if generator.random() < ERROR_RATES[leap - 1]:
            value = int(generator.integers(NUM_VALUES))
        words += [f"j{leap}", f"k{times}", str(value)]
    return " ".join([*words, "#", str(value), END])


def _key(problem: Problem) -> tuple[int, int, int]:
    """(function, value, times) of a problem's prompt."""
    assert isinstance(problem.prompt, str), problem.uid
    _, function, value, times, _ = problem.prompt.split()
    return int(function[1:]), int(value), int(times[1:])
