"""What a win rate would be at equal length, how well the data knows it, and where it does not."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import optimize, special, stats
from torch import Tensor

from lightning_modules.functional.statistics import Interval

SUPPORT = 5
"""Pairs that must be on either side of equal length, so that it is not beyond all that was seen."""
STEEPEST = 25.0
"""Slope beyond which length decides every outcome, and any intercept fits as well."""
SURE = 30.0
"""Log-odds that stand for certainty."""


class LengthControlled(NamedTuple):
    """The win rate at equal length, NaN where it is not identified, and then why."""

    rate: float
    interval: Interval
    reason: str = ""


def length_controlled_win_rate(
    outcome: Float[Tensor, " pair"], length_differences: Float[Tensor, " pair"], *, confidence: float = 0.95
) -> LengthControlled:
    """A logistic fit of the outcome on the length difference, read where the difference is 0.

    log-odds = a + b tanh(difference / its standard deviation); the rate is sigmoid(a). The interval is that of the
    profile likelihood of a. Ties are outcomes of one half: the likelihood is then a quasi-likelihood, whose dispersion
    is the share of a coin's variance that they leave.

    Args:
        outcome: 1, 0.5 or 0 for each scored pair.
        length_differences: Policy tokens minus reference tokens.
        confidence: Of the interval.

    References:
        Dubois et al. 2024, section 3, https://arxiv.org/abs/2404.04475, without its instruction-difficulty term
        McCullagh and Nelder 1989, Generalized Linear Models, sections 7.2.4 and 9.2
    """
    if reason := _not_identified(length_differences):
        return _unknown(reason)
    target, lengths = outcome.numpy().astype(np.float64), length_differences.numpy().astype(np.float64)
    scaled = np.tanh(lengths / max(lengths.std(), 1e-9))
    intercept = _intercept(target, scaled)
    slope = _slope(target, scaled, intercept)
    if abs(slope) > STEEPEST:
        return _unknown("length alone tells wins from losses")
    chances = special.expit(intercept + slope * scaled)
    coins, tied = float((chances * (1 - chances)).sum()), int((target == 0.5).sum())
    dispersion = max(1 / len(target), 1 - tied / 4 / coins) if tied else 1.0
    least = _log_likelihood(intercept, target, scaled) - dispersion * float(stats.chi2.ppf(confidence, 1)) / 2
    known = (target, scaled, least)
    low = (
        optimize.brentq(_log_likelihood, -SURE, intercept, args=known) if _log_likelihood(-SURE, *known) < 0 else -SURE
    )
    high = optimize.brentq(_log_likelihood, intercept, SURE, args=known) if _log_likelihood(SURE, *known) < 0 else SURE
    return LengthControlled(_share(intercept), Interval(_share(low), _share(high)))


def _not_identified(lengths: Float[Tensor, " pair"]) -> str:
    """Why lengths say nothing of equal length; empty where they do."""
    count = len(lengths)
    if count == 0:
        return "no pair has a score"
    for side, number in (("short", int((lengths <= 0).sum())), ("long", int((lengths >= 0).sum()))):
        if number < min(SUPPORT, count):
            return f"only {number} of {count} answers are as {side} as the reference's, or {side}er"
    return ""


def _unknown(reason: str) -> LengthControlled:
    return LengthControlled(math.nan, Interval(math.nan, math.nan), reason)


def _share(log_odds: float) -> float:
    """The chance; of log-odds at the edge 0 or 1."""
    return float(log_odds > 0) if abs(log_odds) >= SURE else 1 / (1 + math.exp(-log_odds))


def _intercept(target: np.ndarray, scaled: np.ndarray) -> float:
    """The likeliest one; at the edge where there are wins alone, or losses alone."""
    known = (target, scaled)
    if _intercept_too_high(-SURE, *known) >= 0 or _intercept_too_high(SURE, *known) <= 0:
        return math.copysign(SURE, -_intercept_too_high(0.0, *known))
    return float(optimize.brentq(_intercept_too_high, -SURE, SURE, args=known))


def _intercept_too_high(intercept: float, target: np.ndarray, scaled: np.ndarray) -> float:
    """Minus the derivative of the profile likelihood."""
    return float((special.expit(intercept + _slope(target, scaled, intercept) * scaled) - target).sum())


def _slope(target: np.ndarray, scaled: np.ndarray, intercept: float) -> float:
    """The likeliest one beside an intercept; at the edge where steeper is likelier, 0 where lengths are equal."""
    known = (target, scaled, intercept)
    edge = 4 * STEEPEST
    if _slope_too_high(-edge, *known) >= 0:
        return -edge if _slope_too_high(edge, *known) > 0 else 0.0
    return (
        edge if _slope_too_high(edge, *known) <= 0 else float(optimize.brentq(_slope_too_high, -edge, edge, args=known))
    )


def _slope_too_high(slope: float, target: np.ndarray, scaled: np.ndarray, intercept: float) -> float:
    """Minus the derivative of the likelihood."""
    return float((scaled * (special.expit(intercept + slope * scaled) - target)).sum())


def _log_likelihood(intercept: float, target: np.ndarray, scaled: np.ndarray, least: float = 0.0) -> float:
    """Of an intercept and the likeliest slope beside it, above what is given."""
    odds = intercept + _slope(target, scaled, intercept) * scaled
    return float((target * odds - np.logaddexp(0, odds)).sum()) - least
