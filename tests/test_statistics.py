"""Statistics against published tables, by hand, and in simulated worlds where the truth is known."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor

from lightning_modules.functional.length_control import length_controlled_win_rate
from lightning_modules.functional.statistics import (
    chance_to_tell,
    mean_interval,
    outcomes,
    prompts_needed,
    rank_correlation,
    sign_test,
    win_rate_interval,
)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_higher_reward_wins_equal_reward_ties_and_a_missing_one_is_neither() -> None:
    result = outcomes(double(1.0, -5.0, 2.0, math.nan, 1.0), double(0.0, -5.0, 3.0, 0.0, math.nan))
    torch.testing.assert_close(result, double(1.0, 0.5, 0.0, math.nan, math.nan), equal_nan=True)


def test_scores_that_single_precision_takes_for_equal_are_told_apart_or_refused() -> None:
    assert outcomes(double(-20.0000001), double(-20.0000002)).item() == 1.0
    with pytest.raises(ValueError, match="float64"):
        outcomes(torch.tensor([-20.0000001]), torch.tensor([-20.0000002]))


def wilson(successes: int, count: int, z: float) -> tuple[float, float]:
    centre = (successes + z**2 / 2) / (count + z**2)
    half = z / (count + z**2) * math.sqrt(successes * (count - successes) / count + z**2 / 4)
    return centre - half, centre + half


@pytest.mark.parametrize(("wins", "losses"), [(8, 2), (0, 20), (20, 0), (70, 30), (1, 99)])
def test_without_ties_the_interval_is_wilson_s_of_one_pair_less(wins: int, losses: int) -> None:
    count = wins + losses
    expected = wilson(wins, count, 1.959964 * math.sqrt(count / (count - 1)))
    low, high = win_rate_interval(wins, 0, losses)
    if sign_test(wins, losses) <= 0.05:
        assert (low, high) == pytest.approx(expected, abs=1e-6)
    else:
        assert (low, high) == pytest.approx((min(expected[0], 0.5), max(expected[1], 0.5)), abs=1e-6)


def test_a_bound_is_where_the_score_test_of_the_likeliest_shares_is_z() -> None:
    """30 wins, 50 ties, 12 losses: the shares under a bound are found here by search, not in closed form."""
    wins, ties, losses = 30, 50, 12
    count = wins + ties + losses
    bounds = win_rate_interval(wins, ties, losses)
    for bound, sign in zip(bounds, (1, -1), strict=True):
        difference = 2 * bound - 1

        def unlikely(loss: float, difference: float = difference) -> float:
            shares = np.array([loss + difference, 1 - 2 * loss - difference, loss])
            return -float(np.array([wins, ties, losses]) @ np.log(shares))

        edges = max(0.0, -difference) + 1e-9, (1 - difference) / 2 - 1e-9
        loss = optimize.minimize_scalar(unlikely, bounds=edges, method="bounded", options={"xatol": 1e-10}).x
        variance = (2 * loss + difference - difference**2) / (count - 1)
        assert sign * ((wins - losses) / count - difference) / math.sqrt(variance) == pytest.approx(1.959964, abs=1e-4)


def test_the_interval_of_the_sides_exchanged_is_its_mirror_image() -> None:
    low, high = win_rate_interval(30, 25, 10)
    assert win_rate_interval(10, 25, 30) == pytest.approx((1 - high, 1 - low))


def test_the_interval_stays_within_zero_and_one_and_is_unknown_without_data() -> None:
    assert win_rate_interval(0, 0, 20)[0] == 0.0
    assert win_rate_interval(0, 0, 20)[1] > 0.1
    assert win_rate_interval(20, 0, 0)[1] == 1.0
    assert win_rate_interval(1, 0, 0) == (0.0, 1.0)
    low, high = win_rate_interval(0, 50, 0)
    assert 0.4 < low < 0.5 < high < 0.6
    assert all(math.isnan(bound) for bound in win_rate_interval(0, 0, 0))


def test_the_interval_and_the_sign_test_never_contradict_each_other() -> None:
    """Whatever the ties: the interval leaves 50 % out exactly where wins and losses are too uneven for chance."""
    for count in (3, 10, 25, 60):
        for ties in range(0, count, max(1, count // 8)):
            for wins in range(count - ties + 1):
                low, high = win_rate_interval(wins, ties, count - ties - wins)
                told = not low <= 0.5 <= high
                assert told == (sign_test(wins, count - ties - wins) <= 0.05), (wins, ties, count)


def test_mean_interval_by_hand() -> None:
    """Mean 3, standard deviation sqrt(2.5), five values: 3 +- 2.776445 x 1.581139 / sqrt(5)."""
    low, high = mean_interval(double(1.0, 2.0, 3.0, 4.0, 5.0))
    assert (low, high) == pytest.approx((3 - 1.963243, 3 + 1.963243), abs=1e-5)


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.706205), (3, 4.302653), (10, 2.262157), (100, 1.984217)])
def test_the_mean_s_interval_has_student_s_quantile(count: int, quantile: float) -> None:
    values = torch.arange(count, dtype=torch.float64)
    low, high = mean_interval(values)
    assert (high - low) / 2 == pytest.approx(quantile * values.std().item() / math.sqrt(count), rel=1e-6)


def biased_world(
    count: int, *, quality: float, bias: float, shift: float, ties: float = 0.0, seed: int
) -> tuple[Tensor, Tensor]:
    """Outcomes and length differences; the log-odds are ``quality`` at equal length and grow with the difference."""
    generator = torch.Generator().manual_seed(seed)
    differences = shift + 30 * torch.randn(count, generator=generator, dtype=torch.float64)
    chances = torch.sigmoid(quality + bias * torch.tanh(differences / 30))
    tied = 2 * ties * torch.minimum(chances, 1 - chances)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    outcome = torch.where(uniform < chances - tied / 2, 1.0, torch.where(uniform > chances + tied / 2, 0.0, 0.5))
    return outcome.double(), differences


def test_win_rate_at_equal_length_recovers_the_quality_behind_a_length_bias() -> None:
    outcome, differences = biased_world(20_000, quality=-0.4, bias=2.0, shift=40, seed=3)
    assert outcome.mean() > 0.7
    found = length_controlled_win_rate(outcome, differences)
    assert found.rate == pytest.approx(1 / (1 + math.exp(0.4)), abs=0.03)
    assert found.interval.high - found.interval.low < 0.08


def test_win_rate_at_equal_length_is_the_win_rate_where_length_does_not_matter() -> None:
    outcome = double(*[1.0, 0.0, 1.0, 1.0] * 50)
    differences = double(*[5.0, 5.0, -5.0, 5.0, -5.0, -5.0, 5.0, -5.0] * 25)
    assert length_controlled_win_rate(outcome, differences).rate == pytest.approx(0.75, abs=0.02)
    equal = length_controlled_win_rate(outcome, torch.zeros(200, dtype=torch.float64))
    assert equal.rate == pytest.approx(0.75)
    assert equal.interval == pytest.approx(wilson(150, 200, 1.96), abs=5e-3)


def test_ties_narrow_the_interval_at_equal_length_as_they_do_that_of_the_win_rate() -> None:
    outcome = double(*[1.0] * 45, *[0.5] * 100, *[0.0] * 55)
    found = length_controlled_win_rate(outcome, torch.zeros(200, dtype=torch.float64))
    assert found.interval == pytest.approx(win_rate_interval(45, 100, 55), abs=2e-3)
    assert found.interval.high - found.interval.low < 0.8 * (wilson(95, 200, 1.96)[1] - wilson(95, 200, 1.96)[0])


def test_win_rate_at_equal_length_of_the_sides_exchanged_is_its_complement() -> None:
    outcome, differences = biased_world(200, quality=0.3, bias=1.0, shift=10, ties=0.3, seed=5)
    there, back = (length_controlled_win_rate(*w) for w in ((outcome, differences), (1 - outcome, -differences)))
    assert back.rate == pytest.approx(1 - there.rate, abs=1e-6)
    assert back.interval == pytest.approx((1 - there.interval.high, 1 - there.interval.low), abs=1e-6)


def test_wins_alone_are_a_rate_of_one_whose_interval_says_how_many_they_were() -> None:
    """The likelihood of 25 wins falls by half the chi-square of 3.84 at the rate exp(-1.92 / 25)."""
    outcome, differences = torch.ones(25, dtype=torch.float64), torch.zeros(25, dtype=torch.float64)
    found = length_controlled_win_rate(outcome, differences)
    assert found.rate == 1.0
    assert found.interval == pytest.approx((math.exp(-1.920729 / 25), 1.0), abs=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_where_every_answer_is_longer_or_shorter_equal_length_is_unknown(sign: int) -> None:
    """True rate 0.8, every answer 600 tokens: the rate at equal length could be anything."""
    outcome, differences = biased_world(100, quality=1.4, bias=0.0, shift=0, seed=6)
    for lengths in (400 + differences, torch.full_like(differences, 400.0)):
        found = length_controlled_win_rate(outcome, sign * lengths)
        assert math.isnan(found.rate)
        assert all(map(math.isnan, found.interval))
        side = "short" if sign > 0 else "long"
        assert found.reason == f"only 0 of 100 answers are as {side} as the reference's, or {side}er"


def test_where_length_alone_decides_equal_length_is_unknown() -> None:
    found = length_controlled_win_rate(double(*[1.0] * 8, *[0.0] * 8), double(*[3.0, 4.0] * 4, *[-3.0, -4.0] * 4))
    assert math.isnan(found.rate)
    assert found.reason == "length alone tells wins from losses"
    assert length_controlled_win_rate(double(), double()).reason == "no pair has a score"


@pytest.mark.parametrize(
    ("count", "shift", "ties"),
    [
        (60, 10.0, 0.5),
        *(
            pytest.param(*world, marks=pytest.mark.slow)
            for world in [(100, 0.0, 0.0), (100, 20.0, 0.0), (200, -10.0, 0.3)]
        ),
    ],
)
def test_intervals_of_the_rate_at_equal_length_hold_it_in_95_of_100_worlds(
    count: int, shift: float, ties: float
) -> None:
    """Of 150 worlds, so within two standard errors of 95 %."""
    true = 1 / (1 + math.exp(-0.4))
    worlds = [biased_world(count, quality=0.4, bias=1.0, shift=shift, ties=ties, seed=seed) for seed in range(150)]
    held = [low <= true <= high for low, high in (length_controlled_win_rate(*world).interval for world in worlds)]
    assert 0.91 < sum(held) / len(held) < 0.99


DRAWS = 1000


def coverage(count: int, rate: float, tie_share: float) -> float:
    """Exact chance, over every outcome of so many pairs, that the interval holds the true rate."""
    shares = np.array([rate - tie_share / 2, tie_share, 1 - rate - tie_share / 2]).round(12)
    held = 0.0
    for ties in range(count + 1) if tie_share else (0,):
        wins = np.arange(count - ties + 1)
        chances = stats.multinomial.pmf(
            np.stack([wins, np.full_like(wins, ties), count - ties - wins], 1), count, shares
        )
        for number in wins[chances > 1e-5]:
            low, high = win_rate_interval(int(number), ties, count - ties - int(number))
            held += chances[number] * (low - 1e-9 <= rate <= high + 1e-9)
    return held


def test_intervals_of_the_win_rate_hold_it_in_95_of_100_worlds_whatever_the_ties() -> None:
    """No ties to four in five of them, 25 to 300 prompts, and every rate that such a share allows."""
    found = {
        (count, tie_share, rate): coverage(count, rate, tie_share)
        for count, tie_shares in ((25, (0.0, 0.2, 0.5, 0.8)), (35, (0.0, 0.5)), (70, (0.0, 0.8)), (300, (0.0,)))
        for tie_share in tie_shares
        for rate in (0.1, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9)
        if tie_share / 2 <= rate <= 1 - tie_share / 2
    }
    assert 0.94 < sum(found.values()) / len(found) < 0.97
    assert min(found.values()) > 0.925, min(found, key=lambda world: found[world])


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
    values = double(*[0.0] * 19, 10.0)
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
    """((1.96 x 0.5 + 0.8416 x 0.4991) / 0.03)^2 = 2178, and 33 more for the discreteness of counts."""
    assert prompts_needed(0.53) == prompts_needed(0.47) == pytest.approx(2211, rel=0.02)
    assert prompts_needed(0.5001) == pytest.approx((1.959964 + 0.841621) ** 2 / 4 / 0.0001**2, rel=1e-3)
    assert prompts_needed(0.5) is None
    assert prompts_needed(math.nan) is None


def test_ties_tell_nothing_so_the_same_rate_beside_more_of_them_takes_fewer_prompts() -> None:
    """Its wins and losses are then the more uneven: 60 % with half ties is four wins to one loss."""
    assert prompts_needed(0.6, tie_share=0.5) < prompts_needed(0.6) / 1.7  # type: ignore[operator]


@pytest.mark.parametrize(("rate", "tie_share"), [(0.6, 0.0), (0.55, 0.3), (0.35, 0.1), (0.8, 0.0), (0.75, 0.5)])
def test_so_many_prompts_tell_in_80_of_100_worlds(rate: float, tie_share: float) -> None:
    """Down to the 14 of the last, as the chance is exact; what tells is the interval itself."""
    count = prompts_needed(rate, tie_share=tie_share)
    assert count is not None
    worlds = worlds_of_outcomes(rate, tie_share=tie_share, count=count, generator=torch.Generator().manual_seed(14))
    told = [not low <= 0.5 <= high for low, high in (win_rate_interval(*world) for world in worlds)]
    assert 0.76 < sum(told) / DRAWS < 0.86
    assert sum(told) / DRAWS == pytest.approx(chance_to_tell(count, rate, tie_share=tie_share), abs=0.04)


def worlds_of_outcomes(
    rate: float, *, tie_share: float, count: int, generator: torch.Generator
) -> list[tuple[int, int, int]]:
    """Wins, ties and losses of each of so many evaluations in which the true win rate is the given one."""
    uniform = torch.rand(DRAWS, count, generator=generator, dtype=torch.float64)
    wins = (uniform < rate - tie_share / 2).sum(1)
    ties = (uniform > 1 - tie_share).sum(1)
    return list(zip(wins.tolist(), ties.tolist(), (count - wins - ties).tolist(), strict=True))
