"""Intervals against published tables, and the win rate at equal length against worlds where it is known."""

import math

import pytest
import torch

from lightning_modules.functional.statistics import (
    length_controlled_win_rate,
    mean_interval,
    outcomes,
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
