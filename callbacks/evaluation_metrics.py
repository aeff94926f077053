"""From scored pairs to the numbers of an evaluation."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from datamodules.chat import Message
from lightning_modules.functional.statistics import (
    length_controlled_win_rate,
    mean_interval,
    outcomes,
    wilson_interval,
)

OUTCOMES = {1.0: "win", 0.5: "tie", 0.0: "loss"}


class Side(NamedTuple):
    """One model's completion of a prompt, and its length in tokens."""

    completion: str
    tokens: int


class Pair(NamedTuple):
    """Two completions of one prompt, with their scores; NaN where a score could not be had."""

    prompt: list[Message]
    completion: str
    reference_completion: str
    reward: float
    reference_reward: float
    completion_tokens: int
    reference_tokens: int
    outcome: str
    prompt_tokens: int = 0
    source: str | None = None
    """Where the prompt's dataset has it from."""

    @classmethod
    def of(
        cls,
        prompt: list[Message],
        policy: Side,
        reference: Side,
        reward: float,
        reference_reward: float,
        *,
        prompt_tokens: int = 0,
        source: str | None = None,
    ) -> "Pair":
        """Decide the outcome; a pair with an unscored side is ``failed``."""
        result = outcomes(torch.tensor([reward]), torch.tensor([reference_reward])).item()
        return cls(
            prompt,
            policy.completion,
            reference.completion,
            reward,
            reference_reward,
            policy.tokens,
            reference.tokens,
            OUTCOMES.get(result, "failed"),
            prompt_tokens,
            source,
        )

    def record(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in self._asdict().items()}


def evaluation_metrics(pairs: Sequence[Pair]) -> dict[str, Any]:
    """The metrics of the pairs; failed ones are counted and in no average."""
    scored = [pair for pair in pairs if pair.outcome != "failed"]
    count = {name: sum(pair.outcome == name for pair in pairs) for name in ("win", "tie", "loss", "failed")}
    rewards = torch.tensor([pair.reward for pair in scored], dtype=torch.float64)
    reference_rewards = torch.tensor([pair.reference_reward for pair in scored], dtype=torch.float64)
    lengths = torch.tensor([pair.completion_tokens for pair in scored], dtype=torch.float64)
    reference_lengths = torch.tensor([pair.reference_tokens for pair in scored], dtype=torch.float64)
    points = count["win"] + count["tie"] / 2
    return {
        "win_rate": points / len(scored) if scored else math.nan,
        "win_rate_ci": list(wilson_interval(points, len(scored))),
        "average_reward": rewards.mean().item(),
        "average_reference_reward": reference_rewards.mean().item(),
        "reward_improvement": (rewards - reference_rewards).mean().item(),
        "reward_improvement_ci": list(mean_interval(rewards - reference_rewards)),
        "length_ratio": (lengths.mean() / reference_lengths.mean()).item(),
        "length_controlled_win_rate": length_controlled_win_rate(
            outcomes(rewards, reference_rewards), lengths - reference_lengths
        ),
        "wins": count["win"],
        "ties": count["tie"],
        "losses": count["loss"],
        "failed": count["failed"],
        "prompts": len(pairs),
    }
