"""From scored pairs to the numbers of an evaluation."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from datamodules.chat import Message
from lightning_modules.functional.length_control import length_controlled_win_rate
from lightning_modules.functional.statistics import (
    mean_interval,
    outcomes,
    prompts_needed,
    rank_correlation,
    sign_test,
    win_rate_interval,
)

OUTCOMES = {1.0: "win", 0.5: "tie", 0.0: "loss"}
SMALLEST_BIN = 10
"""Prompts below which a share of them says nothing."""


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
    """The part of the dataset that the prompt is from, where the dataset tells."""

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
        result = outcomes(*torch.tensor([[reward], [reference_reward]], dtype=torch.float64)).item()
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
        fields = self._asdict().items()
        return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in fields}


def evaluation_metrics(pairs: Sequence[Pair]) -> dict[str, Any]:
    """The metrics of the pairs; failed ones are counted and in no average.

    ``length_controlled_win_rate`` is NaN where the data do not tell it, and ``length_controlled_note`` says why.
    """
    scored = [pair for pair in pairs if pair.outcome != "failed"]
    count = {name: sum(pair.outcome == name for pair in pairs) for name in ("win", "tie", "loss", "failed")}
    rewards = torch.tensor([pair.reward for pair in scored], dtype=torch.float64)
    reference_rewards = torch.tensor([pair.reference_reward for pair in scored], dtype=torch.float64)
    lengths = torch.tensor([pair.completion_tokens for pair in scored], dtype=torch.float64)
    reference_lengths = torch.tensor([pair.reference_tokens for pair in scored], dtype=torch.float64)
    improvements, longer = rewards - reference_rewards, lengths - reference_lengths
    at_equal_length = length_controlled_win_rate(outcomes(rewards, reference_rewards), longer)
    return {
        **win_rate(scored),
        "average_reward": rewards.mean().item(),
        "average_reference_reward": reference_rewards.mean().item(),
        "reward_improvement": improvements.mean().item(),
        "reward_improvement_ci": list(mean_interval(improvements)),
        "length_ratio": (lengths.mean() / reference_lengths.mean()).item(),
        "length_controlled_win_rate": at_equal_length.rate,
        "length_controlled_win_rate_ci": list(at_equal_length.interval),
        "length_controlled_note": at_equal_length.reason or None,
        "wins": count["win"],
        "ties": count["tie"],
        "losses": count["loss"],
        "failed": count["failed"],
        "prompts": len(pairs),
        "sign_test_p": sign_test(count["win"], count["loss"]) if scored else math.nan,
        "reward_length_correlation": rank_correlation(improvements, longer),
        "prompts_needed": prompts_needed(win_rate(scored)["win_rate"], tie_share=count["tie"] / max(1, len(scored))),
        "win_rate_by_prompt_length": by_prompt_length(pairs),
        "win_rate_by_source": by_source(pairs),
    }


def win_rate(scored: Sequence[Pair]) -> dict[str, Any]:
    """``win_rate`` and ``win_rate_ci`` of pairs that have an outcome."""
    wins, ties, losses = (sum(pair.outcome == name for pair in scored) for name in ("win", "tie", "loss"))
    return win_rate_of(wins, ties, losses)


def win_rate_of(wins: int, ties: int, losses: int) -> dict[str, Any]:
    """``win_rate``, ties counted half, and its 95 % interval ``win_rate_ci``; NaN of no pairs."""
    count = wins + ties + losses
    rate = (wins + ties / 2) / count if count else math.nan
    return {"win_rate": rate, "win_rate_ci": list(win_rate_interval(wins, ties, losses))}


def by_prompt_length(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The win rate in each quartile of the prompt's length, or in fewer parts where there are few or equal ones.

    The bounds come from all pairs, failed ones too, so runs on the same prompts have the same parts.
    """
    lengths = sorted(pair.prompt_tokens for pair in pairs)
    parts = min(4, len(lengths) // SMALLEST_BIN)
    if parts < 1 or lengths[-1] == 0:
        return []
    tops = sorted({lengths[len(lengths) * part // parts - 1] for part in range(1, parts + 1)})
    groups: dict[str, list[Pair]] = {}
    for low, top in zip([-1, *tops[:-1]], tops, strict=True):
        inside = [pair for pair in pairs if low < pair.prompt_tokens <= top]
        shortest = min(pair.prompt_tokens for pair in inside)
        groups[f"{shortest}-{top} tokens" if shortest < top else f"{top} tokens"] = inside
    return _shares(groups)


def by_source(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The win rate for each source of prompts, the most frequent first; nothing where no source is known."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.source or "unknown", []).append(pair)
    known = any(pair.source for pair in pairs)
    return _shares(dict(sorted(groups.items(), key=lambda group: -len(group[1])))) if known else []


def _shares(groups: dict[str, list[Pair]]) -> list[dict[str, Any]]:
    scored = {label: [pair for pair in pairs if pair.outcome != "failed"] for label, pairs in groups.items()}
    return [{"label": label, "prompts": len(pairs), **win_rate(pairs)} for label, pairs in scored.items()]


def cannot_tell(metrics: Mapping[str, Any]) -> str:
    """What to say where the interval of the win rate contains 50 %; nothing where the prompts tell.

    Args:
        metrics: As ``evaluation_metrics`` gives them, or as read from ``metrics.json`` with null for NaN.
    """
    rate, (low, high) = metrics["win_rate"], metrics["win_rate_ci"]
    if rate is None or math.isnan(rate) or not low <= 0.5 <= high:
        return ""
    count = metrics["wins"] + metrics["ties"] + metrics["losses"]
    prompts = "1 prompt" if count == 1 else f"{count:,} prompts"
    needed = metrics.get("prompts_needed")
    if needed is None or math.isnan(needed):
        return f"{prompts} show no difference from 50 %"
    takes = f"{two_digits(int(needed)):,}"
    return f"{prompts} cannot tell a win rate of {100 * rate:.1f} % from 50 %; that takes about {takes}"


def two_digits(count: int) -> int:
    """A count rounded to two digits, as an estimate is told."""
    return round(count, min(0, 2 - len(str(count))))
