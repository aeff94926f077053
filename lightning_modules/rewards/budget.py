"""What a source behind HTTP may still be asked, and what came of what it was asked."""

import threading
from collections import Counter
from collections.abc import Callable

from lightning_modules.rewards.rate_limit import RateLimiter


class Budget:
    """Turns under a rate and a number of calls, for all threads of a process.

    Args:
        per_minute: The rate; 0 for no limit.
        calls: Most requests; None for no limit.
        source: What the rate is for, shared by every process of this user on this machine that names the same.
    """

    def __init__(self, per_minute: int | float, calls: int | None, source: str) -> None:
        self.per_minute = per_minute
        self.calls = calls
        self.source = source
        self.limiter = RateLimiter(per_minute, source)
        self.left = calls
        """Calls that this process may still make."""
        self.counts: Counter[str] = Counter()
        """Requests so far under ``requests``, and failed ones by what failed."""
        self._lock = threading.Lock()

    def share(self, *, processes: int, rank: int, machines: int) -> None:
        """Take a process's part of the calls and, as the rate is shared within a machine alone, a machine's of that."""
        self.limiter = RateLimiter(self.per_minute / machines, self.source)
        if self.calls is not None:
            self.left = self.calls // processes + (rank < self.calls % processes)

    def take(self) -> bool:
        """Take a call, and say whether there was one left."""
        with self._lock:
            if self.left is None:
                return True
            if self.left <= 0:
                return False
            self.left -= 1
            return True

    def wait(self, give_up_at: float, pause: Callable[[float], bool]) -> bool:
        """Wait for the turn of a call that was taken; one that is not to come, or no longer wanted, is given back."""
        came = self.limiter.wait(give_up_at, pause)
        with self._lock:
            if came:
                self.counts["requests"] += 1
            elif self.left is not None:
                self.left += 1
        return came

    def count(self, failure: str) -> None:
        """Count a failed request."""
        with self._lock:
            self.counts[failure] += 1
