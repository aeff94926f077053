"""What the folders of runs tell: their evaluations, pairs, curves, options and versions, and whether they compare."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from core.errors import ConfigurationError
from lightning_modules.identity import saved_tensors, tensors_digest

SAME_FOR_ALL = ("reward_source", "reference", "prompts")
"""Metrics that must agree before win rates can be put side by side."""

PromptKey = tuple[int, tuple[tuple[str, str], ...]]
"""A prompt's messages, and how many times the evaluation had the same prompt before."""


class Run(NamedTuple):
    """What a run's folder tells."""

    name: str
    method: str
    headline: dict[str, Any]
    """The metrics of ``validate`` on the final model, or else of the last epoch evaluated."""
    headline_from: str
    epochs: dict[int, dict[str, Any]]
    pairs: dict[PromptKey, dict[str, Any]]
    """The rows of ``pairs.jsonl`` in their order."""
    curves: dict[str, list[tuple[int, float]]]
    config: str
    """The text of ``config.yaml``."""
    environment: dict[str, Any]
    final_digest: str | None = None
    """Of the weights in ``final/``, where the evaluation says which ones it judged."""

    @property
    def judge(self) -> tuple[str | None, str | None]:
        """What scored, and what it was scored against."""
        return self.headline.get("reward_source"), self.headline.get("reference")


def read_runs(directories: list[Path]) -> list[Run]:
    """Read the folders.

    Raises:
        ConfigurationError: If one is no run's folder or named twice, or none has an evaluation.
    """
    folders = Counter(directory.resolve() for directory in directories)
    if twice := [str(folder) for folder, count in folders.items() if count > 1]:
        raise ConfigurationError(f"{twice[0]} is named {folders[Path(twice[0])]} times; name each run once")
    runs = [read_run(directory) for directory in directories]
    if not any(run.headline for run in runs):
        raise ConfigurationError(f"none of {', '.join(map(str, directories))} has an evaluation; run validate first")
    alike = Counter(run.name for run in runs)
    return [
        run._replace(name=str(directory)) if alike[run.name] > 1 else run
        for run, directory in zip(runs, directories, strict=True)
    ]


def read_run(directory: Path) -> Run:
    """Read a run's folder.

    Raises:
        ConfigurationError: If it is none.
    """
    config_file = directory / "config.yaml"
    if not config_file.is_file():
        raise ConfigurationError(f"{directory} has no config.yaml, so it is no run's folder; name folders of fit")
    text = config_file.read_text("utf-8")
    config = yaml.safe_load(text)
    epochs = {
        int(folder.name.removeprefix("epoch=")): _json(folder / "metrics.json")
        for folder in sorted((directory / "eval").glob("epoch=*"))
        if (folder / "metrics.json").is_file()
    }
    source = directory / "eval" / "final"
    if not (source / "metrics.json").is_file() and epochs:
        source = directory / "eval" / f"epoch={max(epochs)}"
    evaluated = (source / "metrics.json").is_file()
    environment = directory / "environment.json"
    headline = _json(source / "metrics.json") if evaluated else {}
    final = directory / ((config.get("export") or {}).get("directory") or "final")
    return Run(
        name=directory.resolve().name,
        method=config["model"]["class_path"].rpartition(".")[2].removesuffix("Module"),
        headline=headline,
        headline_from=source.name,
        epochs=epochs,
        pairs=by_prompt(_json_lines(source / "pairs.jsonl")) if evaluated else {},
        curves=read_curves(directory / "metrics.jsonl"),
        config=text,
        environment=_json(environment) if environment.is_file() else {},
        final_digest=tensors_digest(saved_tensors(final)) if "model_digest" in headline and final.is_dir() else None,
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


def by_prompt(pairs: list[dict[str, Any]]) -> dict[PromptKey, dict[str, Any]]:
    """The pairs, to be looked up in another run; a prompt that comes twice has its second answer in second place."""
    seen: Counter[tuple[tuple[str, str], ...]] = Counter()
    found = {}
    for pair in pairs:
        messages = tuple((message["role"], message["content"]) for message in pair["prompt"])
        found[seen[messages], messages] = pair
        seen[messages] += 1
    return found


def prompts_of(runs: list[Run]) -> dict[PromptKey, dict[str, Any]]:
    """Every prompt that some run answered, in the order of the first that did, with that run's row."""
    found: dict[PromptKey, dict[str, Any]] = {}
    for run in runs:
        for key, pair in run.pairs.items():
            found.setdefault(key, pair)
    return found


def differences(runs: list[Run]) -> list[str]:
    """Why the runs may not be compared, or not trusted, as sentences."""
    evaluated = [run for run in runs if run.headline]
    notes = [f"{run.name} has no evaluation" for run in runs if not run.headline]
    for key in SAME_FOR_ALL:
        values = {run.name: run.headline.get(key) for run in evaluated}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{name}: {value}" for name, value in values.items())
            notes.append(f"the runs differ in {key} ({told}), so their win rates do not compare")
    if len({frozenset(run.pairs) for run in evaluated}) > 1:
        notes.append("the runs were evaluated on different prompts, so their win rates do not compare")
    notes += [
        f"the evaluation of {run.name} (eval/{run.headline_from}) is of other weights than its final model: it judged "
        f"{run.headline['model']}; validate with the run's config judges the final one"
        for run in evaluated
        if run.final_digest is not None and run.headline["model_digest"] != run.final_digest
    ]
    notes += [
        f"the evaluation of {run.name} is not valid: {run.headline['failed']} of {run.headline['prompts']} pairs failed"
        for run in evaluated
        if not run.headline.get("valid", True)
    ]
    return notes


def is_number(value: Any) -> bool:
    """Whether there is a value; null and NaN stand for none."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
