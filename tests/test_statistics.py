"""Intervals against published tables, and the win rate at equal length against worlds where it is known."""

import math
from statistics import NormalDist

import pytest
import torch

from lightning_modules.functional.statistics import (
    Interval,
    length_controlled_win_rate,
    mean_interval,
    outcomes,
    prompts_needed,
    rank_correlation,
    sign_test,
    student_t_quantile,
    wilson_interval,
)


def test_higher_reward_wins_equal_reward_ties_and_a_missing_one_is_neither() -> None:
    result = outcomes(torch.tensor([1.0, -5.0, 2.0, math.nan, 1.0]), torch.tensor([0.0, -5.0, 3.0, 0.0, math.nan]))
    torch.testing.assert_close(result, torch.tensor([1.0, 0.5, 0.0, math.nan, math.nan]), equal_nan=True)


def test_wilson_interval_of_eight_in_ten() -> None:
    low, high = wilson_interval(8.0, 10)
    assert (low, high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_wilson_interval_stays_within_zero_and_one_and_is_unknown_without_data() -> None:
    assert wilson_interval(0.0, 20)[0] == 0.0
    assert wilson_interval(20.0, 20)[1] == 1.0
    assert all(math.isnan(bound) for bound in wilson_interval(0.0, 0))


@pytest.mark.parametrize(("degrees", "quantile"), [(4, 2.776445), (9, 2.262157), (29, 2.045230), (99, 1.984217)])
def test_student_t_quantiles_of_the_tables(degrees: int, quantile: float) -> None:
    assert student_t_quantile(0.975, degrees) == pytest.approx(quantile, rel=0.01 if degrees < 9 else 1e-3)


def test_mean_interval_by_hand() -> None:
    """Mean 3, standard deviation sqrt(2.5), five values: 3 +- 2.776 x 1.5811 / sqrt(5)."""
    low, high = mean_interval(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert (low, high) == pytest.approx((3 - 1.9632, 3 + 1.9632), rel=0.01)


def test_win_rate_at_equal_length_recovers_the_quality_behind_a_length_bias() -> None:
    generator = torch.Generator().manual_seed(3)
    differences = 40 + 30 * torch.randn(20_000, generator=generator, dtype=torch.float64)
    quality, bias = -0.4, 2.0
    chances = torch.sigmoid(quality + bias * torch.tanh(differences / differences.std(correction=0)))
    outcome = (torch.rand(len(chances), generator=generator, dtype=torch.float64) < chances).double()
    assert outcome.mean() > 0.7
    assert length_controlled_win_rate(outcome, differences) == pytest.approx(1 / (1 + math.exp(-quality)), abs=0.03)


def test_win_rate_at_equal_length_is_the_win_rate_where_length_does_not_matter() -> None:
    outcome = torch.tensor([1.0, 0.0, 1.0, 1.0] * 50)
    differences = torch.tensor([5.0, 5.0, -5.0, 5.0, -5.0, -5.0, 5.0, -5.0] * 25)
    assert length_controlled_win_rate(outcome, differences) == pytest.approx(0.75, abs=0.02)


def test_win_rate_at_equal_length_is_finite_where_outcomes_are_separable() -> None:
    rate = length_controlled_win_rate(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([3.0, 4.0, -3.0, -4.0]))
    assert rate == pytest.approx(0.5, abs=1e-6)


# Tests, correlations, and how many prompts it takes


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (5, 0, 2 / 32), (1, 4, 2 * (1 + 5) / 32), (4, 1, 2 * (1 + 5) / 32), (3, 3, 1.0), (2, 1, 1.0)],
)
def test_the_sign_test_by_hand(wins: int, losses: int, p: float) -> None:
    """Of five fair coins, 1 of 32 outcomes has no tails and 5 have one; two-sided, twice as many."""
    assert sign_test(wins, losses) == pytest.approx(p)


def test_the_sign_test_is_exact_beyond_the_range_of_floats() -> None:
    assert sign_test(3000, 2800) == pytest.approx(2 * (1 - NormalDist().cdf(199 / 5800**0.5)), rel=0.01)


def test_rank_correlation_by_hand() -> None:
    """Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 x 4 / (4 x 15) = 0.6; order alone counts, and shared ranks are means."""
    x = torch.tensor([0.1, 5.0, 5.5, 99.0], dtype=torch.float64)
    y = torch.tensor([2.0, -1.0, 9.0, 3.0], dtype=torch.float64)
    assert rank_correlation(x, y) == pytest.approx(0.6)
    assert rank_correlation(x.exp(), -y) == pytest.approx(-0.6)
    tied = torch.tensor([1.0, 1.0, 2.0, 3.0], dtype=torch.float64)  # ranks 1.5 1.5 3 4
    assert rank_correlation(x, tied) == pytest.approx(4.5 / (5.0 * 4.5) ** 0.5)
    assert math.isnan(rank_correlation(x, torch.ones(4, dtype=torch.float64)))
    assert math.isnan(rank_correlation(x[:0], y[:0]))


@pytest.mark.parametrize("win_rate", [0.55, 0.6, 0.35])
def test_with_as_many_prompts_as_needed_four_in_five_evaluations_can_tell(win_rate: float) -> None:
    needed = int(prompts_needed(win_rate))
    wins = binomial(needed, win_rate)
    told = [not interval.low <= 0.5 <= interval.high for interval in intervals(needed)]
    assert sum(told[win] for win in wins) / DRAWS == pytest.approx(0.8, abs=0.03)


def test_prompts_needed_by_hand() -> None:
    """((1.96 x 0.5 + 0.8416 x 0.4975) / 0.05)^2 = 782.6; nothing tells a half from a half."""
    assert prompts_needed(0.55) == prompts_needed(0.45) == 783
    assert math.isnan(prompts_needed(0.5))


# What the intervals promise


DRAWS = 2_000


def binomial(count: int, probability: float) -> list[int]:
    """The wins of many evaluations of ``count`` prompts."""
    generator = torch.Generator().manual_seed(count)
    draws = torch.rand(DRAWS, count, generator=generator, dtype=torch.float64) < probability
    return [int(wins) for wins in draws.sum(1)]


def intervals(count: int) -> list[Interval]:
    return [wilson_interval(float(wins), count) for wins in range(count + 1)]


@pytest.mark.parametrize(("count", "win_rate"), [(50, 0.5), (100, 0.5), (100, 0.65), (100, 0.8), (300, 0.9)])
def test_the_win_rates_interval_covers_what_it_says(count: int, win_rate: float) -> None:
    covers = [interval.low <= win_rate <= interval.high for interval in intervals(count)]
    assert 0.93 <= sum(covers[wins] for wins in binomial(count, win_rate)) / DRAWS <= 0.97


def test_with_ties_the_win_rates_interval_covers_more() -> None:
    """Four prompts in ten tie and the rest split evenly."""
    generator = torch.Generator().manual_seed(0)
    chances = torch.tensor([3.0, 4.0, 3.0]).expand(DRAWS, 3)
    points = torch.multinomial(chances, 100, replacement=True, generator=generator).double() / 2
    covered = [low <= 0.5 <= high for low, high in (wilson_interval(p, 100) for p in points.sum(1).tolist())]
    assert sum(covered) / DRAWS >= 0.95


@pytest.mark.parametrize(("count", "skewed"), [(12, False), (100, False), (100, True)])
def test_the_reward_improvements_interval_covers_what_it_says(count: int, skewed: bool) -> None:
    """Of normal differences, and of ones with a long tail (a shifted exponential), whose true mean is 1."""
    generator = torch.Generator().manual_seed(count)
    values = torch.empty(DRAWS, count, dtype=torch.float64)
    values = values.exponential_(1.0, generator=generator) if skewed else 1 + values.normal_(generator=generator)
    covered = [low <= 1.0 <= high for low, high in map(mean_interval, values)]
    assert 0.93 <= sum(covered) / DRAWS <= 0.97
