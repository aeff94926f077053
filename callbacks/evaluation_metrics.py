"""From scored pairs to the numbers of an evaluation."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from datamodules.chat import Message
from lightning_modules.functional.statistics import (
    length_controlled_win_rate,
    mean_interval,
    outcomes,
    prompts_needed,
    rank_correlation,
    sign_test,
    wilson_interval,
)

OUTCOMES = {1.0: "win", 0.5: "tie", 0.0: "loss"}
POINTS = {outcome: points for points, outcome in OUTCOMES.items()}


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
        "reward_length_correlation": rank_correlation(rewards - reference_rewards, lengths - reference_lengths),
        "sign_test_p": sign_test(count["win"], count["loss"]),
        "prompts_needed": prompts_needed(points / len(scored)) if scored else math.nan,
        "wins": count["win"],
        "ties": count["tie"],
        "losses": count["loss"],
        "failed": count["failed"],
        "prompts": len(pairs),
        "win_rate_by_prompt_length": win_rates(dict(by_prompt_length(scored))),
        "win_rate_by_source": win_rates(by_source(scored)),
    }


def win_rates(groups: Mapping[str, Sequence[Pair]]) -> list[dict[str, Any]]:
    """The win rate within each group of scored pairs, with its interval."""
    rates = []
    for label, pairs in groups.items():
        points = sum(POINTS[pair.outcome] for pair in pairs)
        rates.append(
            {
                "label": label,
                "prompts": len(pairs),
                "win_rate": points / len(pairs),
                "win_rate_ci": list(wilson_interval(points, len(pairs))),
            }
        )
    return rates


def by_prompt_length(pairs: Sequence[Pair]) -> Iterator[tuple[str, list[Pair]]]:
    """The pairs in up to four groups of like size, from short prompts to long; equal lengths stay together."""
    ordered = sorted(pairs, key=lambda pair: pair.prompt_tokens)
    start = 0
    for quarter in range(1, 5):
        end = max(start, round(quarter * len(ordered) / 4))
        while 0 < end < len(ordered) and ordered[end].prompt_tokens == ordered[end - 1].prompt_tokens:
            end += 1
        if end > start:
            group = ordered[start:end]
            shortest, longest = group[0].prompt_tokens, group[-1].prompt_tokens
            yield f"{shortest}-{longest} tokens" if longest > shortest else f"{shortest} tokens", group
            start = end


def by_source(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """The pairs by where their prompts come from, the most frequent first; nothing where no row says so."""
    if not any(pair.source for pair in pairs):
        return {}
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.source or "unknown", []).append(pair)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


def cannot_tell(metrics: Mapping[str, Any]) -> str:
    """Where the interval holds one half, that it does and how many prompts it would take; else nothing."""
    low, high = metrics["win_rate_ci"]
    rate, needed = metrics["win_rate"], metrics.get("prompts_needed")
    if low is None or not low <= 0.5 <= high:
        return ""
    scored = metrics["prompts"] - metrics["failed"]
    told = f"{scored} prompts cannot tell a win rate of {100 * rate:.1f} % from 50 %"
    return told if needed is None or math.isnan(needed) else f"{told}; that takes about {needed:,.0f}"
