"""Files that are there in full or not at all, and that no link leads out of their folder."""

import math
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.errors import ConfigurationError

OWN = 0o600
"""For files with prompts and completions, which are nobody else's to read."""
SHARED = 0o666
"""What the user's umask makes of it."""


def write_whole(path: Path, text: str, *, mode: int = SHARED) -> None:
    """Write a file that is there in full or not at all; a link in its place is replaced, never followed.

    Args:
        path: The file, made with its folder.
        text: What it is to hold.
        mode: Its permissions, less the umask's.

    Raises:
        OSError: If it cannot be written; what was there is as it was, and nothing is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with os.fdopen(new_file(partial, mode), "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def new_file(path: Path, mode: int = SHARED) -> int:
    """A descriptor to write to a file that was not there before, through no link.

    Raises:
        OSError: If there is anything at the path.
    """
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), mode)


def sync_directory(directory: Path) -> None:
    """Make a rename within it last through a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(directory: Path, *, option: str) -> None:
    """Make the directory, and raise a ConfigurationError that names the option where it cannot be written into."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"full disks take no byte")
    except (OSError, ValueError) as error:  # a path may hold a zero byte
        told = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"cannot write into {str(directory)!r} ({told}); change {option}") from error


def without_nan(value: Any) -> Any:
    """The value with null for everything in it that is no finite number."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return value
