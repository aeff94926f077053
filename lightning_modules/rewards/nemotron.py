"""NVIDIA's Nemotron reward model over HTTP: the hosted API, or any server that speaks its protocol."""

import email.utils
import ipaddress
import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import requests

from datamodules.chat import Message
from datamodules.errors import ConfigurationError

HOSTED_URL = "https://integrate.api.nvidia.com/v1"
ATTRIBUTE_WEIGHTS = {"helpfulness": 0.3, "correctness": 0.74, "coherence": 0.46, "complexity": 0.47, "verbosity": -0.33}
"""How the 340B model's five attributes make one score (its model card)."""
RETRIED = {408, 429, 500, 502, 503, 504}
LONGEST_RETRY_AFTER_S = 60.0
LARGEST_REPLY = 65_536


class NemotronReward:
    """Asks a Nemotron reward model for the quality of the last assistant turn; a reply without a score is NaN.

    The key comes from the environment variable ``NVIDIA_API_KEY`` alone, and goes over TLS or to this machine only.

    Args:
        model: The model's name on the server.
        base_url: The API up to and without ``/chat/completions``.
        requests_per_minute: Budget of this process; NVIDIA's trial tier allows about 40. 0 for no limit.
        parallel_requests: Most requests under way at once.
        timeout_s: For a request to be answered, and again for its reply to be complete.
        max_attempts: Tries per completion, the first included.
        deadline_s: After so long no further attempt at a completion is begun.
    """

    def __init__(
        self,
        model: str = "nvidia/llama-3.1-nemotron-70b-reward",
        base_url: str = HOSTED_URL,
        requests_per_minute: int = 40,
        parallel_requests: int = 8,
        timeout_s: float = 30.0,
        max_attempts: int = 5,
        deadline_s: float = 300.0,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ConfigurationError(
                f"the base_url of the reward must begin with http:// or https://, got {base_url!r}"
            )
        for option, value in (("parallel_requests", parallel_requests), ("max_attempts", max_attempts)):
            if value < 1:
                raise ConfigurationError(f"the reward's {option} must be at least 1, got {value}")
        self.model = model
        self.name = model
        self.base_url = base_url.rstrip("/")
        self.parallel_requests = parallel_requests
        self.timeout_s = timeout_s
        self.max_attempts = max_attempts
        self.deadline_s = deadline_s
        self.last_error = ""
        """Why the last completion without a score has none, in one line and without the key."""
        self.on_progress: Callable[[], object] = lambda: None
        """Called after each completion, from a worker thread."""
        self._requests_per_minute = requests_per_minute
        self._limiter = RateLimiter(requests_per_minute)

    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        if not completions:
            return []
        with self._session() as session, ThreadPoolExecutor(self.parallel_requests) as pool:
            conversations = [
                [*folded_system(prompt), {"role": "assistant", "content": text}]
                for prompt, text in zip(prompts, completions, strict=True)
            ]
            return list(pool.map(lambda messages: self._score(session, messages), conversations))

    def share_budget(self, processes: int) -> None:
        """Take an equal part of the requests per minute, where several processes ask the same API."""
        self._limiter = RateLimiter(self._requests_per_minute / processes)

    def _session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False  # a netrc entry would replace the Authorization header
        session.proxies = requests.utils.get_environ_proxies(self.base_url)
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=self.parallel_requests)
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        key = os.environ.get("NVIDIA_API_KEY", "").strip()
        if key and keeps_a_secret(self.base_url):
            if not (key.isascii() and key.isprintable()) or " " in key:
                raise ConfigurationError("NVIDIA_API_KEY holds a space or a letter that no key has; set it again")
            session.headers["Authorization"] = f"Bearer {key}"
        elif self.base_url == HOSTED_URL:
            raise ConfigurationError(
                "NVIDIA_API_KEY is not set: export it, or name another source in evaluation.reward, "
                "or switch the evaluation off with --evaluation.num_prompts 0"
            )
        return session

    def _score(self, session: requests.Session, messages: list[Message]) -> float:
        """The score, or NaN after the last attempt, with the reason in ``last_error``."""
        give_up_at = time.monotonic() + self.deadline_s
        try:
            for attempt in range(self.max_attempts):
                self._limiter.wait()
                reason, wait_s = self._attempt(session, messages)
                if isinstance(reason, float):
                    return reason
                if wait_s is not None:
                    wait_s = max(wait_s, random.uniform(0.5, 1.0) * min(2.0**attempt, 30.0))
                if wait_s is None or attempt + 1 == self.max_attempts or time.monotonic() + wait_s > give_up_at:
                    self.last_error = reason
                    break
                time.sleep(wait_s)
            return math.nan
        finally:
            self.on_progress()

    def _attempt(self, session: requests.Session, messages: list[Message]) -> tuple[float | str, float | None]:
        """A score; or a reason and the least wait before another attempt, None where none would help."""
        try:
            with session.post(
                f"{self.base_url}/chat/completions",
                json={"model": self.model, "messages": messages},
                timeout=self.timeout_s,
                allow_redirects=False,
                stream=True,
            ) as response:
                body = read_within(response, self.timeout_s)
        except requests.RequestException as error:
            return f"{self.base_url} cannot be reached ({type(error).__name__})", 0.0
        if response.status_code in RETRIED:
            return f"{self.base_url} answers {response.status_code}", retry_after_s(response.headers)
        if response.status_code != 200:
            return f"{self.base_url} answers {explained(response.status_code, self.model)}", None
        try:
            score = parse_score(json.loads(body))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
            return f"{self.base_url} sends a reply without a score", 0.0
        return score, None


class RateLimiter:
    """Lets at most so many calls through in any minute, over all threads.

    Args:
        per_minute: The limit; 0 for none.
    """

    def __init__(self, per_minute: int | float) -> None:
        if per_minute < 0:
            raise ConfigurationError(f"the reward's requests_per_minute must not be negative, got {per_minute}")
        self._interval_s = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Sleep until this call may go."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._interval_s
        time.sleep(max(0.0, start - now))


def keeps_a_secret(url: str) -> bool:
    """Whether a key may be sent there: over TLS, or without leaving this machine."""
    parts = urlsplit(url)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def read_within(response: requests.Response, seconds: float) -> bytes:
    """The body, byte by byte, so that a server that trickles it is noticed.

    Raises:
        requests.Timeout: If it takes longer, or is larger than any reply.
    """
    give_up_at = time.monotonic() + seconds
    body = bytearray()
    for byte in response.iter_content(1):
        body += byte
        if time.monotonic() > give_up_at or len(body) > LARGEST_REPLY:
            raise requests.Timeout
    return bytes(body)


def folded_system(prompt: Sequence[Message]) -> list[Message]:
    """The prompt with a system turn put before the first user turn's text: the API documents no system role."""
    if not prompt or prompt[0]["role"] != "system":
        return list(prompt)
    first = {"role": "user", "content": f"{prompt[0]['content']}\n\n{prompt[1]['content']}"}
    return [first, *prompt[2:]]


def parse_score(reply: Any) -> float:
    """The score in a reply, of the 70B model (``reward:-12.5``) or of the 340B model (five attributes).

    Raises:
        ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError: If there is no finite score in it.
    """
    choice = reply["choices"][0]
    message = choice["message"]
    content = (message[0] if isinstance(message, list) else message).get("content")
    if content:
        named = content if ":" in content else f"reward:{content}"
        values = dict(_named_number(part) for part in named.split(","))
    else:
        values = {token["token"]: float(token["logprob"]) for token in choice["logprobs"]["content"]}
    if set(values) == set(ATTRIBUTE_WEIGHTS):
        score = sum(ATTRIBUTE_WEIGHTS[name] * value for name, value in values.items())
    elif set(values) == {"reward"}:
        score = values["reward"]
    else:
        raise ValueError(f"unknown attributes {sorted(values)}")
    if not math.isfinite(score):
        raise ValueError("the score is not finite")
    return score


def _named_number(text: str) -> tuple[str, float]:
    name, _, number = text.partition(":")
    return name.strip(), float(number)


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date, at most a minute; 0 where it asks nothing."""
    value = headers.get("Retry-After", "0")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            seconds = 0.0
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER_S) if math.isfinite(seconds) else 0.0


def explained(status: int, model: str) -> str:
    """A refusal, with what to do about it."""
    advice = {
        401: "the key is not accepted, check NVIDIA_API_KEY",
        402: "the account has no credits left",
        403: "the key may not use this model, check NVIDIA_API_KEY",
        404: f"the model {model} is not available to this account, change the reward's model",
        410: f"the model {model} was retired, change the reward's model or base_url",
        422: "the conversation is refused, it may be too long",
    }
    return f"{status}: {advice[status]}" if status in advice else str(status)
