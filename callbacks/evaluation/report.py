"""What an evaluation tells: lines for people, numbers and a table for loggers."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from callbacks.evaluation.metrics import Pair, cannot_tell, evaluation_metrics
from callbacks.logging.metrics_file import MetricsFile

COUNTS = {"wins", "ties", "losses", "failed", "prompts", "valid"}


def report(metrics: dict[str, Any], reasons: Sequence[str]) -> None:
    """Print the headline, and what is wrong with it.

    Args:
        metrics: Of ``metrics.json``.
        reasons: Why scores are missing, where some are.
    """
    low, high = metrics["win_rate_ci"]
    rank_zero_info(
        f"evaluation on {metrics['prompts']} prompts: win rate {shown(metrics['win_rate'])} "
        f"[{shown(low)}, {shown(high)}], {metrics['wins']} wins, {metrics['ties']} ties, "
        f"{metrics['losses']} losses, {metrics['failed']} failed; "
        f"reward {shown(metrics['average_reward'])} against {shown(metrics['average_reference_reward'])}, "
        f"length ratio {shown(metrics['length_ratio'])}"
    )
    if unsure := cannot_tell(metrics):
        rank_zero_info(unsure)
    if not metrics["valid"]:
        rank_zero_warn(
            f"the evaluation is not valid: {metrics['failed']} of {metrics['prompts']} pairs have no score "
            f"({'; '.join(reasons) or 'the reward source gave none'}); what is scored is kept, so another one goes on "
            "from there"
        )


def log_pairs(loggers: Sequence[Logger], pairs: Sequence[Pair]) -> None:
    """The pairs as a table, for the loggers that take one."""
    columns = list(Pair.__annotations__)
    rows = [[json.dumps(value) if isinstance(value, list) else value for value in pair] for pair in pairs]
    for logger in loggers:
        if hasattr(logger, "log_table") and not isinstance(logger, MetricsFile):
            logger.log_table("eval/pairs", columns=columns, data=rows)


def logged_numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics under ``eval/``; of an evaluation that is not valid the counts alone, and NaN for the rest."""
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
    for name in ("win_rate", "length_controlled_win_rate", "reward_improvement"):
        numbers[f"{name}_low"], numbers[f"{name}_high"] = metrics[f"{name}_ci"]
    if not metrics["valid"]:
        numbers = {name: value if name in COUNTS else math.nan for name, value in numbers.items()}
    return {f"eval/{name}": value for name, value in numbers.items()}


def logged_names() -> set[str]:
    """The names of all that an evaluation logs."""
    return set(logged_numbers({**evaluation_metrics([]), "valid": False}))


def calls_told(calls: Counter[str]) -> dict[str, Any]:
    """How many conversations were asked about or known, and what became of the requests."""
    counted = ("asked", "cached", "requests")
    reasons = {name: count for name, count in sorted(calls.items()) if name not in counted}
    return {
        **{name: calls[name] for name in counted},
        "failed_requests": sum(reasons.values()),
        "reasons": reasons,
    }


def shown(value: float) -> str:
    """A number for people; a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:.3f}"
