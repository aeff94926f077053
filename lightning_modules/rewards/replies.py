"""Replies over HTTP: read within a time and a size, and how long they ask to wait."""

import contextlib
import email.utils
import math
import time
from collections.abc import Mapping

import requests
import urllib3

LARGEST_REPLY = 1_000_000
"""Bytes."""
LONGEST_RETRY_AFTER_S = 60.0


class ReplyTooLargeError(Exception):
    """A reply that is not read to its end."""


def read_within(response: requests.Response, seconds: float) -> bytes:
    """The body, piece by piece as it arrives, so that a server that trickles it is noticed.

    Raises:
        requests.Timeout: If it takes longer.
        ReplyTooLargeError: If it is larger than any reply with a score.
        requests.ConnectionError: If it breaks off.
    """
    give_up_at = time.monotonic() + seconds
    body = bytearray()
    try:
        while piece := response.raw.read1(65_536, decode_content=True):
            body += piece
            if len(body) > LARGEST_REPLY:
                raise ReplyTooLargeError
            if time.monotonic() > give_up_at:
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
