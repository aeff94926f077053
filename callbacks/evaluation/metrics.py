"""From scored pairs to the numbers of an evaluation."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from callbacks.evaluation.result import EvaluationResult, Group
from datamodules.messages import Message
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


def evaluation_result(pairs: Sequence[Pair], *, max_failed_share: float = 0.1, **about: Any) -> EvaluationResult:
    """The figures of the pairs; failed ones are counted and in no average.

    Args:
        pairs: In the order of their prompts.
        max_failed_share: Beyond this share of failed pairs the evaluation is not valid.
        **about: What was evaluated, by whom and at what cost: the other fields of the result.
    """
    scored = [pair for pair in pairs if pair.outcome != "failed"]
    wins, ties, losses, failed = (sum(p.outcome == name for p in pairs) for name in ("win", "tie", "loss", "failed"))
    columns = [(p.reward, p.reference_reward, p.completion_tokens, p.reference_tokens) for p in scored]
    rewards, reference_rewards, lengths, reference_lengths = torch.tensor(columns, dtype=torch.float64).view(-1, 4).T
    improvements, longer = rewards - reference_rewards, lengths - reference_lengths
    at_equal_length = length_controlled_win_rate(outcomes(rewards, reference_rewards), longer)
    rate = win_rate(wins, ties, losses)
    return EvaluationResult(
        win_rate=rate,
        win_rate_ci=win_rate_interval(wins, ties, losses),
        sign_test_p=sign_test(wins, losses) if scored else math.nan,
        length_controlled_win_rate=at_equal_length.rate,
        length_controlled_win_rate_ci=at_equal_length.interval,
        length_controlled_note=at_equal_length.reason or None,
        average_reward=rewards.mean().item(),
        average_reference_reward=reference_rewards.mean().item(),
        reward_improvement=improvements.mean().item(),
        reward_improvement_ci=mean_interval(improvements),
        length_ratio=(lengths.mean() / reference_lengths.mean()).item(),
        reward_length_correlation=rank_correlation(improvements, longer),
        wins=wins,
        ties=ties,
        losses=losses,
        failed=failed,
        prompts=len(pairs),
        prompts_needed=prompts_needed(rate, tie_share=ties / max(1, len(scored))),
        win_rate_by_prompt_length=by_prompt_length(pairs),
        win_rate_by_source=by_source(pairs),
        valid=failed <= max_failed_share * len(pairs) and failed < len(pairs),
        **about,
    )


def win_rate(wins: int, ties: int, losses: int) -> float:
    """The share of wins, ties counted half; NaN of no pairs."""
    count = wins + ties + losses
    return (wins + ties / 2) / count if count else math.nan


def by_prompt_length(pairs: Sequence[Pair]) -> list[Group]:
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


def by_source(pairs: Sequence[Pair]) -> list[Group]:
    """The win rate for each source of prompts, the most frequent first; nothing where no source is known."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.source or "unknown", []).append(pair)
    known = any(pair.source for pair in pairs)
    return _shares(dict(sorted(groups.items(), key=lambda group: -len(group[1])))) if known else []


def _shares(groups: dict[str, list[Pair]]) -> list[Group]:
    counts = {
        label: [sum(pair.outcome == name for pair in pairs) for name in ("win", "tie", "loss")]
        for label, pairs in groups.items()
    }
    return [
        Group(label, sum(scored), win_rate(*scored), win_rate_interval(*scored)) for label, scored in counts.items()
    ]


def cannot_tell(result: EvaluationResult) -> str:
    """What to say where the interval of the win rate contains 50 %; nothing where the prompts tell."""
    low, high = result.win_rate_ci
    if math.isnan(result.win_rate) or not low <= 0.5 <= high:
        return ""
    prompts = "1 prompt" if result.scored == 1 else f"{result.scored:,} prompts"
    if result.prompts_needed is None:
        return f"{prompts} show no difference from 50 %"
    takes = f"{two_digits(result.prompts_needed):,}"
    return f"{prompts} cannot tell a win rate of {100 * result.win_rate:.1f} % from 50 %; that takes about {takes}"


def two_digits(count: int) -> int:
    """A count rounded to two digits, as an estimate is told."""
    return round(count, min(0, 2 - len(str(count))))
