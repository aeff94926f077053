"""Where scores come from: callables found by import path."""

from lightning_modules.rewards.base import Reward, WeightedReward, resolve_reward
from lightning_modules.rewards.http import HTTPReward
from lightning_modules.rewards.local import CausalModelReward, ModelReward
from lightning_modules.rewards.nemotron import NemotronReward
from lightning_modules.rewards.sglang import SGLangReward
from lightning_modules.rewards.vllm import VLLMReward

__all__ = [
    "CausalModelReward",
    "HTTPReward",
    "ModelReward",
    "NemotronReward",
    "Reward",
    "SGLangReward",
    "VLLMReward",
    "WeightedReward",
    "resolve_reward",
]
