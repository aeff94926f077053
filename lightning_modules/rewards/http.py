"""What rewards behind HTTP share: the session and its key, the limits, and scores as they arrive."""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar

import requests

from core.errors import ConfigurationError
from datamodules.messages import Message
from lightning_modules.rewards.asking import Asking, answered
from lightning_modules.rewards.budget import Budget
from lightning_modules.rewards.keys import advice, checked_url, key_for, on_this_machine

ALTERNATIVES = (
    "name another model, a server of your own (NemotronReward on a NIM, VLLMReward, SGLangReward), "
    "or a local reward model such as Skywork/Skywork-Reward-V2-Qwen3-0.6B"
)


class HTTPReward(ABC):
    """Base of the rewards behind HTTP: a subclass says what to send and where the score is in the reply.

    A completion that could not be scored is NaN, and ``last_error`` says why in one line without the key. The key
    comes from the environment alone, and goes to its owner's hosts alone (:mod:`lightning_modules.rewards.keys`).

    Args:
        model: The model's name on the server.
        base_url: The API's address.
        requests_per_minute: Shared by every process of this user on this machine; 0 for no limit.
        parallel_requests: Most requests under way at once.
        timeout_s: For a request to be answered, and again for its reply to be complete.
        max_attempts: Tries per completion, the first included.
        time_limit_s: For all scores of one call together; what is not scored by then stays unscored.
        max_calls: Most requests of a run, further attempts and the preflight's included; no limit where not given.
    """

    models_path: ClassVar[str] = ""
    """Where below ``base_url`` the server lists what it serves, if it does."""

    def __init__(
        self,
        model: str,
        base_url: str,
        requests_per_minute: int = 0,
        parallel_requests: int = 8,
        timeout_s: float = 30.0,
        max_attempts: int = 5,
        time_limit_s: float = 3600.0,
        max_calls: int | None = None,
    ) -> None:
        for option, value in (
            ("parallel_requests", parallel_requests),
            ("max_attempts", max_attempts),
            ("max_calls", 1 if max_calls is None else max_calls),
        ):
            if value < 1:
                raise ConfigurationError(f"the reward's {option} must be at least 1, got {value}")
        for name, seconds in (("timeout_s", timeout_s), ("time_limit_s", time_limit_s)):
            if seconds <= 0:
                raise ConfigurationError(f"the reward's {name} must be positive, got {seconds}")
        self.model = model
        self.name = model
        self.base_url = checked_url(base_url)
        self.requests_per_minute: int | float = requests_per_minute
        self.parallel_requests = parallel_requests
        self.timeout_s = timeout_s
        self.max_attempts = max_attempts
        self.time_limit_s = time_limit_s
        self.max_calls = max_calls
        self.last_error = ""
        """Why the last completion without a score has none."""
        self.answer_s = 0.0
        """Seconds that the last score took."""
        self.budget = Budget(requests_per_minute, max_calls, self.base_url)
        """This process's share of what may be asked."""

    @property
    def calls(self) -> Counter[str]:
        """Requests so far under ``requests``, and failed ones by what failed."""
        return self.budget.counts

    @cached_property
    def identity(self) -> list[Any]:
        """What tells this source of scores from another: its kind, its address, its model, and what is served there."""
        return [f"{type(self).__module__}.{type(self).__qualname__}", self.base_url, self.model, self._served()]

    @abstractmethod
    def request(self, messages: Sequence[Message]) -> tuple[str, dict[str, Any]]:
        """The path below ``base_url`` to ask for a conversation's score, and the JSON to send."""

    @abstractmethod
    def parse(self, reply: Any) -> float:
        """The score in a decoded reply; any of the usual lookup and conversion errors where there is none."""

    def without_key(self) -> str:
        """Why the server cannot be asked without a key, and what to do; empty where it can."""
        return ""

    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        scores = dict(self.stream(prompts, completions))
        return [scores[index] for index in range(len(completions))]

    def stream(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> Iterator[tuple[int, float]]:
        """Each completion's position and score, in the order in which the scores arrive."""
        wanted = [
            self.request([*prompt, {"role": "assistant", "content": text}])
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        if not wanted:
            return
        self.last_error = ""
        with self._session() as session:
            asking = Asking(self, session)
            try:
                yield from answered(asking, wanted)
            finally:
                self.last_error = asking.last_error
                self.answer_s = asking.answer_s or self.answer_s

    def share_budget(self, *, processes: int, rank: int, machines: int) -> None:
        """Take a part of ``max_calls`` and, as the limit is shared within a machine alone, of the rate."""
        self.budget.share(processes=processes, rank=rank, machines=machines)

    def _served(self) -> list[Any]:
        """What a server of one's own says that it serves, as the address alone stays the same with another model."""
        if not self.models_path:
            return []
        for _ in range(3):
            try:
                with self._session() as session:
                    reply = session.get(self.base_url + self.models_path, timeout=self.timeout_s, allow_redirects=False)
                if reply.status_code < 500:
                    entries = reply.json()["data"]
                    return [[entry.get(name) for name in ("id", "root", "digest")] for entry in entries]
            except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError):
                continue
        return []

    def _session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False  # a netrc entry would replace the Authorization header
        if not on_this_machine(self.base_url):
            session.proxies = requests.utils.get_environ_proxies(self.base_url)
        session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=self.parallel_requests)
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        _, key = key_for(self.base_url)
        if key:
            session.headers["Authorization"] = f"Bearer {key}"
        elif told := self.without_key():
            raise ConfigurationError(told)
        return session

    def explained(self, status: int) -> str:
        """A refusal, with what to do about it."""
        told = {
            401: f"the key is not accepted, {advice(self.base_url)}",
            402: "the account has no credits left; add some, or judge with a reward model of your own",
            403: f"the key may not use this model, {advice(self.base_url)}",
            404: f"the model {self.model} is not there for this account; {ALTERNATIVES}",
            410: f"the model {self.model} was retired; {ALTERNATIVES}",
            422: "the conversation is refused, it may be too long",
        }
        return f"{status}: {told[status]}" if status in told else str(status)
