"""What the folders of runs tell: their evaluations, pairs, curves, options and versions, and whether they compare."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from callbacks.evaluation.result import EvaluationResult
from callbacks.evaluation.result_record import is_number
from commands.comparison.run_files import Reader, is_pair, is_record
from core.errors import ConfigurationError
from core.plain import loaded_file
from core.text import printable
from lightning_modules.models.identity import saved_tensors, tensors_digest

EPOCH = re.compile(r"epoch=(\d{1,9})")
SAME_FOR_ALL = ("reward_source", "reference", "prompts")
"""Metrics that must agree before win rates can be put side by side."""

PromptKey = tuple[int, tuple[tuple[str, str], ...]]
"""A prompt's messages, and how many times the evaluation had the same prompt before."""


class Run(NamedTuple):
    """What a run's folder tells."""

    name: str
    method: str
    headline: EvaluationResult | None
    """The result of ``validate`` on the final model, or else of the last epoch evaluated."""
    headline_from: str
    epochs: dict[int, EvaluationResult]
    pairs: dict[PromptKey, dict[str, Any]]
    """The rows of ``pairs.jsonl`` in their order."""
    curves: dict[str, list[tuple[int, float]]]
    config: str
    """The text of ``config.yaml``."""
    environment: dict[str, Any]
    final_digest: str | None = None
    """Of the weights in ``final/``, where the evaluation says which ones it judged."""
    notes: Sequence[str] = ()
    """What of the folder cannot be used."""

    @property
    def result(self) -> EvaluationResult:
        """The headline of a run that has one."""
        assert self.headline is not None, "only runs that were evaluated are asked"
        return self.headline

    @property
    def judge(self) -> tuple[str, str]:
        """What scored, and what it was scored against."""
        return self.result.reward_source, self.result.reference


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
        run._replace(name=printable(str(directory))) if alike[run.name] > 1 else run
        for run, directory in zip(runs, directories, strict=True)
    ]


def read_run(directory: Path) -> Run:
    """Read a run's folder as far as it can be read, with notes of what cannot.

    Raises:
        ConfigurationError: If it is none.
    """
    config_file = directory / "config.yaml"
    if not config_file.is_file():
        raise ConfigurationError(f"{directory} has no config.yaml, so it is no run's folder; name folders of fit")
    reader = Reader(printable(directory.resolve().name))
    config = read_options(config_file, reader)
    epochs = {
        int(found[1]): result
        for folder in sorted((directory / "eval").glob("epoch=*"))
        if (found := EPOCH.fullmatch(folder.name)) and (result := reader.result(folder / "metrics.json"))
    }
    source = directory / "eval" / "final"
    headline = reader.result(source / "metrics.json")
    if not headline and epochs:
        source = directory / "eval" / f"epoch={max(epochs)}"
        headline = epochs[max(epochs)]
    return Run(
        name=reader.run,
        method=text_at(config, "model", "class_path").rpartition(".")[2].removesuffix("Module") or "unknown",
        headline=headline,
        headline_from=source.name,
        epochs=epochs,
        pairs=by_prompt(reader.lines(source / "pairs.jsonl", is_pair)) if headline else {},
        curves=read_curves(directory / "metrics.jsonl", reader),
        config=reader.text(config_file),
        environment=read_environment(directory / "environment.json", reader),
        final_digest=digest_of(directory / (text_at(config, "export", "directory") or "final"), reader)
        if headline is not None and headline.model_digest is not None
        else None,
        notes=reader.notes,
    )


def read_options(file: Path, reader: Reader) -> dict[str, Any]:
    """The options in ``config.yaml``; none where it holds something else."""
    try:
        content = loaded_file(file)
    except ConfigurationError as error:
        reader.note(file, f"cannot be used ({error})")
        return {}
    if not isinstance(content, dict):
        reader.note(file, "holds no options")
        return {}
    return content


def read_environment(file: Path, reader: Reader) -> dict[str, Any]:
    """The versions that a run ran with."""
    found = reader.mapping(file)
    packages = found.get("packages")
    return {**found, "packages": packages if isinstance(packages, dict) else {}} if found else {}


def text_at(options: Any, *names: str) -> str:
    """The text under nested names; empty where there is none."""
    for name in names:
        options = options.get(name) if isinstance(options, dict) else None
    return printable(options) if isinstance(options, str) else ""


def digest_of(directory: Path, reader: Reader) -> str | None:
    """Of the weights of a model directory; None where there are none that can be read."""
    if not any(directory.glob("*.safetensors")):
        return None
    try:
        return tensors_digest(saved_tensors(directory))
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        reader.note(directory / "weights", f"cannot be read ({printable(str(error))})")
        return None


def read_curves(path: Path, reader: Reader) -> dict[str, list[tuple[int, float]]]:
    """Every metric's values by step; where a resumed run logged a step again, the later line counts."""
    curves: dict[str, dict[int, float]] = {}
    for record in reader.lines(path, is_record):
        step = record.pop("step", None)
        for name, value in record.items():
            if is_number(value) and step is not None:
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
    notes = [note for run in runs for note in run.notes]
    notes += [f"{run.name} has no evaluation" for run in runs if not run.headline]
    for key in SAME_FOR_ALL:
        values = {run.name: getattr(run.headline, key) for run in evaluated}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{name}: {value}" for name, value in values.items())
            notes.append(f"the runs differ in {key} ({told}), so their win rates do not compare")
    if len({frozenset(run.pairs) for run in evaluated}) > 1:
        notes.append("the runs were evaluated on different prompts, so their win rates do not compare")
    notes += [
        f"the evaluation of {run.name} (eval/{run.headline_from}) is of other weights than its final model: it judged "
        f"{run.result.model}; validate with the run's config judges the final one"
        for run in evaluated
        if run.final_digest is not None and run.result.model_digest != run.final_digest
    ]
    notes += [
        f"the evaluation of {run.name} is not valid: {run.result.failed} of {run.result.prompts} pairs failed"
        for run in evaluated
        if not run.result.valid
    ]
    return notes
