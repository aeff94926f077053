"""The files of an evaluation, each there in full or not at all."""

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from callbacks.evaluation_metrics import Pair
from datamodules.errors import ConfigurationError


def write(directory: Path, metrics: dict[str, Any], pairs: Sequence[Pair]) -> None:
    """``metrics.json`` and ``pairs.jsonl``; what has no value is null."""
    lines = [json.dumps(pair.record(), ensure_ascii=False, allow_nan=False) + "\n" for pair in pairs]
    write_whole(directory / "pairs.jsonl", "".join(lines))
    text = json.dumps(without_nan(metrics), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(directory / "metrics.json", text + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def check_writable(directory: Path, *, option: str) -> None:
    """Make the directory, and raise a ConfigurationError that names the option where it cannot be written into."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigurationError(f"cannot write into {directory} ({error.strerror}); change {option}") from error


def without_nan(value: Any) -> Any:
    """The value with null for everything in it that is no finite number."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return value
