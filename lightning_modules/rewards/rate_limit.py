"""A limit of requests a minute that every process of a user on this machine shares."""

import contextlib
import hashlib
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import gettempdir

from core.errors import ConfigurationError
from core.files import OWN

WINDOW_S = 61.0
"""A minute, and a second for requests that travel at different speeds."""


class RateLimiter:
    """Lets at most so many requests through in any minute, over all threads and processes that name the same source.

    The moments of the last minute's requests are in a small SQLite file, so a run that is started again after it
    was killed still counts what it sent before. They are counted from the machine's start, which is the same for all
    processes and which no setting of the clock moves.

    Args:
        per_minute: The limit; 0 for none.
        source: What the limit is for; the URL of an API.
    """

    def __init__(self, per_minute: int | float, source: str) -> None:
        if per_minute < 0:
            raise ConfigurationError(f"the reward's requests_per_minute must not be negative, got {per_minute}")
        self.per_minute = per_minute
        self.source = hashlib.sha256(source.encode()).hexdigest()  # other users may read the file

    def wait(self, give_up_at: float = float("inf"), sleep: Callable[[float], object] | None = None) -> bool:
        """Sleep until a request may go.

        Args:
            give_up_at: By ``time.monotonic()``; a turn that would come later is not waited for.
            sleep: Instead of ``time.sleep``; where it returns something true, the turn is no longer wanted.

        Returns:
            Whether the request may go.
        """
        if not self.per_minute:
            return True
        while True:
            pause_s = self._turn_in()
            if pause_s <= 0:
                return True
            if time.monotonic() + pause_s > give_up_at:
                return False
            if (sleep or time.sleep)(pause_s):
                return False

    def _turn_in(self) -> float:
        """Take a turn and return 0, or return the seconds until one may be free.

        A share of a limit is rounded down; one below one a minute takes its turn in a window that is as much longer.
        """
        turns = max(1, int(self.per_minute))
        window_s = WINDOW_S * max(1.0, 1.0 / self.per_minute)
        with self._file() as file:
            now = time.monotonic()
            outside = (self.source, now - window_s, now)  # later than now: from before the machine's last start
            file.execute("DELETE FROM requests WHERE source = ? AND (moment <= ? OR moment > ?)", outside)
            recent = [
                moment
                for (moment,) in file.execute(
                    "SELECT moment FROM requests WHERE source = ? ORDER BY moment DESC LIMIT ?",
                    (self.source, turns),
                )
            ]
            if len(recent) < turns:
                file.execute("INSERT INTO requests VALUES (?, ?)", (self.source, now))
                return 0.0
            return max(0.001, float(recent[-1]) + window_s - now)

    @contextlib.contextmanager
    def _file(self) -> Iterator[sqlite3.Connection]:
        """The file, locked for writing."""
        path = limits_file()
        try:
            with contextlib.closing(opened(path)) as file:
                yield file
                file.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise ConfigurationError(f"requests cannot be counted in {path} ({error}); set TMPDIR elsewhere") from error


def opened(path: Path) -> sqlite3.Connection:
    """A connection to the file, locked for writing; what is no such file is replaced, as it holds a minute's worth."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), OWN))
    for attempt in range(2):
        file = sqlite3.connect(path, timeout=60.0, isolation_level=None)
        try:
            file.execute("PRAGMA synchronous = OFF")  # what a power failure takes is a minute's moments
            file.execute("BEGIN IMMEDIATE")
            file.execute("CREATE TABLE IF NOT EXISTS requests (source TEXT, moment REAL)")
            file.execute("SELECT source, moment FROM requests LIMIT 1")
        except sqlite3.DatabaseError as error:
            file.close()
            if attempt or "locked" in str(error) or "readonly" in str(error):
                raise
            path.unlink(missing_ok=True)
        else:
            break
    return file


def limits_file() -> Path:
    """Where the moments are: in the machine's temporary directory, where all runs of a user find it, and nobody else.

    Raises:
        ConfigurationError: If somebody else made the folder, or may write into it.
    """
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    folder = Path(gettempdir()) / f"reward-requests-{user}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    owned = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o077)
    if not stat.S_ISDIR(found.st_mode) or not owned:
        raise ConfigurationError(f"{folder} is not this user's alone, so requests are not counted in it; set TMPDIR")
    return folder / "requests.sqlite"
