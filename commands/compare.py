"""``compare``: runs side by side, as tables, ``summary.json``, a self-contained ``report.html`` and a W&B run."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from callbacks.logging.tracking import Mode, environment_mode
from commands import options
from commands.comparison.pairwise import pairwise
from commands.comparison.report import render_report
from commands.comparison.run_files import Reader
from commands.comparison.runs import Run, differences, read_runs
from commands.comparison.tables import headline_tables, pairwise_table
from commands.comparison.tracking import track
from commands.comparison.verdicts import verdicts
from core.errors import ConfigurationError
from core.files import check_writable, without_nan, write_whole
from core.terminal import fitted
from core.text import printable

MARK = "<title>Comparison: "
"""In every page that a comparison wrote."""


def run() -> None:
    """Parse the command line and compare."""
    arguments = options.compare().parse_args(sys.argv[1:])
    compare(arguments.runs, arguments.output, wandb_mode=arguments.wandb_mode)


def compare(directories: list[Path], output: Path, *, wandb_mode: Mode | None = None) -> None:
    """Print the tables, write ``summary.json`` and ``report.html``, and log them to W&B.

    Raises:
        ConfigurationError: If a folder is no run, no run has an evaluation, or the output cannot be written.
    """
    check_writable(output, option="--output")
    check_own(output)
    runs = read_runs(directories)
    notes = differences(runs)
    matches = pairwise(runs)
    answers = verdicts(runs, matches)
    console = Console(width=None if Console().is_terminal else 160)
    for table in headline_tables(runs, width=console.width):
        console.print(table)
    if matches:
        console.print(pairwise_table(matches, width=console.width))
    for line in [*(f"note: {note}" for note in notes), "Did they get better?", *(f"  {told}" for told in answers)]:
        console.print(fitted(line, is_terminal=console.is_terminal), markup=False, highlight=False, soft_wrap=True)
    page = render_report(runs, matches, answers=answers, notes=notes)
    try:
        write_whole(output / "summary.json", json.dumps(summary(runs, matches, answers, notes), indent=2) + "\n")
        write_whole(output / "report.html", page)
    except OSError as error:
        raise ConfigurationError(f"cannot write into {output} ({error.strerror}); change --output") from error
    console.print(f"report: {printable(str(output / 'report.html'))}", markup=False, highlight=False, soft_wrap=True)
    mode = wandb_mode or environment_mode()
    if mode == "disabled":
        return
    try:
        track(runs, matches, page, output, mode=mode)
    except Exception as error:  # whatever W&B has: the report is there
        told = str(error).strip().partition("\n")[0]
        console.print(f"note: W&B has no comparison ({type(error).__name__}: {told})", markup=False, soft_wrap=True)


def check_own(output: Path) -> None:
    """Raise a ConfigurationError where the comparison would replace files that no comparison wrote."""
    reader = Reader("")
    known = reader.mapping(output / "summary.json").keys() >= {"runs", "pairwise"}
    page = reader.text(output / "report.html")
    for name, own in (("summary.json", known), ("report.html", MARK in page)):
        if (output / name).is_symlink() or ((output / name).exists() and not own):
            raise ConfigurationError(f"{output / name} is of no comparison, so it is not replaced; change --output")


def summary(runs: list[Run], matches: list[dict[str, Any]], answers: list[str], notes: list[str]) -> dict[str, Any]:
    """What ``summary.json`` holds."""
    evaluated = {
        run.name: {"method": run.method, "from": run.headline_from, **run.headline.record()}
        for run in runs
        if run.headline
    }
    content: dict[str, Any] = {"runs": evaluated, "pairwise": matches, "verdicts": answers, "notes": notes}
    return dict(without_nan(content))
