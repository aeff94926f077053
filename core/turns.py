"""Turns at what takes much memory for a while, among the processes of a machine that would all do it at once."""

import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from core.memory import available_bytes

POLL_S = 0.1
NAME = "\0fine-tuning-turn-{number}"
"""Linux's own name space of sockets: a name is taken by one process, and free again when it ends, however it does."""


@contextmanager
def in_turn(needed: float, on_wait: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Wait until so few others of the machine are at it that the memory holds what all of them need.

    Whoever comes while there is room for all waits for nobody. Where the system does not say what it has free, or has
    no such names, nobody waits.

    Args:
        needed: Bytes, while the turn lasts.
        on_wait: Called once by whoever has to wait.

    Yields:
        How many may be at it at once.
    """
    room = available_bytes() / needed if needed > 0 else float("inf")
    if room == float("inf") or sys.platform != "linux":
        yield sys.maxsize
        return
    count = max(1, int(room))
    taken = _take(count)
    if taken is None:
        on_wait()
    while taken is None:
        time.sleep(POLL_S)
        taken = _take(count)
    with taken:
        yield count


def _take(count: int) -> socket.socket | None:
    """The first of so many names that nobody has, taken; None if all are."""
    for number in range(count):
        name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            name.bind(NAME.format(number=number))
        except OSError:
            name.close()
        else:
            return name
    return None
