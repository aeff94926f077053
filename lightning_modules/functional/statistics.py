"""Statistics of a paired evaluation: outcomes, intervals, the sign test, rank correlation, and how many it takes."""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy import optimize, stats
from torch import Tensor

EXACT_UP_TO = 20_000
"""Prompts beyond which a normal approximation says as well how many it takes."""


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def outcomes(rewards: Float[Tensor, " pair"], reference_rewards: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """1 for a win of the policy, 0.5 for a tie, 0 for a loss, NaN where a side has no score.

    Every comparison of two scores is decided here.

    Raises:
        ValueError: If the rewards are not in double precision; single precision makes ties of close scores.
    """
    if rewards.dtype != torch.float64 or reference_rewards.dtype != torch.float64:
        raise ValueError(f"scores are compared in float64, got {rewards.dtype} and {reference_rewards.dtype}")
    result = 0.5 + 0.5 * torch.sign(rewards - reference_rewards)
    return torch.where(rewards.isnan() | reference_rewards.isnan(), torch.nan, result)


def win_rate_interval(wins: int, ties: int, losses: int, *, confidence: float = 0.95) -> Interval:
    """Interval of the win rate, ties counted half, from paired outcomes: Tango's score interval.

    It inverts the score test of (share of wins) - (share of losses), whose variance knows the ties; without ties it is
    Wilson's interval. The variance is that of n - 1 pairs, as the interval is a little narrow for few of them. Where
    :func:`sign_test` does not tell wins from losses the interval reaches to one half, so the two never contradict.

    References:
        Tango 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<891::AID-SIM780>3.0.CO;2-B, section 4
        Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    count = wins + ties + losses
    if count < 2:
        return Interval(0.0, 1.0) if count else Interval(math.nan, math.nan)
    z = float(stats.norm.ppf(0.5 + confidence / 2)) * math.sqrt(count / (count - 1))
    known = (wins, losses, count, z)
    observed = (wins - losses) / count
    off = 1e-9  # where all outcomes are alike, the observed difference itself has no variance
    low = -1.0 if wins == ties == 0 else optimize.brentq(_beyond, -1.0, observed - off, args=(1.0, *known))
    high = 1.0 if losses == ties == 0 else optimize.brentq(_beyond, observed + off, 1.0, args=(-1.0, *known))
    if sign_test(wins, losses) > 1 - confidence:
        low, high = min(low, 0.0), max(high, 0.0)
    return Interval((1 + low) / 2, (1 + high) / 2)


def _beyond(difference: float, sign: float, wins: int, losses: int, count: int, z: float) -> float:
    """Positive where a difference is more than z standard errors below (sign 1) or above (-1) the observed one."""
    # The likeliest share of losses where the share of wins minus that of losses is the given difference.
    a, b = 2 * count, (2 * count - wins + losses) * difference - wins - losses
    c = -losses * difference * (1 - difference)
    loss_share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = count * max(0.0, 2 * loss_share + difference * (1 - difference))
    return float(sign * (wins - losses - count * difference) - z * math.sqrt(variance))


def mean_interval(values: Float[Tensor, " pair"], *, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of independent values, corrected for their skewness.

    The studentised mean T is made symmetric by Hall's monotone transformation T + a T^2 + a^2 T^3 / 3 + a / 2 with
    a = skewness / (3 sqrt(count)), before t quantiles bound it; without skewness it is the plain t interval. Here the
    values are paired reward differences, of which a few broken completions can be far out on one side.

    References:
        Hall 1992, On the removal of skewness by transformation, J. R. Statist. Soc. B 54(1)
    """
    count = len(values)
    if count < 2:
        return Interval(float("nan"), float("nan"))
    mean, error = values.mean().item(), values.std().item() / count**0.5
    deviations = values - values.mean()
    spread = deviations.square().mean().item() ** 0.5
    skewness = deviations.pow(3).mean().item() / spread**3 if spread > 0 else 0.0
    a = skewness / (3 * count**0.5)
    quantile = float(stats.t.ppf(0.5 + confidence / 2, count - 1))
    return Interval(mean - _studentised(quantile, a) * error, mean - _studentised(-quantile, a) * error)


def _studentised(transformed: float, a: float) -> float:
    """The inverse of Hall's transformation."""
    if abs(a) < 1e-9:
        return transformed
    cube = 1 + 3 * a * (transformed - a / 2)
    return float((math.copysign(abs(cube) ** (1 / 3), cube) - 1) / a)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of so uneven wins and losses, were each as likely: the exact binomial; ties carry no sign.

    References:
        Dixon and Mood 1946, https://doi.org/10.1080/01621459.1946.10501898
    """
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def prompts_needed(
    win_rate: float, *, tie_share: float = 0.0, power: float = 0.8, confidence: float = 0.95
) -> int | None:
    """About how many prompts it takes until :func:`win_rate_interval` lies on one side of 50 %, with chance ``power``.

    Args:
        win_rate: The true rate, ties counted half; None comes back for 50 % itself and where it is NaN.
        tie_share: Share of ties, which tell nothing.
        power: Chance that so many prompts tell.
        confidence: Of the interval.

    References:
        Fleiss, Levin and Paik 2003, Statistical Methods for Rates and Proportions, section 2.5, for the first guess
    """
    difference = abs(win_rate - 0.5)
    if math.isnan(difference) or difference < 1e-9:
        return None
    deviation = math.sqrt(max(0.0, win_rate * (1 - win_rate) - tie_share / 4))
    bound = stats.norm.ppf(0.5 + confidence / 2) * math.sqrt(1 - tie_share) / 2
    guess = float(((bound + stats.norm.ppf(power) * deviation) / difference) ** 2)
    if guess > EXACT_UP_TO:
        return math.ceil(guess)
    low, high = int(guess / 2), math.ceil(2 * guess) + 30
    while low + 1 < high:  # the chance rises with the count, but for ripples that the discreteness makes
        middle = (low + high) // 2
        tells = chance_to_tell(middle, win_rate, tie_share=tie_share, confidence=confidence) >= power
        low, high = (low, middle) if tells else (middle, high)
    return high


def chance_to_tell(count: int, win_rate: float, *, tie_share: float, confidence: float = 0.95) -> float:
    """Exact chance that the sign test of so many pairs tells, which it does where the interval leaves out 50 %."""
    spread = 6 * math.sqrt(count * tie_share * (1 - tie_share)) + 1
    centre = count * (1 - tie_share)
    decided = np.arange(max(0, math.floor(centre - spread)), min(count, math.ceil(centre + spread)) + 1)
    wins_share = min(1.0, max(0.0, (win_rate - tie_share / 2) / (1 - tie_share)))
    few = stats.binom.ppf((1 - confidence) / 2, decided, 0.5)  # the most wins, or losses, that are too few for chance
    few = few - (2 * stats.binom.cdf(few, decided, 0.5) > 1 - confidence)
    told = stats.binom.cdf(few, decided, wins_share) + stats.binom.sf(decided - few - 1, decided, wins_share)
    return float(np.sum(stats.binom.pmf(decided, count, 1 - tie_share) * told))


def rank_correlation(first: Float[Tensor, " pair"], second: Float[Tensor, " pair"]) -> float:
    """Spearman's correlation, equal values sharing their mean rank; NaN where one of the two never varies.

    References:
        Spearman 1904, https://doi.org/10.2307/1412159
    """
    if len(first) < 2 or bool((first == first[0]).all()) or bool((second == second[0]).all()):
        return math.nan
    return float(stats.spearmanr(first.numpy(), second.numpy()).statistic)
