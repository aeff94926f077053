"""Whatever text an option of fit, validate or compare is given, no file outside the run's folder changes or goes."""

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command_line import Cli
from tests.compared_runs import make_run

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ("config.yaml", "metrics.jsonl", "last.ckpt", "summary.json", "report.html", "evaluation.sqlite", "thesis.txt")
"""Of files that a run or a comparison would write, and of one that it would not."""
VALUES = (
    "",
    ".",
    "..",
    "../..",
    "../other",
    "{ring}/other",
    "{ring}/other/final",
    "{ring}/link",
    "{run}/link",
    "~",
    "~/other",
    "a\nb",
    "{ring}/other/thesis.txt",
    "checkpoints",
    "eval",
)
PARTS = ("trainer", "model", "data", "evaluation", "checkpoint", "export", "wandb", "ckpt_path", "seed_everything")
LATER = {"trainer.logger", "trainer.profiler", "trainer.strategy", "trainer.accelerator"}
"""Names of things, which are tried with folders below."""
WRITERS = (
    ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir"),
    ("--trainer.logger", "lightning.pytorch.loggers.WandbLogger", "--trainer.logger.save_dir"),
    ("--trainer.profiler", "SimpleProfiler", "--trainer.profiler.dirpath"),
    ("--trainer.profiler", "AdvancedProfiler", "--trainer.profiler.filename"),
    ("--trainer.callbacks+", "OnExceptionCheckpoint", "--trainer.callbacks.dirpath"),
    ("--trainer.callbacks+", "ModelCheckpoint", "--trainer.callbacks.dirpath"),
)


def plant(folder: Path) -> None:
    """Files that must stay as they are, in a folder, in one beside an export, and in one like a run's evaluations."""
    for place in (folder, folder / "final", folder / "eval" / "epoch=0", folder / "checkpoints"):
        place.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            (place / name).write_text(f"{place} {name}")
    (folder / "eval" / "epoch=0" / "metrics.json").write_text("{}")


def canaries(planted: list[Path], run: Path) -> dict[str, str]:
    """What the files outside the run's folder hold, as digests; a missing one holds nothing."""
    outside = [file for file in planted if not file.resolve().is_relative_to(run.resolve())]
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() if f.is_file() else "" for f in outside}


def text_options(path: str, cli: Cli) -> list[str]:
    """The options that hold text, or nothing where text would fit."""
    shown = cli("fit", "--config", path, "--print_config").stdout
    found: list[str] = []

    def visit(options: Any, name: str) -> None:
        if isinstance(options, dict):
            for key, value in options.items():
                visit(value, f"{name}.{key}".lstrip(".") if key != "init_args" else name)
        elif (options is None or isinstance(options, str)) and not name.endswith("class_path"):
            found.append(name)

    visit({key: value for key, value in yaml.safe_load(shown).items() if key in PARTS}, "")
    return sorted(set(found) - LATER)


def attempts(path: str, cli: Cli) -> list[tuple[str, ...]]:
    """Every option with every value, as the rest of a command line; those of compare by themselves."""
    options = text_options(path, cli)
    assert {"export.directory", "checkpoint.dirpath", "evaluation.cache_dir", "ckpt_path"} <= set(options)
    tried: list[tuple[str, ...]] = [("fit", f"--{option}={value}") for option in options for value in VALUES]
    tried += [("fit", "--overwrite=true", f"--{option}={value}") for option in options for value in VALUES[:9]]
    tried += [("fit", a, b, f"{c}={value}") for a, b, c in WRITERS for value in VALUES]
    tried += [("validate", f"--{option}={value}") for option in options for value in VALUES]
    tried += [("compare", "{run}", f"--output={value}") for value in VALUES]
    tried += [("compare", value) for value in VALUES]
    return tried


@pytest.mark.parametrize("count", [24, pytest.param(60, marks=pytest.mark.slow)])
def test_no_option_reaches_a_file_outside_the_run_s_folder(
    count: int, config: Any, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = tmp_path / "ring"
    work, run = ring / "home" / "work", ring / "home" / "runs" / "run"
    for folder in (ring, ring / "home", work, ring / "other", ring / "home" / "other", run.parent):
        plant(folder)
    (ring / "link").symlink_to(ring / "other")
    path = config("SFTModule", trainer={"default_root_dir": str(run), "max_steps": 1}, evaluation={"num_prompts": 2})
    monkeypatch.setenv("HOME", str(ring / "home"))
    monkeypatch.chdir(work)
    planted = [file for file in ring.rglob("*") if file.is_file() and not file.is_relative_to(run)]
    assert len(planted) > 100
    chosen = attempts(path, cli)
    random.Random(0).shuffle(chosen)
    ends = []
    for attempt in chosen[:count]:
        shutil.rmtree(run, ignore_errors=True)
        make_run(run, rewards=[1.0, 0.0])
        (run / "link").symlink_to(ring / "other")
        places = {"{ring}": str(ring), "{run}": str(run)}
        command, *rest = (
            part.replace("{ring}", places["{ring}"]).replace("{run}", places["{run}"]) for part in attempt
        )
        root = next(
            (Path(part.partition("=")[2]) for part in rest if part.startswith("--trainer.default_root_dir=")), run
        )
        own = (work / root).resolve() if str(root) != "." else work
        before = canaries(planted, own)
        result = cli(command, *([] if command == "compare" else ["--config", path]), *rest)
        ends.append(result.returncode)
        assert canaries(planted, own) == before, (command, rest)
        assert "Traceback" not in result.stderr, (command, rest, result.stderr[-2000:])
        assert result.returncode in (0, 2), (command, rest, result.stderr[-2000:])
    assert {0, 2} <= set(ends), json.dumps(ends)
