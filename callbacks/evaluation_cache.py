"""What an evaluation has paid for, kept on disk: completions and scores, for every run and process that asks again."""

import hashlib
import json
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Any

from datamodules.errors import ConfigurationError


class EvaluationCache:
    """Completions and scores in a SQLite file that several processes may use at once.

    A value is there for good once it is kept, even if the process is killed in the next moment.

    Args:
        path: The file; made with its directory where it is not there. Not on a network file system: SQLite's
            write-ahead log needs memory that its processes share.

    Raises:
        ConfigurationError: If the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=60.0, isolation_level=None)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")
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
        self._file.execute("INSERT OR REPLACE INTO scores VALUES (?, ?)", (key, score))

    def completion(self, key: str) -> tuple[str, int] | None:
        """The completion kept under a key, and its length in tokens."""
        row = self._file.execute("SELECT completion, tokens FROM completions WHERE key = ?", (key,)).fetchone()
        return None if row is None else (str(row[0]), int(row[1]))

    def keep_completion(self, key: str, completion: str, tokens: int) -> None:
        """Keep a completion."""
        self._file.execute("INSERT OR REPLACE INTO completions VALUES (?, ?, ?)", (key, completion, tokens))

    def __enter__(self) -> "EvaluationCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cache_key(*facts: Any) -> str:
    """A digest of plain values."""
    return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
