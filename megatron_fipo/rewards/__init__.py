"""Rewards and the pool of bounded processes that they run in. Light: grader processes import this package."""

from megatron_fipo.rewards.pool import GraderPool as GraderPool
from megatron_fipo.rewards.pool import grade as grade
from megatron_fipo.rewards.registry import REWARDS as REWARDS
from megatron_fipo.rewards.registry import load_reward as load_reward
from megatron_fipo.rewards.registry import reward_name as reward_name
