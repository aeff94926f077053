"""Whether they got better, in words: each run against its reference, and the runs against each other."""

from collections.abc import Sequence
from typing import Any

from callbacks.evaluation.metrics import cannot_tell
from callbacks.evaluation.result import EvaluationResult
from callbacks.evaluation.result_record import is_number
from commands.comparison.runs import Run
from commands.comparison.tables import interval, number, percent


def verdicts(runs: list[Run], matches: list[dict[str, Any]]) -> list[str]:
    """A sentence for each evaluated run, and one for each two runs on the same prompts; all follow from intervals.

    Args:
        runs: As ``read_runs`` gives them.
        matches: Of ``pairwise``.
    """
    alone = [against_reference(run) for run in runs if run.headline]
    seen: set[frozenset[str]] = set()
    for match in matches:
        names = frozenset((match["row"], match["column"]))
        if names not in seen and "note" not in match:
            alone.append(against_each_other(match))
            seen.add(names)
    return alone


def against_reference(run: Run) -> str:
    """Whether a run's model is better than its reference, and whether it still is at equal length."""
    result = run.result
    if not result.valid or not is_number(result.win_rate):
        return f"{run.name}: not known; {result.failed} of {result.prompts} pairs have no score."
    side = side_of(result.win_rate_ci)
    if not side:
        return f"{run.name}: not to be told from the reference; {cannot_tell(result)}.{length_told(result, side)}"
    answer = {1: "yes, better than the reference", -1: "no, worse than the reference"}[side]
    return f"{run.name}: {answer}; it wins {rate_told(result)}.{length_told(result, side)}{reward_told(result, side)}"


def length_told(result: EvaluationResult, side: int) -> str:
    """What equal length makes of the answer, where the data tell it, and otherwise why they do not."""
    rate, bounds = result.length_controlled_win_rate, result.length_controlled_win_rate_ci
    if not all(map(is_number, (rate, *bounds))):
        note = result.length_controlled_note
        return f" At equal length: not known ({note})." if note else ""
    told = f"{percent(rate)} {interval(bounds, percent)}"
    ratio = f"its answers are {number(result.length_ratio)} times as long"
    at_equal_length = side_of(bounds)
    if at_equal_length == side:
        return f" At equal length too: {told}." if side else ""
    if at_equal_length == 0:
        return f" But at equal length that is not to be told: {told}; {ratio}."
    better = "better" if at_equal_length > 0 else "worse"
    return f" But at equal length it is {better}: {told}; {ratio}."


def reward_told(result: EvaluationResult, side: int) -> str:
    """A warning where the mean reward moved the other way than the win rate."""
    bounds = result.reward_improvement_ci
    if not all(map(is_number, bounds)) or side_of(bounds, even=0.0) != -side:
        return ""
    improvement = number(result.reward_improvement)
    return f" But its mean reward differs by {improvement} {interval(bounds, number)}: a few answers weigh heavily."


def against_each_other(match: dict[str, Any]) -> str:
    """Which of two runs is better on the prompts that both answered, the better one first."""
    names, rate, bounds = (match["row"], match["column"]), match["win_rate"], match["win_rate_ci"]
    side = side_of(bounds)
    if side < 0:
        names, rate, bounds = names[::-1], 1 - rate, [1 - bound for bound in reversed(bounds)]
    told = f"{percent(rate)} {interval(bounds, percent)} of {match['prompts']:,} prompts"
    if not side:
        return f"{names[0]} and {names[1]} are not to be told apart: {names[0]} wins {told}."
    return f"{names[0]} is better than {names[1]}: it wins {told}."


def rate_told(result: EvaluationResult) -> str:
    """The win rate with its interval and of how many pairs it is."""
    return f"{percent(result.win_rate)} {interval(result.win_rate_ci, percent)} of {result.scored:,} prompts"


def side_of(bounds: Sequence[float], *, even: float = 0.5) -> int:
    """1 where an interval lies above what makes no difference, -1 below, 0 where it holds it."""
    low, high = bounds
    return 1 if low > even else -1 if high < even else 0
