"""The table of rewards, and the way to one of the user's own."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Awaitable, Callable
from functools import partial

from megatron_fipo.data_config import DataSettings
from megatron_fipo.rewards.dapo import dapo_math
from megatron_fipo.rewards.gym import reasoning_gym
from megatron_fipo.rewards.rules import exact, small_arithmetic
from megatron_fipo.rewards.symbolic import math_verify, warm_up_math_verify
from megatron_fipo.types import RewardResult
from megatron_fipo.user_function import load_user_function

Reward = Callable[..., RewardResult | Awaitable[RewardResult]]

REWARDS: dict[str, Callable[..., RewardResult]] = {
    "small_arithmetic": small_arithmetic,
    "reasoning_gym": reasoning_gym,
    "dapo_math": dapo_math,
    "math_verify": math_verify,
    "exact": exact,
}
"""Every built-in reward: f(response: str, ground_truth: str, **extra) -> RewardResult, synchronous, free to hang."""

WARM_UPS: dict[str, Callable[[], object]] = {
    "reasoning_gym": partial(importlib.import_module, "reasoning_gym"),
    "math_verify": warm_up_math_verify,
}
"""What a grader process does before its limits are set, because the first verdict would pay for it."""


def reward_name(settings: DataSettings) -> str:
    """The reward of a run: --custom-rm-path, --rm-type, or the task's own verifier.

    Raises ValueError for an unknown name, and for a prompt file without a reward.
    """
    if settings.custom_rm_path is not None:
        if ":" not in settings.custom_rm_path:
            raise ValueError(f"--custom-rm-path is {settings.custom_rm_path!r}, but must be module:function")
        return settings.custom_rm_path
    if settings.rm_type is not None:
        if settings.rm_type not in REWARDS:
            raise ValueError(f"--rm-type is {settings.rm_type!r}, but must be {_known(settings.rm_type)}")
        return settings.rm_type
    if settings.task is None:
        raise ValueError(
            f"prompts of a file need a reward: --rm-type {_known('')}, or --custom-rm-path module:function"
        )
    return "small_arithmetic" if settings.task == "small_arithmetic" else "reasoning_gym"


def load_reward(path: str) -> Reward:
    """The reward of that name in REWARDS, or the function `module:function`, whose module is imported. The latter may
    be a coroutine function, or return any other awaitable: the grader process awaits it.

    Raises ValueError when there is none; whatever the module raises while it is imported passes through.
    """
    if ":" not in path:
        if path not in REWARDS:
            raise ValueError(f"no reward is called {path!r}; wanted {_known(path)}, or module:function")
        return REWARDS[path]
    return load_user_function("--custom-rm-path", path)


def _known(name: str) -> str:
    close = difflib.get_close_matches(name, REWARDS, n=1)
    return f"one of {', '.join(REWARDS)}" + (f" (did you mean {close[0]!r}?)" if close else "")
