"""Where scores come from: callables found by import path."""

from lightning_modules.rewards.base import Reward, WeightedReward, resolve_reward
from lightning_modules.rewards.nemotron import NemotronReward
from lightning_modules.rewards.reward_model import ModelReward

__all__ = ["ModelReward", "NemotronReward", "Reward", "WeightedReward", "resolve_reward"]
