"""Limits of time and memory for code that came with somebody else's files."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError where what is within takes longer.

    By an alarm, so in a process's main thread alone, and not within a single operation of C code. An alarm that is
    set already goes off when it would have.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, _late)
    before_s, interval_s = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        if before_s:
            left_s = before_s - (time.monotonic() - started)
            signal.setitimer(signal.ITIMER_REAL, max(left_s, 1e-3), interval_s)


def _late(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError("it is not done in time")


@contextlib.contextmanager
def memory_limit(more_bytes: int) -> Iterator[None]:
    """Raise a MemoryError where what is within takes so much more memory than the process has now.

    By a limit of the whole process's address space, on Linux alone: for short and early work.
    """
    status = Path("/proc/self/statm")
    if not status.is_file():
        yield
        return
    import resource

    now = int(status.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = now + more_bytes
    for most in (soft, hard):
        if most != resource.RLIM_INFINITY:
            limit = min(limit, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
