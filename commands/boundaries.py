"""What a config may not say: a logger's host, a file outside the run's folder, null for a value, a number too low."""

import importlib
import inspect
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from core.errors import ConfigurationError

HOST = re.compile(r"(?:^|_)(?:url|uri|host|hostname|endpoint|server|proxy|proxies|settings)$", re.IGNORECASE)
"""Options of loggers by which a key finds its host; W&B's settings can name one, and programs to run."""
FOLDER = re.compile(r"(?:^|_)(?:dir|dirpath|directory|path|folder|root)$", re.IGNORECASE)
WRITERS = ("logger", "profiler", "callbacks")
"""Parts of the trainer that write files of their own."""


LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "max_steps": -1,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
    "reload_dataloaders_every_n_epochs": 0,
}
"""The least value of trainer options that Lightning itself takes as they come, or fails on later."""


def check_numbers(trainer: Mapping[str, Any]) -> None:
    """Raise a ConfigurationError where an option of the trainer is less than it may be."""
    for option, least in LEAST.items():
        value = trainer[option]
        if value is not None and value < least:
            raise ConfigurationError(f"trainer.{option} must be at least {least}, got {value}")


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
    if not value.isprintable() or ".." in re.split(r"[/\\]", value) or value.startswith("~"):
        return True
    return (is_folder or path.is_absolute()) and not path.resolve().is_relative_to(root.resolve())


def refuse_nulls(options: Any, name: str = "") -> None:
    """Refuse null where a class of the config takes none, which the parser lets pass.

    Args:
        options: Nested options, as plain values.
        name: Of the options, dotted.

    Raises:
        ConfigurationError: Naming the option.
    """
    if isinstance(options, (list, tuple)):
        for option in options:
            refuse_nulls(option, name)
    if not isinstance(options, dict):
        return
    given = options.get("init_args") if "class_path" in options else None
    if isinstance(given, dict):
        takes = parameters(str(options["class_path"]))
        for option, value in given.items():
            if value is None and option in takes and not takes_none(takes[option]):
                raise ConfigurationError(f"{name}.{option} must not be null")
    for key, value in options.items():
        refuse_nulls(value, name if key == "init_args" else f"{name}.{key}".lstrip("."))


def parameters(class_path: str) -> dict[str, inspect.Parameter]:
    """The parameters of a class, those that it hands on to its bases included."""
    module, _, name = class_path.rpartition(".")
    found: dict[str, inspect.Parameter] = {}
    for base in getattr(getattr(importlib.import_module(module), name), "__mro__", ()):
        for parameter in inspect.signature(base.__init__).parameters.values():
            found.setdefault(parameter.name, parameter)
    return found


def takes_none(parameter: inspect.Parameter) -> bool:
    """Whether None is a value of a parameter, as far as it says what it takes."""
    annotation = parameter.annotation
    if annotation in (inspect.Parameter.empty, Any) or parameter.default is None or isinstance(annotation, str):
        return True
    return get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)
