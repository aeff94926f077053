"""What an evaluation has paid for, kept on disk: completions and scores, for every run and process that asks again."""

import hashlib
import json
import math
import os
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Trainer

from core.errors import ConfigurationError
from core.files import OWN

TABLES = {
    "scores": "(key TEXT PRIMARY KEY, score REAL NOT NULL)",
    "completions": "(key TEXT PRIMARY KEY, completion TEXT NOT NULL, tokens INTEGER NOT NULL)",
}
Result = TypeVar("Result")


class DamagedError(Exception):
    """The file is no cache, or not whole."""


class EvaluationCache:
    """Completions and scores in a SQLite file that several processes may use at once.

    A value is there for good once it is kept, even if the process is killed in the next moment. Where nothing more
    can be written, as on a full disk, that is told once and the evaluation goes on without. A file that is damaged
    or something else is left as it is and told, and one with another name takes its place.

    Args:
        path: The file; made with its directory where it is not there, for its user alone to read.

    Raises:
        ConfigurationError: If the file cannot be written, or is a link.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._used = path
        self._reads = True
        self._writes = True
        if path.is_symlink():
            raise ConfigurationError(f"{path} is a link, and no cache is kept behind one; change evaluation.cache_dir")
        self._file = self._next()

    def score(self, key: str) -> float | None:
        """The score kept under a key; None for what is no finite number."""
        row = self._row("SELECT score FROM scores WHERE key = ?", key)
        if row is None or not isinstance(row[0], (int, float)) or not math.isfinite(row[0]):
            return None
        return float(row[0])

    def keep_score(self, key: str, score: float) -> None:
        """Keep a score."""
        self._write("INSERT OR REPLACE INTO scores VALUES (?, ?)", key, score)

    def completion(self, key: str) -> tuple[str, int] | None:
        """The completion kept under a key, and its length in tokens."""
        row = self._row("SELECT completion, tokens FROM completions WHERE key = ?", key)
        if row is None or not isinstance(row[0], str) or not isinstance(row[1], int) or row[1] < 0:
            return None
        return row[0], row[1]

    def keep_completion(self, key: str, completion: str, tokens: int) -> None:
        """Keep a completion."""
        self._write("INSERT OR REPLACE INTO completions VALUES (?, ?, ?)", key, completion, tokens)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _row(self, statement: str, key: str) -> Any:
        """What is kept, or None where it cannot be read: to ask again costs less than the training."""
        try:
            return self._tried(lambda: self._file.execute(statement, (key,)).fetchone())
        except (sqlite3.Error, ConfigurationError) as error:
            if self._reads:
                self._reads = False
                warnings.warn(f"what is kept in {self._used} cannot be read ({error})", stacklevel=3)
            return None

    def _write(self, statement: str, *values: Any) -> None:
        if self._writes:
            try:
                self._tried(lambda: self._file.execute(statement, values))
            except (sqlite3.Error, ConfigurationError) as error:
                self._writes = False
                warnings.warn(f"no more scores are kept in {self._used} ({error})", stacklevel=3)

    def _tried(self, work: Callable[[], Result]) -> Result:
        """The work's result, on another file where this one turns out to be damaged."""
        try:
            return work()
        except sqlite3.OperationalError:  # locked, full or read-only: the file itself is well
            raise
        except (sqlite3.DatabaseError, OverflowError) as error:
            self._file.close()
            self._file = self._next(error)
            return work()

    def _next(self, why: Exception | None = None) -> sqlite3.Connection:
        """The file, or where it cannot be used the first of its successors that can.

        Raises:
            ConfigurationError: If none can.
        """
        names = [self._path, *(self._path.with_name(f"{self._path.stem}-{n}.sqlite") for n in range(2, 10))]
        start = 0 if why is None else names.index(self._used) + 1
        for place in names[start:]:
            if why is not None:
                warnings.warn(
                    f"{self._used} cannot be used ({why}); it is left as it is, and {place} taken", stacklevel=4
                )
            self._used = place
            try:
                return opened(place)
            except DamagedError as error:
                why = error
            except (sqlite3.Error, OSError) as error:
                why = error
                break
        raise ConfigurationError(f"cannot keep scores in {self._used} ({why}); change evaluation.cache_dir") from why


def opened(path: Path) -> sqlite3.Connection:
    """A connection to the file, with its tables.

    Raises:
        DamagedError: If it is no cache.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), OWN))
    file = sqlite3.connect(path, timeout=60.0, isolation_level=None)
    try:
        # Written through to the operating system, which a kill of the process does not reach. Only a power failure
        # can cost what was not yet on the disk.
        file.execute("PRAGMA synchronous = OFF")
        there = {name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if there - set(TABLES):
            raise DamagedError(f"it has the tables {sorted(there)}")
        for table, columns in TABLES.items():
            file.execute(f"CREATE TABLE IF NOT EXISTS {table} {columns}")
            found = [row[1] for row in file.execute(f"PRAGMA table_info({table})")]
            if found != [column.split()[0] for column in columns[1:-1].split(", ")]:
                raise DamagedError(f"its {table} have the columns {found}")
    except BaseException as error:
        file.close()
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            raise DamagedError(str(error)) from error
        raise
    return file


def open_cache(trainer: Trainer, directory: str | None) -> EvaluationCache:
    """One file for the runs beside this one; one more for each further machine, as SQLite's locks end there.

    Args:
        trainer: The run.
        directory: Where it is; ``cache`` beside the run's folder where None.

    Raises:
        ConfigurationError: If the file cannot be written, or is a link.
    """
    place = Path(directory) if directory else Path(trainer.default_root_dir).parent / "cache"
    machine = f"-{trainer.node_rank}" if trainer.node_rank else ""
    return EvaluationCache(place / f"evaluation{machine}.sqlite")


class ScoreMemory:
    """Scores of sources that cannot be told from others: kept for as long as this process lives."""

    def __init__(self) -> None:
        self._scores: dict[str, float] = {}

    def score(self, key: str) -> float | None:
        """The score kept under a key."""
        return self._scores.get(key)

    def keep_score(self, key: str, score: float) -> None:
        """Keep a score."""
        self._scores[key] = score


def cache_key(*facts: Any) -> str:
    """A digest of plain values."""
    return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
