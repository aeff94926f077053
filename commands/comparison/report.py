"""``report.html``: one file with charts, tables and completions side by side, readable without a network."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from callbacks.evaluation.result import Group
from callbacks.evaluation.result_record import is_number
from commands.comparison.browser import browser_data
from commands.comparison.charts import colours, curve_charts, epoch_chart, length_chart, reward_chart, win_rate_chart
from commands.comparison.runs import Run
from commands.comparison.tables import COLUMNS, headline_cells, interval, pairwise_cell, percent

BREAKDOWNS = (("win_rate_by_prompt_length", "By prompt length"), ("win_rate_by_source", "By source"))


def render_report(runs: list[Run], matches: list[dict[str, Any]], *, answers: list[str], notes: list[str]) -> str:
    """The page; all text from models and data is escaped.

    Args:
        runs: At least one of them evaluated.
        matches: Of ``pairwise``.
        answers: Whether they got better, in words.
        notes: Why the figures may not be trusted or compared.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    evaluated = [run for run in runs if run.headline]
    charts = Charts()
    overview = (win_rate_chart(evaluated), epoch_chart(runs), reward_chart(evaluated), length_chart(evaluated))
    return environment.get_template("report.html.jinja").render(
        rows=[(run.name, run.method, headline_cells(run.result)) for run in evaluated],
        columns=COLUMNS,
        answers=answers,
        notes=notes,
        judges=list(dict.fromkeys(run.result.reward_source for run in evaluated)),
        references=list(dict.fromkeys(run.result.reference for run in evaluated)),
        prompts=sorted({run.result.prompts for run in evaluated}),
        names=[run.name for run in evaluated],
        colours=colours(runs),
        cells={(match["row"], match["column"]): pairwise_cell(match) for match in matches},
        overview=[charts.add(figure) for figure in overview if figure],
        breakdowns=[(title, rows) for key, title in BREAKDOWNS if (rows := breakdown(evaluated, key))],
        curves=[(run.name, [charts.add(figure) for figure in curve_charts(run)]) for run in runs],
        calls=[row for run in runs for row in calls(run)],
        runs=runs,
        charts=charts.figures,
        examples=browser_data(evaluated),
        plotly=Markup(get_plotlyjs()),  # the library's own source
    )


class Charts:
    """The figures of the page in the order of their places in it."""

    def __init__(self) -> None:
        self.figures: list[dict[str, Any]] = []

    def add(self, figure: go.Figure) -> dict[str, Any]:
        """Keep the figure; its place, its title and its height in pixels."""
        self.figures.append(json.loads(figure.to_json()))
        return {"place": len(self.figures) - 1, "title": figure.layout.meta["title"], "height": figure.layout.height}


def breakdown(runs: list[Run], key: str) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """For each group of prompts, each run's win rate on it with its interval, or None."""
    groups = [{group.label: group for group in getattr(run.result, key)} for run in runs]
    labels = list(dict.fromkeys(label for found in groups for label in found))
    return [(label, [shown(found[label]) if label in found else None for found in groups]) for label in labels]


def shown(group: Group) -> dict[str, Any]:
    """A group's win rate as text, and where its interval lies in per cent."""
    low, high = (100 * bound if is_number(bound) else None for bound in group.win_rate_ci)
    return {
        "rate": percent(group.win_rate),
        "interval": interval(group.win_rate_ci, percent),
        "prompts": group.prompts,
        "bar": None if low is None or high is None else (low, 100 * group.win_rate, high),
    }


def calls(run: Run) -> list[dict[str, Any]]:
    """For each evaluation of the run that says so, what became of its requests."""
    evaluations = [(f"after epoch {epoch + 1}", result) for epoch, result in sorted(run.epochs.items())]
    if run.headline is not None and run.headline_from == "final":
        evaluations.append(("final", run.headline))
    return [
        {
            "run": run.name,
            "evaluation": name,
            "failed_pairs": result.failed,
            **dataclasses.asdict(result.calls),
            "reasons": ", ".join(f"{reason}: {count}" for reason, count in result.calls.reasons.items()),
        }
        for name, result in evaluations
        if result.calls is not None
    ]
