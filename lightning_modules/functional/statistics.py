"""Statistics of a paired evaluation: win rate, intervals, sign test, and what length has to do with it."""

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
    """Wilson's score interval of a proportion.

    Ties may enter ``successes`` as halves. That is conservative: an outcome that may be a tie varies less than a coin
    does, so the interval is wider than it need be.

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
    quantile = student_t_quantile(0.5 + confidence / 2, count - 1)
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
    count = wins + losses
    ways = below = 1
    for i in range(min(wins, losses)):
        ways = ways * (count - i) // (i + 1)
        below += ways
    return min(1.0, float(2 * below / 2**count))


def prompts_needed(
    win_rate: float, *, tie_share: float = 0.0, power: float = 0.8, confidence: float = 0.95
) -> int | None:
    """How many prompts it takes until Wilson's interval lies on one side of 50 %, with the chance ``power``.

    Args:
        win_rate: The true rate, ties counted half; None comes back for 50 % itself and where it is NaN.
        tie_share: Share of ties, which lower the variance of an outcome below that of a coin.
        power: Chance that so many prompts tell.
        confidence: Of the interval.

    References:
        Fleiss, Levin and Paik 2003, Statistical Methods for Rates and Proportions, section 2.5
    """
    difference = abs(win_rate - 0.5)
    if math.isnan(difference) or difference < 1e-9:
        return None
    deviation = math.sqrt(max(0.0, win_rate * (1 - win_rate) - tie_share / 4))
    bound = NormalDist().inv_cdf(0.5 + confidence / 2) * 0.5  # the interval reaches 50 % at a coin's deviation
    return math.ceil(((bound + NormalDist().inv_cdf(power) * deviation) / difference) ** 2)


def rank_correlation(first: Float[Tensor, " pair"], second: Float[Tensor, " pair"]) -> float:
    """Spearman's correlation, equal values sharing their mean rank; NaN where one of the two never varies.

    References:
        Spearman 1904, https://doi.org/10.2307/1412159
    """
    ranks = torch.stack([_mean_ranks(first), _mean_ranks(second)])
    deviations = ranks - ranks.mean(dim=1, keepdim=True)
    scale = deviations.square().sum(dim=1).prod().sqrt()
    return (deviations.prod(dim=0).sum() / scale).item() if scale > 0 else float("nan")


def _mean_ranks(values: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    _, group, sizes = values.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = sizes.cumsum(0).double() - (sizes.double() - 1) / 2
    return ranks.index_select(0, group)


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
