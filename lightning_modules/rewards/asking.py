"""One call's requests to a reward source behind HTTP: what each comes to, when to ask again, when to stop."""

import contextlib
import json
import math
import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import requests

from lightning_modules.rewards.budget import Budget
from lightning_modules.rewards.replies import LARGEST_REPLY, ReplyTooLargeError, read_within, retry_after_s

RETRIED = {408, 429, 500, 502, 503, 504}
LASTING = {401, 402, 403, 404, 410}
"""Refusals that hold for every further request as well."""
ALIVE = {400, 422, 429}
"""Answers of a server that is there, so none of a run of failures after which it is given up."""
GRACE_S = 1.0
"""How long after the time limit a request that is under way may still end by itself."""


@runtime_checkable
class Source(Protocol):
    """What is asked: where, how patiently, and how its replies are read."""

    base_url: str
    parallel_requests: int
    timeout_s: float
    max_attempts: int
    time_limit_s: float
    budget: Budget

    def parse(self, reply: Any) -> float:
        """The score in a decoded reply; any of the usual lookup and conversion errors where there is none."""

    def explained(self, status: int) -> str:
        """A refusal, with what to do about it."""


class Failure(StrEnum):
    """Why a request has no score, where its status does not say so."""

    TIMEOUT = "timeout"
    CONNECTION = "connection"
    TOO_LARGE = "too large"
    NO_SCORE = "no score"


class Attempt(NamedTuple):
    """What a request came to: a score, or else why there is none."""

    score: float | None
    failure: Failure | int | None = None
    """The failure, or the status that says it."""
    reason: str = ""
    retry_after_s: float | None = None
    """The least wait before another attempt; None where none would help."""
    lasting: bool = False
    """Whether every further request would fail alike."""


class Asking:
    """One call's requests: when they end for good, and why.

    After a lasting refusal, or a long run of failures without a single score, no further request is sent.

    Args:
        source: What to ask.
        session: With the key.
    """

    def __init__(self, source: Source, session: requests.Session) -> None:
        self.source = source
        self.session = session
        self.give_up_at = time.monotonic() + source.time_limit_s
        self.longest_run = max(10, 2 * source.parallel_requests)
        self.last_error = ""
        """Why the last completion without a score has none."""
        self.answer_s = 0.0
        """Seconds that the last score took."""
        self._failures_in_a_row = 0
        self._ended = threading.Event()
        self._why = ""
        self._lock = threading.Lock()
        self._luck = random.Random()

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is sent."""
        return self._ended.is_set()

    def stop(self, reason: str) -> None:
        """Send nothing more, and wake who waits for its turn."""
        self._why = self._why or reason
        self._ended.set()

    def score(self, path: str, body: dict[str, Any]) -> float:
        """The score, or NaN after the last attempt, with the reason in ``last_error``."""
        reason = ""
        for attempt in range(self.source.max_attempts):
            if not self._may_ask():
                break
            result = self._ask(path, body)
            self._count(result)
            if result.score is not None:
                return result.score
            reason = result.reason
            if result.lasting:
                self.stop(reason)
            if result.retry_after_s is None or attempt + 1 == self.source.max_attempts:
                break
            pause_s = max(result.retry_after_s, self._luck.uniform(0.5, 1.0) * min(2.0**attempt, 30.0))
            if time.monotonic() + pause_s > self.give_up_at or self._pause(pause_s):
                break
        self.last_error = reason or self._why
        return math.nan

    def _pause(self, seconds: float) -> bool:
        """Sleep, and say whether there is anything left to wake up for."""
        return self._ended.wait(seconds)

    def _may_ask(self) -> bool:
        """Take a turn under all limits."""
        late = f"the time limit of {self.source.time_limit_s:g} s has passed; raise the reward's time_limit_s"
        if self.has_ended:
            return False
        if time.monotonic() > self.give_up_at:
            self.stop(late)
            return False
        budget = self.source.budget
        if not budget.take():
            self.stop(f"max_calls={budget.calls} is used up; start again to go on, or raise it")
            return False
        if budget.wait(self.give_up_at, self._pause):
            return not self.has_ended
        self.stop(late)
        return False

    def _count(self, result: Attempt) -> None:
        if result.failure is not None:
            self.source.budget.count(str(result.failure))
        with self._lock:
            if result.failure is None or result.failure in ALIVE:
                self._failures_in_a_row = 0
                return
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= self.longest_run:
                self.stop(f"{result.reason} ({self._failures_in_a_row} times in a row)")

    def _ask(self, path: str, body: dict[str, Any]) -> Attempt:
        source = self.source
        started = time.monotonic()
        timeout_s = min(source.timeout_s, max(0.01, self.give_up_at - started))
        try:
            with self.session.post(
                source.base_url + path, json=body, timeout=timeout_s, allow_redirects=False, stream=True
            ) as response:
                content = read_within(response, timeout_s)
        except ReplyTooLargeError:
            reason = f"{source.base_url} sends a reply of more than {LARGEST_REPLY:,} bytes, which is no score"
            return Attempt(None, Failure.TOO_LARGE, reason)
        except requests.Timeout:
            reason = f"{source.base_url} does not answer within {timeout_s:g} s"
            return Attempt(None, Failure.TIMEOUT, reason, 0.0)
        except requests.RequestException as error:
            reason = f"{source.base_url} cannot be reached ({type(error).__name__})"
            return Attempt(None, Failure.CONNECTION, reason, 0.0)
        status = response.status_code
        if status in RETRIED:
            return Attempt(None, status, f"{source.base_url} answers {status}", retry_after_s(response.headers))
        if status != 200:
            reason = f"{source.base_url} answers {source.explained(status)}"
            return Attempt(None, status, reason, lasting=status in LASTING)
        try:
            score = source.parse(json.loads(content))
            if not math.isfinite(score):
                raise ValueError
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
            return Attempt(None, Failure.NO_SCORE, f"{source.base_url} sends a reply without a score", 0.0)
        self.answer_s = time.monotonic() - started
        return Attempt(score)


def answered(asking: Asking, requests_wanted: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[tuple[int, float]]:
    """Each request's position and score, in the order in which the scores arrive; NaN for the rest at the time limit.

    The threads are left to themselves where a server holds them for longer than that.
    """
    jobs: queue.SimpleQueue[tuple[int, tuple[str, dict[str, Any]]]] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[int, float | Exception]] = queue.SimpleQueue()
    for job in enumerate(requests_wanted):
        jobs.put(job)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                index, (path, body) = jobs.get_nowait()
                try:
                    results.put((index, asking.score(path, body)))
                except Exception as error:
                    results.put((index, error))

    for _ in range(min(asking.source.parallel_requests, len(requests_wanted))):
        threading.Thread(target=work, daemon=True).start()
    missing = set(range(len(requests_wanted)))
    try:
        while missing:
            left_s = asking.give_up_at - time.monotonic()
            index, score = results.get(timeout=max(0.0, left_s) + GRACE_S)
            if isinstance(score, Exception):
                raise score
            missing.remove(index)
            yield index, score
    except queue.Empty:
        asking.last_error = f"{asking.source.base_url} holds requests beyond the time limit"
        yield from ((index, math.nan) for index in sorted(missing))
    finally:  # whoever listened may have had enough
        asking.stop("interrupted")
