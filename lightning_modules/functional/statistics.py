"""Statistics of a paired evaluation: win rate, 95 % intervals, tests, lengths, and how many prompts it takes."""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def outcomes(rewards: Float[Tensor, " pair"], reference_rewards: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """1 for a win of the policy, 0.5 for a tie, 0 for a loss, NaN where a side has no score."""
    result = 0.5 + 0.5 * torch.sign(rewards - reference_rewards)
    return torch.where(rewards.isnan() | reference_rewards.isnan(), torch.nan, result)


def wilson_interval(successes: float, count: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion; ties may enter ``successes`` as halves.

    A tie varies less than a win or a loss does, so with ties the interval is wider than it need be, never narrower.

    References:
        Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    if count == 0:
        return Interval(float("nan"), float("nan"))
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def student_t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t, by the Cornish-Fisher expansion; within 1 % from 4 degrees of freedom on.

    References:
        Abramowitz and Stegun 1964, 26.7.5
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(degrees) ** power for power, term in enumerate(terms, start=1))


def mean_interval(values: Float[Tensor, " pair"], *, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of independent values, here paired reward differences."""
    count = len(values)
    if count < 2:
        return Interval(float("nan"), float("nan"))
    mean = values.mean().item()
    half = student_t_quantile(0.5 + confidence / 2, count - 1) * values.std().item() / count**0.5
    return Interval(mean - half, mean + half)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of as uneven a split where a win is as likely as a loss, exact; ties do not enter.

    References:
        Dixon and Mood 1946, https://doi.org/10.1080/01621459.1946.10501898
    """
    count, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << count))


def rank_correlation(first: Float[Tensor, " pair"], second: Float[Tensor, " pair"]) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; NaN where one side does not vary.

    References:
        Spearman 1904, https://doi.org/10.2307/1412159
    """
    deviations = [ranks - ranks.mean() for ranks in map(_mean_ranks, (first, second))] if len(first) else []
    if not deviations or any((deviation == 0).all() for deviation in deviations):
        return math.nan
    x, y = deviations
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())


def _mean_ranks(values: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last: Tensor = counts.cumsum(0).double()
    ranks: Tensor = last - (counts.double() - 1) / 2
    return ranks[inverse]


def prompts_needed(win_rate: float, *, confidence: float = 0.95, power: float = 0.8) -> float:
    """How many prompts it takes to tell a true win rate from one half; NaN where it is one half.

    The normal approximation without ties, which only lower the number.

    Args:
        win_rate: The true win rate.
        confidence: Of the two-sided interval that is to leave out one half.
        power: Probability that it does.

    References:
        Fleiss, Levin and Paik 2003, Statistical Methods for Rates and Proportions, section 2.5
    """
    if win_rate == 0.5 or math.isnan(win_rate):
        return math.nan
    at_half = NormalDist().inv_cdf(0.5 + confidence / 2) * 0.5
    at_rate = NormalDist().inv_cdf(power) * (win_rate * (1 - win_rate)) ** 0.5
    return float(math.ceil(((at_half + at_rate) / (win_rate - 0.5)) ** 2))


def length_controlled_win_rate(
    outcome: Float[Tensor, " pair"], length_differences: Float[Tensor, " pair"], *, ridge: float = 0.01
) -> float:
    """The win rate expected at equal length, from a logistic fit of the outcome on the length difference.

    The fit is logit P(win) = a + b * tanh(difference / standard deviation), and the answer sigmoid(a). A small
    ridge keeps it finite where the outcomes are separable.

    Args:
        outcome: 1, 0.5 or 0 for each scored pair.
        length_differences: Policy tokens minus reference tokens.
        ridge: Weight of the squared coefficients, in pairs.

    References:
        Dubois et al. 2024, section 3, https://arxiv.org/abs/2404.04475, without its instruction-difficulty term
    """
    if len(outcome) == 0:
        return float("nan")
    target, lengths = outcome.double(), length_differences.double()
    spread = lengths.std(correction=0).clamp(min=1e-9)
    features = torch.stack([torch.ones_like(lengths), torch.tanh(lengths / spread)], dim=1)
    weights = torch.zeros(2, dtype=torch.float64)
    penalty = ridge * torch.eye(2, dtype=torch.float64)
    for _ in range(100):  # Newton's method; the penalised likelihood is strictly concave
        probabilities = torch.sigmoid(features @ weights)
        gradient = features.T @ (target - probabilities) - penalty @ weights
        curvature = (features * (probabilities * (1 - probabilities)).unsqueeze(1)).T @ features + penalty
        step = torch.linalg.solve(curvature, gradient)
        weights = weights + step.clamp(-2.0, 2.0)
        if step.abs().max() < 1e-10:
            break
    return float(torch.sigmoid(weights[0]))
