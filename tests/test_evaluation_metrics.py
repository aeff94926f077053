"""What an evaluation tells beside its headline: evidence, length, sources, and how many prompts it would take."""

import math

import pytest

from callbacks.evaluation.metrics import Pair, Side, cannot_tell, two_digits
from lightning_modules.functional.statistics import win_rate_interval
from tests.evaluation_run import result_of


def pair(reward: float, *, tokens: int = 4, prompt_tokens: int = 0, source: str | None = None) -> Pair:
    """Against a reference that scores 0 in four tokens."""
    prompt = [{"role": "user", "content": "q"}]
    sides = Side("a", tokens), Side("b", 4)
    return Pair.of(prompt, *sides, reward, 0.0, prompt_tokens=prompt_tokens, source=source)


def test_a_pair_carries_its_prompts_length_and_source_to_its_record() -> None:
    record = pair(1.0, prompt_tokens=7, source="sharegpt").record()
    assert (record["prompt_tokens"], record["source"]) == (7, "sharegpt")
    assert list(record)[-2:] == ["prompt_tokens", "source"]


def test_ties_and_failures_are_no_evidence_in_the_sign_test() -> None:
    pairs = [pair(1.0)] * 4 + [pair(-1.0)] + [pair(0.0)] * 9 + [pair(math.nan)] * 9
    assert result_of(pairs).sign_test_p == pytest.approx(12 / 32)
    assert math.isnan(result_of([pair(math.nan)]).sign_test_p)


def test_a_judge_of_length_alone_correlates_with_length() -> None:
    metrics = result_of([pair(float(tokens - 4), tokens=tokens) for tokens in (1, 2, 5, 9, 30)])
    assert metrics.reward_length_correlation == pytest.approx(1.0)
    assert math.isnan(result_of([pair(1.0), pair(2.0)]).reward_length_correlation)


def test_win_rates_by_prompt_length_are_those_of_its_quartiles() -> None:
    """40 prompts of 1 to 40 tokens: the policy wins on the 10 shortest, loses on the next 10, and ties on the rest."""
    rewards = [1.0] * 10 + [-1.0] * 10 + [0.0] * 20
    pairs = [pair(reward, prompt_tokens=length) for length, reward in enumerate(rewards, start=1)]
    parts = result_of(pairs[::-1]).win_rate_by_prompt_length
    assert [(part.label, part.prompts, part.win_rate) for part in parts] == [
        ("1-10 tokens", 10, 1.0),
        ("11-20 tokens", 10, 0.0),
        ("21-30 tokens", 10, 0.5),
        ("31-40 tokens", 10, 0.5),
    ]
    assert parts[0].win_rate_ci == win_rate_interval(10, 0, 0)


def test_few_or_equally_long_prompts_make_fewer_parts() -> None:
    def labels(lengths: list[int]) -> list[str]:
        parts = result_of([pair(1.0, prompt_tokens=length) for length in lengths])
        return [part.label for part in parts.win_rate_by_prompt_length]

    assert labels(list(range(1, 26))) == ["1-12 tokens", "13-25 tokens"]
    assert labels([5] * 30 + [9] * 10) == ["5 tokens", "9 tokens"]
    assert labels([5] * 100) == ["5 tokens"]
    assert labels([3] * 9) == []
    assert labels([0] * 100) == []


def test_failed_pairs_move_no_bound_of_the_parts() -> None:
    pairs = [pair(math.nan if length <= 5 else 1.0, prompt_tokens=length) for length in range(1, 21)]
    parts = result_of(pairs).win_rate_by_prompt_length
    assert [(part.label, part.prompts) for part in parts] == [("1-10 tokens", 5), ("11-20 tokens", 10)]


def test_win_rates_by_source_begin_with_the_most_frequent_and_name_the_unknown() -> None:
    pairs = [pair(1.0, source="few"), pair(-1.0, source="many"), pair(0.0, source="many"), pair(math.nan)]
    parts = result_of(pairs).win_rate_by_source
    told = [(part.label, part.prompts, part.win_rate) for part in parts[:2]]
    assert told == [("many", 2, 0.25), ("few", 1, 1.0)]
    assert (parts[2].label, parts[2].prompts) == ("unknown", 0)
    assert math.isnan(parts[2].win_rate)
    assert result_of([pair(1.0)]).win_rate_by_source == []


def test_too_few_prompts_are_said_to_be_too_few_and_enough_are_not() -> None:
    ties = result_of([pair(1.0)] * 15 + [pair(0.0)] * 85)
    assert ties.win_rate == 0.575
    assert ties.sign_test_p < 1e-4
    assert cannot_tell(ties) == ""
    close = result_of([pair(1.0)] * 53 + [pair(-1.0)] * 47)
    assert cannot_tell(close) == "100 prompts cannot tell a win rate of 53.0 % from 50 %; that takes about 2,200"
    even = cannot_tell(result_of([pair(1.0), pair(-1.0)]))
    assert even == "2 prompts show no difference from 50 %"
    assert cannot_tell(result_of([pair(1.0)] * 70 + [pair(-1.0)] * 30)) == ""
    assert cannot_tell(result_of([pair(math.nan)])) == ""


def test_an_estimate_is_told_in_two_digits() -> None:
    assert [two_digits(count) for count in (7, 88, 2178, 195_500)] == [7, 88, 2200, 200_000]
