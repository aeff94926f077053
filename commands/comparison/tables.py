"""Figures as people read them, and the tables of the terminal."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from callbacks.evaluation.result import TABLED, EvaluationResult, Unit
from callbacks.evaluation.result_record import is_number
from commands.comparison.runs import Run

WIDE = 150
"""Characters that a row of all headline metrics takes."""
COLUMNS = ("run", *(figure.title for figure in TABLED.values()), "W/T/L/failed")


def headline_table(runs: list[Run], *, width: int = WIDE) -> Table:
    """The headline metrics: a row a run, or where the terminal is narrow a column a run."""
    rows = [
        (run.name, *(" ".join(cell).strip() for cell in headline_cells(run.headline))) for run in runs if run.headline
    ]
    lines = [COLUMNS, *rows]
    if width < WIDE:
        lines = list(zip(*lines, strict=True))
    table = Table(
        title="Against the reference, on held-out prompts (95 % intervals, p of the sign test)",
        caption="at equal length: by a logistic fit of outcomes on differences in tokens; - where these do not tell",
    )
    for place, column in enumerate(lines[0]):
        table.add_column(Text(column), justify="left" if place == 0 else "right", no_wrap=True)
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    return table


def headline_cells(result: EvaluationResult) -> list[tuple[str, str]]:
    """The headline figures as text, each with its interval or nothing."""
    cells = []
    for name, figure in TABLED.items():
        shown = SHOWN.get(figure.unit, number)
        bounds = result.interval(name)
        cells.append((shown(getattr(result, name)), "" if bounds is None else interval(bounds, shown)))
    return [*cells, (f"{result.wins}/{result.ties}/{result.losses}/{result.failed}", "")]


def pairwise_table(matches: list[dict[str, Any]]) -> Table:
    """Row against column."""
    table = Table(title="Row against column, on the same prompts: win rate, mean reward difference", show_lines=True)
    names = list(dict.fromkeys(match["row"] for match in matches))
    for column in ("run", *names):
        table.add_column(Text(column), justify="left" if column == "run" else "right")
    cells = {(match["row"], match["column"]): pairwise_cell(match) for match in matches}
    for row in names:
        found = (cells.get((row, column), ()) for column in names)
        table.add_row(Text(row), *(Text("\n".join(" ".join(line).strip() for line in cell)) for cell in found))
    return table


def pairwise_cell(match: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Lines of a value and its interval: win rate, reward difference, prompts; or why there are none."""
    if "note" in match:
        return ((match["note"], ""),)
    return (
        (percent(match["win_rate"]), interval(match["win_rate_ci"], percent)),
        (signed(match["reward_difference"]), interval(match["reward_difference_ci"], signed)),
        (f"{match['prompts']} prompts", ""),
    )


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return f"{100 * value:.1f} %" if is_number(value) else "-"  # type: ignore[operator]


def number(value: float | None) -> str:
    """A number with two decimals."""
    return f"{value:.2f}" if is_number(value) else "-"


def signed(value: float | None) -> str:
    """A difference with two decimals and its sign."""
    return f"{value:+.2f}" if is_number(value) else "-"


def probability(value: float | None) -> str:
    """A p value with two digits that count."""
    if not is_number(value):
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.2g}"  # type: ignore[operator]


def interval(bounds: Sequence[float | None], shown: Callable[[float | None], str]) -> str:
    """An interval in brackets, or nothing."""
    if not all(is_number(bound) for bound in bounds):
        return ""
    return f"[{shown(bounds[0]).removesuffix(' %')}, {shown(bounds[1]).removesuffix(' %')}]"


SHOWN: dict[Unit, Callable[[float | None], str]] = {Unit.SHARE: percent, Unit.PROBABILITY: probability}
"""How figures are shown; those of other units with two decimals."""
