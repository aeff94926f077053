"""What an evaluation has paid for, kept on disk: completions and scores, for every run and process that asks again."""

import hashlib
import json
import sqlite3
import warnings
from pathlib import Path
from typing import Any

from core.errors import ConfigurationError


class EvaluationCache:
    """Completions and scores in a SQLite file that several processes may use at once.

    A value is there for good once it is kept, even if the process is killed in the next moment. Where nothing more
    can be written, as on a full disk, that is told once and the evaluation goes on without.

    Args:
        path: The file; made with its directory where it is not there.

    Raises:
        ConfigurationError: If the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writes = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=60.0, isolation_level=None)
            # Written through to the operating system, which a kill of the process does not reach. Only a power
            # failure can cost what was not yet on the disk.
            self._file.execute("PRAGMA synchronous = OFF")
            self._file.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL NOT NULL)")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS completions "
                "(key TEXT PRIMARY KEY, completion TEXT NOT NULL, tokens INTEGER NOT NULL)"
            )
        except (sqlite3.Error, OSError) as error:
            raise ConfigurationError(f"cannot keep scores in {path} ({error}); change evaluation.cache_dir") from error

    def score(self, key: str) -> float | None:
        """The score kept under a key."""
        row = self._file.execute("SELECT score FROM scores WHERE key = ?", (key,)).fetchone()
        return None if row is None else float(row[0])

    def keep_score(self, key: str, score: float) -> None:
        """Keep a score."""
        self._write("INSERT OR REPLACE INTO scores VALUES (?, ?)", key, score)

    def completion(self, key: str) -> tuple[str, int] | None:
        """The completion kept under a key, and its length in tokens."""
        row = self._file.execute("SELECT completion, tokens FROM completions WHERE key = ?", (key,)).fetchone()
        return None if row is None else (str(row[0]), int(row[1]))

    def keep_completion(self, key: str, completion: str, tokens: int) -> None:
        """Keep a completion."""
        self._write("INSERT OR REPLACE INTO completions VALUES (?, ?, ?)", key, completion, tokens)

    def _write(self, statement: str, *values: Any) -> None:
        if self._writes:
            try:
                self._file.execute(statement, values)
            except sqlite3.Error as error:
                self._writes = False
                warnings.warn(f"no more scores are kept in {self._path} ({error})", stacklevel=3)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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
