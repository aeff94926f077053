"""``compare``: runs side by side, as a table, ``summary.json`` and a self-contained ``report.html``."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from commands.report import json_key, render_report
from datamodules.errors import ConfigurationError

SAME_FOR_ALL = ("reward_source", "reference", "prompts")
"""Metrics that must agree before win rates can be put side by side."""


class Run(NamedTuple):
    """What a run's folder tells."""

    name: str
    method: str
    directory: Path
    headline: dict[str, Any]
    """The metrics of ``validate`` on the final model, or else of the last epoch evaluated."""
    headline_from: str
    epochs: dict[int, dict[str, Any]]
    pairs: list[dict[str, Any]]
    curves: dict[str, list[tuple[int, float]]]


def run() -> None:
    """Parse the command line and compare."""
    parser = ArgumentParser(prog="cli.py compare", description="Put runs side by side.")
    parser.add_argument("runs", nargs="+", type=str, help="Folders of runs: outputs/sft outputs/dpo outputs/rloo")
    parser.add_argument("--output", type=str, default="outputs/report", help="Where summary.json and report.html go.")
    arguments = parser.parse_args()
    compare([Path(folder) for folder in arguments.runs], Path(arguments.output))


def compare(directories: list[Path], output: Path) -> None:
    """Print the table and write ``summary.json`` and ``report.html``.

    Raises:
        ConfigurationError: If a folder is no run, or no run has an evaluation.
    """
    runs = [read_run(directory) for directory in directories]
    if not any(run.headline for run in runs):
        raise ConfigurationError(f"none of {', '.join(map(str, directories))} has an evaluation; run validate first")
    notes = differences(runs)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(headline_table(runs))
    for note in notes:
        console.print(f"note: {note}")
    output.mkdir(parents=True, exist_ok=True)
    summary = {
        run.name: {"method": run.method, "from": run.headline_from, **run.headline} for run in runs if run.headline
    }
    (output / "summary.json").write_text(json.dumps({"runs": summary, "notes": notes}, indent=2) + "\n", "utf-8")
    (output / "report.html").write_text(render_report(runs, notes), "utf-8")
    console.print(f"report: {output / 'report.html'}", soft_wrap=True)


def read_run(directory: Path) -> Run:
    """Read a run's folder.

    Raises:
        ConfigurationError: If it is none.
    """
    config_file = directory / "config.yaml"
    if not config_file.is_file():
        raise ConfigurationError(f"{directory} has no config.yaml, so it is no run's folder; name folders of fit")
    config = yaml.safe_load(config_file.read_text("utf-8"))
    epochs = {
        int(folder.name.removeprefix("epoch=")): _json(folder / "metrics.json")
        for folder in sorted((directory / "eval").glob("epoch=*"))
        if (folder / "metrics.json").is_file()
    }
    source = directory / "eval" / "final"
    if not (source / "metrics.json").is_file() and epochs:
        source = directory / "eval" / f"epoch={max(epochs)}"
    evaluated = (source / "metrics.json").is_file()
    return Run(
        name=directory.name,
        method=config["model"]["class_path"].rpartition(".")[2].removesuffix("Module"),
        directory=directory,
        headline=_json(source / "metrics.json") if evaluated else {},
        headline_from=source.name,
        epochs=epochs,
        pairs=_json_lines(source / "pairs.jsonl") if evaluated else [],
        curves=read_curves(directory / "metrics.jsonl"),
    )


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric's values by step; where a resumed run logged a step again, the later line counts."""
    curves: dict[str, dict[int, float]] = {}
    for record in _json_lines(path):
        step = record.pop("step", None)
        for name, value in record.items():
            if isinstance(value, (int, float)) and step is not None:
                curves.setdefault(name, {})[step] = value
    return {name: sorted(points.items()) for name, points in curves.items()}


def differences(runs: list[Run]) -> list[str]:
    """Why the runs may not be compared, or not trusted, as sentences."""
    evaluated = [run for run in runs if run.headline]
    notes = [f"{run.name} has no evaluation" for run in runs if not run.headline]
    for key in SAME_FOR_ALL:
        values = {run.name: run.headline.get(key) for run in evaluated}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{name}: {value}" for name, value in values.items())
            notes.append(f"the runs differ in {key} ({told}), so their win rates do not compare")
    if len({frozenset(json_key(pair["prompt"]) for pair in run.pairs) for run in evaluated}) > 1:
        notes.append("the runs were evaluated on different prompts, so their win rates do not compare")
    notes += [
        f"the evaluation of {run.name} is not valid: {run.headline['failed']} of {run.headline['prompts']} pairs failed"
        for run in evaluated
        if not run.headline.get("valid", True)
    ]
    return notes


def headline_table(runs: list[Run]) -> Table:
    """The headline metrics, a row a run."""
    table = Table(title="Against the reference, on held-out prompts (95 % intervals)")
    for column in (
        "run",
        "win rate",
        "at equal length",
        "reward",
        "reference",
        "improvement",
        "length ratio",
        "W/T/L/failed",
    ):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for run in runs:
        if run.headline:
            table.add_row(run.name, *headline_cells(run.headline))
    return table


def headline_cells(metrics: dict[str, Any]) -> list[str]:
    """The headline metrics as text."""
    return [
        f"{percent(metrics['win_rate'])} {interval(metrics['win_rate_ci'], percent)}",
        percent(metrics["length_controlled_win_rate"]),
        number(metrics["average_reward"]),
        number(metrics["average_reference_reward"]),
        f"{number(metrics['reward_improvement'])} {interval(metrics['reward_improvement_ci'], number)}",
        number(metrics["length_ratio"]),
        "/".join(str(metrics[name]) for name in ("wins", "ties", "losses", "failed")),
    ]


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """A number with two decimals."""
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def interval(bounds: list[float | None], shown: Any) -> str:
    """An interval in brackets."""
    return f"[{shown(bounds[0]).removesuffix(' %')}, {shown(bounds[1]).removesuffix(' %')}]"


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
