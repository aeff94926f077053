"""What a config may not decide: to which host a logger's key goes, and what is written outside the run's folder."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import ConfigurationError

HOST = re.compile(r"(?:^|_)(?:url|uri|host|hostname|endpoint|server|proxy|proxies|settings)$", re.IGNORECASE)
"""Options of loggers by which a key finds its host; W&B's settings can name one, and programs to run."""
FOLDER = re.compile(r"(?:^|_)(?:dir|dirpath|directory|path|folder|root)$", re.IGNORECASE)
WRITERS = ("logger", "profiler", "callbacks")
"""Parts of the trainer that write files of their own."""


def check_boundaries(trainer: Any, root: Path) -> None:
    """Refuse loggers, profilers and callbacks of a config that reach beyond the run.

    Args:
        trainer: The trainer's options, as plain values.
        root: The run's folder.

    Raises:
        ConfigurationError: Naming the option.
    """
    if not str(root).isprintable():
        raise ConfigurationError(f"trainer.default_root_dir must be a plain path, got {str(root)!r}")
    for part in WRITERS:
        for name, value in strings(trainer.get(part), f"trainer.{part}"):
            last = name.rpartition(".")[2]
            if last in ("class_path", "monitor"):
                continue
            if HOST.search(last) or "://" in value:
                raise ConfigurationError(
                    f"{name}: a config names no host, as keys are sent there; W&B, MLflow and others read it from the "
                    "environment (WANDB_BASE_URL, MLFLOW_TRACKING_URI)"
                )
            if leads_out(value, root, is_folder=bool(FOLDER.search(last))):
                raise ConfigurationError(
                    f"{name} must lie in the run's folder {root}, got {value!r}; change it or trainer.default_root_dir"
                )


def strings(options: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every text among nested options, and every group of options that may name a host, by dotted name."""
    if isinstance(options, dict):
        for key, value in options.items():
            inner = f"{name}.{key}" if key not in ("init_args", "dict_kwargs") else name
            if HOST.search(str(key)) and value is not None:
                yield inner, ""
            yield from strings(value, inner)
    elif isinstance(options, (list, tuple)):
        for value in options:
            yield from strings(value, name)
    elif isinstance(options, (str, Path)):
        yield name, str(options)


def leads_out(value: str, root: Path, *, is_folder: bool) -> bool:
    """Whether a path, or a part of one, is none within the run's folder."""
    path = Path(value)
    if not value.isprintable() or ".." in re.split(r"[/\\\\]", value) or value.startswith("~"):
        return True
    return (is_folder or path.is_absolute()) and not path.resolve().is_relative_to(root.resolve())
