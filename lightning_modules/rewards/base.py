"""The Reward protocol, weighted sums of rewards, and from an option's value to a reward."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from datamodules.chat import Message
from datamodules.errors import ConfigurationError
from lightning_modules.loading import model_identity
from lightning_modules.rewards.reward_model import ModelReward


@runtime_checkable
class Reward(Protocol):
    """Scores completions: any function or object with this call."""

    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        """The score of each completion as the reply to its prompt.

        Args:
            prompts: Conversations that end with a user turn.
            completions: The assistant's replies, without special tokens.

        Returns:
            Finite scores, higher is better; NaN where a completion could not be scored, never a stand-in number.
        """


class WeightedReward:
    """A weighted sum of rewards; NaN where any of them is.

    Args:
        rewards: Rewards, or directories of reward models.
        weights: One for each reward.
    """

    def __init__(self, rewards: list[Reward | str], weights: list[float]) -> None:
        if len(rewards) != len(weights) or not rewards:
            raise ConfigurationError(
                f"a weighted reward needs a weight for each reward, got {len(rewards)} rewards and {len(weights)} "
                "weights; change reward.init_args.weights"
            )
        self.rewards = [resolve_reward(reward) for reward in rewards]
        self.weights = weights

    @property
    def last_error(self) -> str:
        """Why one of the rewards gave no score, where one says so."""
        return next(filter(None, (getattr(reward, "last_error", "") for reward in self.rewards)), "")

    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        columns = [reward(prompts, completions) for reward in self.rewards]
        return [sum(w * s for w, s in zip(self.weights, row, strict=True)) for row in zip(*columns, strict=True)]


def resolve_reward(reward: Reward | str, *, option: str = "model.reward") -> Reward:
    """The reward itself, or the reward model of a directory or hub id.

    Raises:
        ConfigurationError: If the text is neither.
    """
    if not isinstance(reward, str):
        return reward
    if not Path(reward).is_dir() and ("." in reward and "/" not in reward):
        raise ConfigurationError(
            f"no reward at the import path {reward!r}: name a class, or a function "
            f"(prompts, completions) -> list[float], in {option}"
        )
    return ModelReward(model_name=reward, option=option)


def reward_name(reward: Reward) -> str:
    """What to call the source in metrics: its own ``name``, or the function's or class's."""
    own = getattr(reward, "name", None)
    if isinstance(own, str):
        return own
    return getattr(reward, "__qualname__", None) or type(reward).__qualname__


def reward_identity(reward: Reward) -> list[Any]:
    """What tells a source from another: its name, its options, and its parts' and its weights' identity."""
    attributes: dict[str, Any] = dict(getattr(reward, "__dict__", {}))
    parts = [reward_identity(part) for part in attributes.pop("rewards", [])]
    options = {
        name: value
        for name, value in attributes.items()
        if name != "last_error" and not name.startswith("_") and isinstance(value, (str, int, float, list))
    }
    weights = model_identity(reward.model_name) if isinstance(reward, ModelReward) else []
    return [reward_name(reward), options, parts, weights]


def checked_scores(reward: Reward, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
    """The scores, with NaN for whatever is no finite number.

    Raises:
        ConfigurationError: If the source returns another number of scores than it was given completions.
    """
    scores = reward(prompts, completions)
    if len(scores) != len(completions):
        raise ConfigurationError(
            f"the reward {reward_name(reward)} must return {len(completions)} scores, got {len(scores)}"
        )
    return [float(score) if score is not None and math.isfinite(score) else math.nan for score in scores]


def preflight(reward: Reward, prompt: Sequence[Message], *, option: str) -> None:
    """Ask for one score before expensive work starts.

    Raises:
        ConfigurationError: If the source says why it gives none: a server that is down, a key that is refused.
    """
    score = checked_scores(reward, [prompt], ["I am not sure."])[0]
    reason = getattr(reward, "last_error", "")
    if math.isnan(score) and reason:
        raise ConfigurationError(f"the reward source {reward_name(reward)} does not answer: {reason}; change {option}")
