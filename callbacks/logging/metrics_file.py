"""A logger that appends every metric to ``metrics.jsonl`` in the run's folder, for ``compare`` and for anyone else."""

import errno
import json
import math
import os
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from typing_extensions import override

from core.files import OWN, SHARED

TABLES = "tables.jsonl"


class MetricsFile(Logger):
    """One JSON line for each step that logs; tables of text go to ``tables.jsonl`` beside it.

    Args:
        directory: The run's folder.
        file_name: The metrics' file; ``validate`` has one of its own, as its step is always 0.
    """

    def __init__(self, directory: str | Path, file_name: str = "metrics.jsonl") -> None:
        super().__init__()
        self.directory = Path(directory)
        self.file_name = file_name
        self._told = False

    @property
    @override
    def name(self) -> str:
        return "metrics"

    @property
    @override
    def version(self) -> str:
        return ""

    @property
    @override
    def save_dir(self) -> str:
        return str(self.directory)

    @override
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The run's options are in ``config.yaml``."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        finite = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        self._append(self.file_name, {"step": step, **dict(sorted(finite.items()))})

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        """Append the rows of a table."""
        for row in data:
            cells = [None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in row]
            self._append(TABLES, {"table": key, **dict(zip(columns, cells, strict=True))})

    def sizes(self) -> dict[str, int]:
        """Bytes of each file so far."""
        paths = [self.directory / name for name in (self.file_name, TABLES)]
        return {path.name: path.stat().st_size if path.is_file() else 0 for path in paths}

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Cut the files to the sizes that they had, as the lines after them will be written again.

        Args:
            sizes: Of :meth:`sizes`; a file that is not in it is emptied.
        """
        for name, size in self.sizes().items():
            if size > sizes.get(name, 0) and not (self.directory / name).is_symlink():
                with suppress(OSError):  # a disk that takes no lines is told with the next one
                    os.truncate(self.directory / name, sizes.get(name, 0))

    def _append(self, name: str, record: dict[str, Any]) -> None:
        """Append a line; a disk that takes none costs a warning and that line, never the run or a line before."""
        path = self.directory / name
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, flags, OWN if name == TABLES else SHARED)
            try:
                before = os.fstat(descriptor).st_size
                if os.write(descriptor, line) < len(line):
                    os.ftruncate(descriptor, before)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._told:
                rank_zero_warn(f"{path} takes no more lines ({error.strerror}); training goes on without")
            self._told = True
