"""The built-in rewards: which answers are right."""

from __future__ import annotations

import pytest

from megatron_fipo.data_config import DataSettings
from megatron_fipo.rewards import REWARDS, load_reward, reward_name
from megatron_fipo.types import RewardResult

exact, small_arithmetic = (REWARDS[name] for name in ("exact", "small_arithmetic"))


@pytest.mark.parametrize("response", ["9", "9.", " 9 ", "9\n"])
def test_small_arithmetic_accepts_the_number_alone(response: str) -> None:
    assert small_arithmetic(response, "9", finish_reason="stop") == RewardResult(1.0, 1.0, "9")


@pytest.mark.parametrize("response", ["9..", "09", "9.0", "+9", "9 apples", "= 9", "", ".", "99", "٩", "9 9", "-9"])
def test_small_arithmetic_refuses_everything_else(response: str) -> None:
    assert small_arithmetic(response, "9", finish_reason="stop").accuracy == 0.0


def test_small_arithmetic_wants_the_turn_to_end_and_knows_negative_numbers() -> None:
    assert small_arithmetic("9", "9", finish_reason="length").score == 0.0
    assert small_arithmetic("-7.", "-7", finish_reason="stop").score == 1.0


def test_exact_compares_stripped_text() -> None:
    assert exact(" yes\n", "yes") == RewardResult(1.0, 1.0, "yes")
    assert exact("Yes", "yes") == RewardResult(0.0, 0.0, "Yes")
    assert exact("  ", "yes").answer is None


def test_reasoning_gym_scores_with_the_data_sets_own_verifier() -> None:
    reward = REWARDS["reasoning_gym"]
    problem = {"task": "chain_sum", "parameters": {"seed": 5, "size": 10, "max_terms": 2}, "index": 3}
    with pytest.raises(ValueError, match="not reproducible") as caught:
        reward("1", "not the answer", **problem)
    truth = str(caught.value).split("has the answer '")[1].split("'")[0]
    assert reward(truth, truth, **problem) == RewardResult(1.0, 1.0, truth)
    assert reward(f"I think <answer>1</answer> no <answer>{truth}.00</answer>", truth, **problem).accuracy == 1.0
    partial = reward(f"it is {truth}", truth, **problem)
    assert 0.0 < partial.score < 1.0
    assert partial.accuracy == 0.0
    assert reward("nonsense", truth, finish_reason="length", **problem).score == 0.0


@pytest.mark.parametrize(
    ("response", "tagged"),
    [
        ("<answer>1</answer> or <answer> 2\n</answer>", "2"),
        ("<answer>1</answer> or <answer>2", "1"),
        ("<answer>1</answer> or 2</answer>", "1"),
        ("<answer>a <answer>b</answer>", "a <answer>b"),
        ("<answer></answer>", ""),
        ("</answer><answer>", None),
        ("1", None),
        ("<answer>" * 100_000, None),
    ],
)
def test_the_last_whole_pair_of_tags_holds_the_answer(response: str, tagged: str | None) -> None:
    from reasoning_gym.utils import extract_answer

    from megatron_fipo.rewards.gym import _last_tagged

    assert _last_tagged(response) == tagged
    if len(response) < 100:
        assert extract_answer(response) == tagged


def test_load_reward_finds_names_and_functions_and_says_what_is_missing() -> None:
    assert load_reward("exact") is exact
    assert load_reward("megatron_fipo.rewards.rules:exact") is exact
    with pytest.raises(ValueError, match="did you mean 'dapo_math'"):
        load_reward("dapo_maths")
    with pytest.raises(ValueError, match="'no_such_module' is not importable"):
        load_reward("no_such_module:f")
    with pytest.raises(ValueError, match="has no function 'nope'"):
        load_reward("megatron_fipo.rewards.rules:nope")


def test_reward_name_follows_flag_then_task() -> None:
    assert reward_name(DataSettings(task="small_arithmetic")) == "small_arithmetic"
    assert reward_name(DataSettings(task="chain_sum")) == "reasoning_gym"
    assert reward_name(DataSettings(task="chain_sum", rm_type="exact")) == "exact"
    assert reward_name(DataSettings(prompt_data="x.jsonl", custom_rm_path="mine:f")) == "mine:f"
    with pytest.raises(ValueError, match="prompts of a file need a reward"):
        reward_name(DataSettings(prompt_data="x.jsonl"))
    with pytest.raises(ValueError, match=r"--rm-type is 'exakt'.*did you mean 'exact'"):
        reward_name(DataSettings(task="chain_sum", rm_type="exakt"))
    with pytest.raises(ValueError, match="module:function"):
        reward_name(DataSettings(task="chain_sum", custom_rm_path="mine.py"))
