"""A comparison as a W&B run: the report's tables, and the report."""

import os
from pathlib import Path
from typing import Any, Literal

import wandb

from callbacks.evaluation.result import CI, FIELDS, FIGURES
from callbacks.logging.tracking import WandbTracking
from commands.comparison.browser import browser_data
from commands.comparison.runs import Run

PAIRWISE = (
    "row",
    "column",
    "prompts",
    "wins",
    "ties",
    "losses",
    "win_rate",
    "win_rate_ci",
    "reward_difference",
    "reward_difference_ci",
    "note",
)


def track(
    runs: list[Run],
    matches: list[dict[str, Any]],
    page: str,
    output: Path,
    *,
    mode: Literal["online", "offline", "disabled"],
) -> None:
    """Log the headline, pairwise and completions tables and the page as one run of job type ``compare``."""
    evaluated = [run for run in runs if run.headline]
    logger = WandbTracking(
        save_dir=str(output),
        name=f"compare-{'-'.join(run.name for run in evaluated)}",
        job_type="compare",
        group=os.environ.get("WANDB_RUN_GROUP"),
        mode=mode,
    )
    experiment = logger.experiment
    try:
        headline = [{"run": run.name, "method": run.method, **run.result.record()} for run in evaluated]
        experiment.log(
            {
                "headline": table(("run", "method", *headline_columns()), headline),
                "pairwise": table(PAIRWISE, matches),
                "completions": completions_table(evaluated),
                "report": wandb.Html(page, inject=False, data_is_not_path=True),
            }
        )
    finally:
        experiment.finish()


def headline_columns() -> list[str]:
    """The figures that are tabled, with their intervals, and the counts; and what judged and was compared with."""
    figures = [name for name, figure in FIGURES.items() if figure.title or figure.counts]
    columns = [part for name in figures for part in (name, name + CI) if part in FIELDS]
    return [*columns, "reward_source", "reference"]


def table(columns: tuple[str, ...], records: list[dict[str, Any]]) -> wandb.Table:
    """The records as rows; an interval becomes two columns, ``_low`` and ``_high``."""
    names: list[str | int] = []
    for column in columns:
        names += [f"{column.removesuffix(CI)}_{end}" for end in ("low", "high")] if is_interval(column) else [column]
    rows = []
    for record in records:
        cells: list[Any] = []
        for column in columns:
            value = record.get(column)
            cells += (value or [None, None]) if is_interval(column) else [value]
        rows.append(cells)
    return wandb.Table(columns=names, data=rows, allow_mixed_types=True)


def is_interval(column: str) -> bool:
    """Whether a metric is an interval, going by its name."""
    return column.endswith(CI)


def completions_table(runs: list[Run]) -> wandb.Table:
    """A row for each prompt, with the completion and the score of each reference and run."""
    data = browser_data(runs)
    names = [part for column in data["columns"] for part in (column["name"], f"{column['name']} score")]
    rows = []
    for example in data["examples"]:
        cells: list[Any] = [example["prompt"][-1]["content"], example["source"]]
        for answer in example["answers"]:
            cells += [answer["text"], answer["score"]] if answer else [None, None]
        rows.append(cells)
    return wandb.Table(columns=["prompt", "source", *names], data=rows, allow_mixed_types=True)
