"""Figures as people read them, and the tables of the terminal."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from callbacks.evaluation.result import TABLED, EvaluationResult, Unit
from callbacks.evaluation.result_record import is_number
from commands.comparison.runs import Run

WIDE, NARROW = 150, 100
"""Columns of a terminal as it is taken to be, and of one below which intervals stand under their figures."""
FRAME = 3
"""Columns that a table takes beside each of its own."""
COLUMNS = ("run", *(figure.title for figure in TABLED.values()), "W/T/L/failed")


def headline_tables(runs: Sequence[Run], *, width: int = WIDE) -> list[Table]:
    """The headline metrics: a row a run, or where the terminal is narrow a column a run, in as many tables as it takes.

    Args:
        runs: Those without an evaluation are in none.
        width: Of the terminal, in columns.
    """
    cells = {run.name: headline_cells(run.headline) for run in runs if run.headline}
    rows = [COLUMNS, *((name, *(" ".join(cell).strip() for cell in figures)) for name, figures in cells.items())]
    if sum(widest(column) + FRAME for column in zip(*rows, strict=True)) < width:
        return [table(rows)]
    between = "\n" if width < NARROW else " "
    columns = [(name, *(between.join(cell).strip() for cell in figures)) for name, figures in cells.items()]
    return [table(list(zip(COLUMNS, *group, strict=True))) for group in fitting(columns, width=width)]


def fitting(columns: Sequence[tuple[str, ...]], *, width: int) -> Iterator[list[tuple[str, ...]]]:
    """Columns in groups that each stand beside the names of the figures, at least one of them."""
    taken, group = widest(COLUMNS) + FRAME, list[tuple[str, ...]]()
    for column in columns:
        needed = widest(column) + FRAME
        if group and taken + needed + 1 > width:
            yield group
            taken, group = widest(COLUMNS) + FRAME, []
        group.append(column)
        taken += needed
    yield group


def widest(cells: Sequence[str]) -> int:
    """How many columns the longest line of any cell takes."""
    return max(Text(line).cell_len for cell in cells for line in cell.split("\n"))


def table(lines: Sequence[Sequence[str]]) -> Table:
    """A table whose first line has the titles."""
    made = Table(
        title="Against the reference, on held-out prompts (95 % intervals, p of the sign test)",
        caption="at equal length: by a logistic fit of outcomes on differences in tokens; - where these do not tell",
    )
    for place, column in enumerate(lines[0]):
        made.add_column(Text(column), justify="left" if place == 0 else "right", no_wrap=True)
    for line in lines[1:]:
        made.add_row(*map(Text, line))
    return made


def headline_cells(result: EvaluationResult) -> list[tuple[str, str]]:
    """The headline figures as text, each with its interval or nothing."""
    cells = []
    for name, figure in TABLED.items():
        shown = SHOWN.get(figure.unit, number)
        bounds = result.interval(name)
        cells.append((shown(getattr(result, name)), "" if bounds is None else interval(bounds, shown)))
    return [*cells, (f"{result.wins}/{result.ties}/{result.losses}/{result.failed}", "")]


def pairwise_table(matches: list[dict[str, Any]], *, width: int = WIDE) -> Table:
    """Row against column; where the terminal is too narrow for that a row a pair."""
    title = "Row against column, on the same prompts: win rate, mean reward difference"
    names = list(dict.fromkeys(match["row"] for match in matches))
    cells = {(match["row"], match["column"]): told(match) for match in matches}
    needed = widest(names) + FRAME + sum(widest([name, *cells.values()]) + FRAME for name in names) + 1
    if needed > width:
        made = Table(title="The first against the second, on the same prompts: win rate, mean reward difference")
        made.add_column("runs")
        made.add_column("", justify="right", no_wrap=True)
        for (row, column), cell in cells.items():
            if names.index(row) > names.index(column):
                made.add_row(Text(f"{row}\nagainst {column}"), Text(cell), end_section=True)
        return made
    made = Table(title=title, show_lines=True)
    for column in ("run", *names):
        made.add_column(Text(column), justify="left" if column == "run" else "right")
    for row in names:
        made.add_row(Text(row), *(Text(cells.get((row, column), "")) for column in names))
    return made


def told(match: dict[str, Any]) -> str:
    """A pair's figures, a line each."""
    return "\n".join(" ".join(line).strip() for line in pairwise_cell(match))


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
