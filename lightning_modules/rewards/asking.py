"""One call's requests to a reward source behind HTTP: what each comes to, when to ask again, when to stop."""

import contextlib
import email.utils
import json
import math
import random
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import requests
import urllib3

if TYPE_CHECKING:
    from lightning_modules.rewards.http import HTTPReward

RETRIED = {408, 429, 500, 502, 503, 504}
LASTING = {401, 402, 403, 404, 410}
"""Refusals that hold for every further request as well."""
LONGEST_RETRY_AFTER_S = 60.0
LARGEST_REPLY = 1_000_000


class Attempt(NamedTuple):
    """What a request came to: a score, or else why there is none."""

    score: float | None
    label: str = ""
    """The failure in a word, to count it by: ``429``, ``timeout``, ``connection``, ``no score``."""
    reason: str = ""
    retry_after_s: float | None = None
    """The least wait before another attempt; None where none would help."""
    lasting: bool = False
    """Whether every further request would fail alike."""


class Asking:
    """One call's requests: when they end for good, and why.

    After a lasting refusal, or a long run of failures without a single score, no further request is sent.

    Args:
        source: Whose options and counters to use.
        session: With the key.
    """

    def __init__(self, source: "HTTPReward", session: requests.Session) -> None:
        self.source = source
        self.session = session
        self.give_up_at = time.monotonic() + source.time_limit_s
        self.longest_run = max(10, 2 * source.parallel_requests)
        self._failures_in_a_row = 0
        self._stopped = ""
        self._lock = threading.Lock()

    def stop(self, reason: str) -> None:
        """Send nothing more."""
        self._stopped = self._stopped or reason

    def score(self, path: str, body: dict[str, Any]) -> float:
        """The score, or NaN after the last attempt, with the reason in the source's ``last_error``."""
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
            pause_s = max(result.retry_after_s, random.uniform(0.5, 1.0) * min(2.0**attempt, 30.0))
            if time.monotonic() + pause_s > self.give_up_at:
                break
            time.sleep(pause_s)
        self.source.last_error = reason or self._stopped
        return math.nan

    def _may_ask(self) -> bool:
        if not self._stopped and time.monotonic() < self.give_up_at:
            with self._lock:
                if self.source.max_calls is not None and self.source.calls["requests"] >= self.source.max_calls:
                    self.stop(f"max_calls={self.source.max_calls} is used up; start again to go on, or raise it")
                else:
                    self.source.calls["requests"] += 1
            if not self._stopped and self.source.limiter.wait(self.give_up_at):
                return True
        self.stop(f"the time limit of {self.source.time_limit_s:.0f} s has passed; raise the reward's time_limit_s")
        return False

    def _count(self, result: Attempt) -> None:
        with self._lock:
            if result.label:
                self.source.calls[result.label] += 1
            if result.label in ("", "429", "422", "400"):  # the server is there
                self._failures_in_a_row = 0
                return
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= self.longest_run:
                self.stop(f"{result.reason} ({self._failures_in_a_row} times in a row)")

    def _ask(self, path: str, body: dict[str, Any]) -> Attempt:
        source = self.source
        timeout_s = min(source.timeout_s, max(0.01, self.give_up_at - time.monotonic()))
        try:
            with self.session.post(
                source.base_url + path, json=body, timeout=timeout_s, allow_redirects=False, stream=True
            ) as response:
                content = read_within(response, timeout_s)
        except requests.Timeout:
            return Attempt(None, "timeout", f"{source.base_url} does not answer within {timeout_s:g} s", 0.0)
        except requests.RequestException as error:
            return Attempt(None, "connection", f"{source.base_url} cannot be reached ({type(error).__name__})", 0.0)
        status = response.status_code
        if status in RETRIED:
            return Attempt(None, str(status), f"{source.base_url} answers {status}", retry_after_s(response.headers))
        if status != 200:
            reason = f"{source.base_url} answers {source.explained(status)}"
            return Attempt(None, str(status), reason, lasting=status in LASTING)
        try:
            score = source.parse(json.loads(content))
            if not math.isfinite(score):
                raise ValueError
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
            return Attempt(None, "no score", f"{source.base_url} sends a reply without a score", 0.0)
        return Attempt(score)


def read_within(response: requests.Response, seconds: float) -> bytes:
    """The body, piece by piece as it arrives, so that a server that trickles it is noticed.

    Raises:
        requests.Timeout: If it takes longer, or is larger than any reply.
        requests.ConnectionError: If it breaks off.
    """
    give_up_at = time.monotonic() + seconds
    body = bytearray()
    try:
        while piece := response.raw.read1(65_536, decode_content=True):
            body += piece
            if time.monotonic() > give_up_at or len(body) > LARGEST_REPLY:
                raise requests.Timeout
    except urllib3.exceptions.ReadTimeoutError as error:
        raise requests.Timeout from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        if isinstance(error, requests.Timeout):
            raise
        raise requests.ConnectionError from error
    return bytes(body)


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date, at most a minute; 0 where it asks nothing."""
    value = headers.get("Retry-After", "0")
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
        with contextlib.suppress(ValueError, OverflowError):
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER_S) if math.isfinite(seconds) else 0.0
