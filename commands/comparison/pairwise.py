"""Method against method, paired: each run's completions against each other run's, on the prompts both answered."""

from typing import Any

import torch

from callbacks.evaluation.metrics import win_rate
from callbacks.evaluation.result_record import is_number
from commands.comparison.runs import Run
from core.files import without_nan
from lightning_modules.functional.statistics import mean_interval, outcomes, win_rate_interval


def pairwise(runs: list[Run]) -> list[dict[str, Any]]:
    """Every evaluated run (``row``) against every other (``column``)."""
    evaluated = [run for run in runs if run.headline]
    return [against(row, column) for row in evaluated for column in evaluated if row is not column]


def against(row: Run, column: Run) -> dict[str, Any]:
    """The win rate of ``row`` over ``column`` and the mean of the paired reward differences, with 95 % intervals.

    Only prompts count to which both have a scored completion. Scores of two judges are never set against each other:
    then there is a ``note`` and no number.
    """
    names = {"row": row.name, "column": column.name}
    judges = row.result.reward_source, column.result.reward_source
    if judges[0] != judges[1]:
        return {**names, "note": f"different judges ({judges[0]}, {judges[1]})"}
    rewards = [(pair["reward"], column.pairs.get(key, {}).get("reward")) for key, pair in row.pairs.items()]
    scored = [(own, other) for own, other in rewards if is_number(own) and is_number(other)]
    if not scored:
        return {**names, "note": "no prompt with a score from both"}
    own, other = torch.tensor(scored, dtype=torch.float64).unbind(1)
    result = outcomes(own, other)
    wins, losses = int((result == 1).sum()), int((result == 0).sum())
    ties = len(scored) - wins - losses
    differences = own - other
    numbers = {
        "prompts": len(scored),
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "win_rate": win_rate(wins, ties, losses),
        "win_rate_ci": list(win_rate_interval(wins, ties, losses)),
        "reward_difference": differences.mean().item(),
        "reward_difference_ci": list(mean_interval(differences)),
    }
    return {**names, **without_nan(numbers)}
