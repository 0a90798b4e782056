"""Tasks as problem sources: seeded, resumable, and never asking what is held out."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest

from megatron_fipo.data import ProblemSource, make_sources
from megatron_fipo.data.gym import HASH_ORDERED_TASKS
from megatron_fipo.data.source import question_key
from megatron_fipo.data_config import DataSettings
from megatron_fipo.types import Problem

CHAIN_SUM = DataSettings(task="chain_sum", task_args={"max_terms": 3, "max_digits": 2}, num_eval_problems=20)
TINY = DataSettings(task="chain_sum", task_args={"max_terms": 2, "max_digits": 1}, num_eval_problems=60)


def sources(settings: DataSettings, seed: int) -> tuple[ProblemSource, list[Problem]]:
    """The training source and the held-out problems, which bear the task's name."""
    source, held_out, notes = make_sources(settings, seed)
    assert notes == ()
    assert settings.task is not None
    assert list(held_out) == [settings.task]
    return source, held_out[settings.task]


def take(source: ProblemSource, num_problems: int) -> list[Problem]:
    return [source.next_problem() for _ in range(num_problems)]


def test_small_arithmetic_asks_and_begins_the_answer() -> None:
    source, held_out = sources(DataSettings(task="small_arithmetic"), seed=1)
    for problem in [*take(source, 50), *held_out]:
        (message,) = problem.prompt
        assert isinstance(message, dict)
        left, symbol, right, equals = problem.response_prefix.split()
        assert message == {"role": "user", "content": f"What is {left} {symbol} {right}?"}
        assert problem.response_prefix == f"{left} {symbol} {right} = "
        a, b = int(left), int(right)
        assert equals == "="
        assert int(problem.ground_truth) == {"+": a + b, "-": a - b, "*": a * b}[symbol]
        assert all(2 <= x <= (9 if symbol == "*" else 20) for x in (a, b))


@pytest.mark.parametrize("num_held_out", [1, 32, 96, 150])
def test_small_arithmetic_holds_out_the_same_problems_at_every_seed(num_held_out: int) -> None:
    settings = DataSettings(task="small_arithmetic", num_eval_problems=num_held_out)
    _, held_out = sources(settings, seed=1)
    assert len({problem.uid for problem in held_out}) == num_held_out
    assert sources(settings, seed=2)[1] == held_out
    symbols = Counter(problem.response_prefix.split()[1] for problem in held_out)
    assert max(symbols.values()) - min(symbols[symbol] for symbol in "+-*") <= 1


def test_small_arithmetic_trains_on_everything_else_but_commuted_held_out_problems() -> None:
    settings = DataSettings(task="small_arithmetic", num_eval_problems=96)
    source, held_out = sources(settings, seed=3)
    problems = take(source, 3000)
    asked = {problem.response_prefix for problem in problems}
    forbidden = set()
    for problem in held_out:
        a, symbol, b, _ = problem.response_prefix.split()
        forbidden |= {f"{a} {symbol} {b} = ", f"{b} {symbol} {a} = "}
    everything = {
        f"{a} {s} {b} = " for s, top in (("+", 21), ("-", 21), ("*", 10)) for a in range(2, top) for b in range(2, top)
    }
    assert asked == everything - forbidden
    assert len({problem.uid for problem in problems}) == 3000
    symbols = Counter(problem.response_prefix.split()[1] for problem in problems)
    assert symbols == {"+": 1000, "-": 1000, "*": 1000}


def test_small_arithmetic_refuses_to_hold_out_too_much_and_to_take_parameters() -> None:
    with pytest.raises(ValueError, match="--num-eval-problems is 151"):
        make_sources(DataSettings(task="small_arithmetic", num_eval_problems=151), seed=1)
    with pytest.raises(ValueError, match=r"--task-args is \{'n': 1\}"):
        make_sources(DataSettings(task="small_arithmetic", task_args={"n": 1}), seed=1)


@pytest.mark.parametrize("settings", [DataSettings(task="small_arithmetic"), CHAIN_SUM, TINY])
def test_the_stream_depends_on_the_seed_and_goes_on_where_it_was_saved(settings: DataSettings) -> None:
    problems = take(sources(settings, seed=5)[0], 1300)  # beyond one block, and beyond one epoch of products
    assert take(sources(settings, seed=6)[0], 50) != problems[:50]
    source, held_out = sources(settings, seed=5)
    assert take(source, 617) == problems[:617]
    saved = json.loads(json.dumps(source.state_dict()))
    resumed, held_out_again = sources(settings, seed=5)
    resumed.load_state_dict(saved)
    assert take(resumed, 683) == problems[617:]
    assert held_out_again == held_out
    assert len({problem.uid for problem in problems}) == 1300


@pytest.mark.parametrize("settings", [DataSettings(task="small_arithmetic"), CHAIN_SUM, TINY])
def test_training_never_asks_a_held_out_question(settings: DataSettings) -> None:
    source, held_out = sources(settings, seed=7)
    keys = {question_key(problem) for problem in held_out}
    assert len(keys) == settings.num_eval_problems
    assert not keys & {question_key(problem) for problem in take(source, 1500)}


def test_skipping_is_not_vacuous_in_a_tiny_task() -> None:
    source, _ = sources(TINY, seed=7)
    take(source, 500)
    assert source.state_dict()["position"] > 600


def test_neighbouring_seeds_do_not_share_their_streams() -> None:
    wide = DataSettings(task="chain_sum", task_args={"min_terms": 5, "max_terms": 6, "min_digits": 4})
    questions = [{p.prompt for p in take(sources(wide, seed=seed)[0], 100)} for seed in (1, 2)]
    assert not questions[0] & questions[1]


def test_a_state_that_does_not_belong_is_refused() -> None:
    source, _ = sources(CHAIN_SUM, seed=1)
    saved = source.state_dict()
    other_seed, _ = sources(CHAIN_SUM, seed=2)
    with pytest.raises(ValueError, match=r"belongs to: task chain_sum .* seed 1, .*but this run reads: .* seed 2"):
        other_seed.load_state_dict(saved)
    other_task, _ = sources(DataSettings(task="small_arithmetic"), seed=1)
    with pytest.raises(ValueError, match="this run reads: task small_arithmetic"):
        other_task.load_state_dict(saved)
    for bad in ({}, {"position": 3}, {**saved, "more": 1}, {**saved, "position": -1}, {**saved, "position": True}):
        with pytest.raises(ValueError, match="the saved data position"):
            source.load_state_dict(bad)
    assert source.state_dict() == saved


def test_unknown_tasks_and_parameters_are_named_with_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"--task is 'chainsum'.*did you mean 'chain_sum'.*DATASETS"):
        make_sources(DataSettings(task="chainsum"), seed=1)
    with pytest.raises(ValueError, match="did you mean 'small_arithmetic'"):
        make_sources(DataSettings(task="small_arithmetics"), seed=1)
    with pytest.raises(ValueError, match=r"--task-args is \['max_term'\].*max_terms"):
        make_sources(DataSettings(task="chain_sum", task_args={"max_term": 3}), seed=1)
    with pytest.raises(ValueError, match=r"--task-args is \['seed'\]"):
        make_sources(DataSettings(task="chain_sum", task_args={"seed": 3}), seed=1)
    with pytest.raises(ValueError, match=r"'max_terms': 1.*chain_sum refuses: max_terms must be >= min_terms"):
        make_sources(DataSettings(task="chain_sum", task_args={"max_terms": 1}), seed=1)
    with pytest.raises(ValueError, match=r"'max_terms': 'many'.*chain_sum refuses"):
        make_sources(DataSettings(task="chain_sum", task_args={"max_terms": "many"}), seed=1)


def test_a_task_with_too_few_different_problems_says_how_many_there_are() -> None:
    settings = DataSettings(task="coin_flip", task_args={"min_trials": 3, "max_trials": 4}, num_eval_problems=5000)
    with pytest.raises(ValueError, match=r"--num-eval-problems is 5000, but .* problems of coin_flip"):
        make_sources(settings, seed=1)


def test_a_task_whose_every_problem_is_held_out_says_so() -> None:
    _, held_out = sources(TINY, seed=1)
    all_of_them = DataSettings(task="chain_sum", task_args={"max_terms": 2, "max_digits": 1}, num_eval_problems=200)
    source, _ = sources(all_of_them, seed=1)  # 10 x 10 x two operators
    with pytest.raises(ValueError, match="in a row are held out"):
        source.next_problem()
    assert len(held_out) == 60


@pytest.mark.parametrize("hash_seed", [None, "random"])
def test_tasks_that_follow_pythons_hash_order_need_a_fixed_one(
    monkeypatch: pytest.MonkeyPatch, hash_seed: str | None
) -> None:
    if hash_seed is None:
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    else:
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
    settings = DataSettings(task=HASH_ORDERED_TASKS[0], num_eval_problems=2)
    with pytest.raises(ValueError, match="PYTHONHASHSEED=0"):
        make_sources(settings, seed=1)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert len(list(islice(sources(settings, seed=1)[1], 2))) == 2
