"""The Reward protocol, weighted sums of rewards, and from an option's value to a reward."""

import hashlib
import importlib
import inspect
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, Protocol, runtime_checkable

from core.errors import ConfigurationError
from core.imports import is_allowed, shadowed
from datamodules.messages import Message
from lightning_modules.rewards import calling
from lightning_modules.rewards.http import HTTPReward
from lightning_modules.rewards.local import ModelReward


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
        return self.combined([checked_scores(reward, prompts, completions) for reward in self.rewards])

    def combined(self, columns: Sequence[Sequence[float]]) -> list[float]:
        """The weighted sums, from each part's scores."""
        return [sum(w * s for w, s in zip(self.weights, row, strict=True)) for row in zip(*columns, strict=True)]


def resolve_reward(reward: Reward | str, *, option: str = "model.reward") -> Reward:
    """The reward itself, or the reward model of a directory or hub id.

    Raises:
        ConfigurationError: If the text is neither.
    """
    if not isinstance(reward, str):
        return reward
    if Path(reward).is_dir() or "/" in reward or "." not in reward:
        return ModelReward(model_name=reward, option=option)
    function = _imported(reward)
    if function is None and (told := shadowed(reward)):
        raise ConfigurationError(f"{option} {reward}: {told}")
    if function is None:
        raise ConfigurationError(
            f"no reward at the import path {reward!r}: name in {option} a function (prompts, completions) -> "
            "list[float], or a class that is called like that and annotated as lightning_modules.rewards.Reward, "
            "in a module of the current directory or of this suite"
        )
    return function


def _imported(path: str) -> Reward | None:
    """The function at an import path, if it takes prompts and completions; jsonargparse itself demands annotations."""
    module, _, name = path.rpartition(".")
    if not is_allowed(path):  # to import is to run
        return None
    try:
        function = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None
    if not inspect.isfunction(function) or list(inspect.signature(function).parameters) != ["prompts", "completions"]:
        return None
    return function


def reward_name(reward: Reward) -> str:
    """What to call the source in metrics: its own ``name``, or the function's or class's."""
    own = getattr(reward, "name", None)
    if isinstance(own, str):
        return own
    return getattr(reward, "__qualname__", None) or type(reward).__qualname__


def reward_identity(reward: Reward) -> list[Any] | None:
    """What tells a source of scores from another, for keeping its scores; None where they cannot be kept.

    A reward says so itself in ``identity``. A function at the top of a module, or an object of a class there, is known
    by its name, its public options and the text of its file; so one that reads other files or asks a service has to
    say what else tells it apart. Anything else is known by nothing.
    """
    subject: Any = reward
    own = getattr(subject, "identity", None)
    if own is not None:
        return list(own)
    definition: Any = subject if isinstance(subject, FunctionType) else type(subject)
    try:
        options = {k: v for k, v in vars(subject).items() if not k.startswith("_") and k != "last_error"}
        module = sys.modules[definition.__module__]
        at_the_top: Any = vars(module).get(definition.__qualname__)
        if at_the_top is not definition or definition.__module__ in sys.stdlib_module_names:
            return None
        json.dumps(options)
        text = Path(str(module.__file__)).read_bytes()
    except (TypeError, ValueError, OSError):
        return None
    return [f"{definition.__module__}.{definition.__qualname__}", options, hashlib.sha256(text).hexdigest()]


def checked_scores(reward: Reward, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
    """The scores, with NaN for whatever is no finite number.

    Raises:
        ConfigurationError: If the source returns another number of scores than it was given completions, does not
            return in time, or tries to end the process.
    """
    ours = isinstance(reward, (HTTPReward, ModelReward, WeightedReward))
    scores = reward(prompts, completions) if ours else calling.call(reward, reward_name(reward), prompts, completions)
    if len(scores) != len(completions):
        raise ConfigurationError(
            f"the reward {reward_name(reward)} must return {len(completions)} scores, got {len(scores)}"
        )
    return [float(score) if score is not None and math.isfinite(score) else math.nan for score in scores]
