"""Statistics against published tables, by hand, and in simulated worlds where the truth is known."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from lightning_modules.functional.statistics import (
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


def test_win_rate_at_equal_length_of_the_sides_exchanged_is_its_complement() -> None:
    generator = torch.Generator().manual_seed(5)
    differences = 10 + 30 * torch.randn(200, generator=generator, dtype=torch.float64)
    outcome = (torch.randn(200, generator=generator, dtype=torch.float64) + differences / 30 > 0).double()
    exchanged = length_controlled_win_rate(1 - outcome, -differences)
    assert exchanged == pytest.approx(1 - length_controlled_win_rate(outcome, differences), abs=1e-9)


DRAWS = 2000


@pytest.mark.parametrize("count", [25, 100])
def test_wilson_intervals_hold_the_true_rate_in_95_of_100_worlds(count: int) -> None:
    generator = torch.Generator().manual_seed(11)
    rates = 0.2 + 0.6 * torch.rand(DRAWS, generator=generator, dtype=torch.float64)
    successes = (torch.rand(DRAWS, count, generator=generator, dtype=torch.float64) < rates[:, None]).sum(1)
    intervals = [wilson_interval(float(points), count) for points in successes.tolist()]
    held = [low <= rate <= high for (low, high), rate in zip(intervals, rates.tolist(), strict=True)]
    assert 0.93 < sum(held) / DRAWS < 0.97


def test_wilson_intervals_hold_the_true_rate_more_often_where_there_are_ties() -> None:
    generator = torch.Generator().manual_seed(12)
    points = worlds_of_outcomes(0.6, tie_share=0.5, count=100, generator=generator)
    held = [low <= 0.6 <= high for low, high in (wilson_interval(point, 100) for point in points)]
    assert sum(held) / DRAWS > 0.98


def squared(normal: Tensor) -> Tensor:
    """Chi-square with one degree of freedom: skewness 2.8, mean 1."""
    return normal**2


def mirrored(normal: Tensor) -> Tensor:
    """The same with the long tail below: mean -1."""
    return -(normal**2)


@pytest.mark.parametrize(
    ("shape", "mean", "count"),
    [(torch.clone, 0.0, 20), (torch.clone, 0.0, 100), (squared, 1.0, 50), (mirrored, -1.0, 50), (squared, 1.0, 300)],
)
def test_intervals_of_the_paired_difference_hold_it_in_95_of_100_worlds(
    shape: Callable[[Tensor], Tensor], mean: float, count: int
) -> None:
    """Student's t alone holds the mean of 50 squared normals in 92 of 100 worlds."""
    generator = torch.Generator().manual_seed(13)
    differences = shape(torch.randn(DRAWS, count, generator=generator, dtype=torch.float64))
    held = [low <= mean <= high for low, high in map(mean_interval, differences)]
    assert 0.93 < sum(held) / DRAWS < 0.97


def test_the_long_tail_widens_its_own_side_of_the_interval() -> None:
    values = torch.tensor([0.0] * 19 + [10.0])
    low, high = mean_interval(values)
    assert high - 0.5 > 1.5 * (0.5 - low)
    assert mean_interval(-values) == pytest.approx((-high, -low))


def test_the_sign_test_by_hand() -> None:
    """Of 5 coins, 1 head or fewer, or 4 or more: 2 x (1 + 5) / 32. And even counts are no evidence at all."""
    assert sign_test(1, 4) == sign_test(4, 1) == pytest.approx(12 / 32)
    assert sign_test(0, 3) == pytest.approx(2 / 8)
    assert sign_test(2, 2) == sign_test(0, 0) == 1.0


def test_the_sign_test_is_the_share_of_coin_tosses_at_least_as_uneven() -> None:
    for wins in range(9):
        uneven = [abs(2 * sum(coins) - 8) >= abs(2 * wins - 8) for coins in product((0, 1), repeat=8)]
        assert sign_test(wins, 8 - wins) == pytest.approx(sum(uneven) / 2**8)


def test_the_sign_test_of_ten_thousand_is_a_number() -> None:
    """Normal approximation with continuity correction: z = (5150 - 0.5 - 5000) / 50."""
    assert sign_test(5150, 4850) == pytest.approx(math.erfc(2.99 / math.sqrt(2)), rel=0.01)


def test_rank_correlation_by_hand_with_shared_ranks() -> None:
    """Ranks 1 2 3 4 and 2 3.5 3.5 1: sum of products of deviations -1.5 over sqrt(5 x 4.5)."""
    correlation = rank_correlation(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0, 20.0, 5.0]))
    assert correlation == pytest.approx(-1.5 / math.sqrt(22.5))


def test_rank_correlation_sees_order_alone_and_is_unknown_of_what_never_varies() -> None:
    values = torch.tensor([-1.0, 0.0, 3.0, 2.0])
    assert rank_correlation(values, values.exp()) == pytest.approx(1.0)
    assert rank_correlation(values, -values) == pytest.approx(-1.0)
    assert math.isnan(rank_correlation(values, torch.ones(4)))
    assert math.isnan(rank_correlation(values[:0], values[:0]))


def test_telling_53_percent_from_50_takes_about_2200_prompts() -> None:
    """((1.96 x 0.5 + 0.8416 x 0.4991) / 0.03)^2 = 2178."""
    assert prompts_needed(0.53) == prompts_needed(0.47) == pytest.approx(2178, abs=2)
    assert prompts_needed(0.5) is None
    assert prompts_needed(math.nan) is None


@pytest.mark.parametrize(("rate", "tie_share"), [(0.6, 0.0), (0.55, 0.3), (0.35, 0.1)])
def test_so_many_prompts_tell_in_80_of_100_worlds(rate: float, tie_share: float) -> None:
    count = prompts_needed(rate, tie_share=tie_share)
    assert count is not None
    points = worlds_of_outcomes(rate, tie_share=tie_share, count=count, generator=torch.Generator().manual_seed(14))
    told = [not low <= 0.5 <= high for low, high in (wilson_interval(point, count) for point in points)]
    assert 0.77 < sum(told) / DRAWS < 0.83


def worlds_of_outcomes(rate: float, *, tie_share: float, count: int, generator: torch.Generator) -> list[float]:
    """Wins plus half the ties of each of so many evaluations in which the true win rate is the given one."""
    uniform = torch.rand(DRAWS, count, generator=generator, dtype=torch.float64)
    wins = (uniform < rate - tie_share / 2).sum(1)
    ties = (uniform > 1 - tie_share).sum(1)
    points: list[float] = (wins + ties / 2).tolist()
    return points
