"""The client of the Nemotron API against a real server on loopback: what it sends, what it reads, when it gives up."""

import email.utils
import json
import math
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.request import getproxies_environment

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from datamodules.chat import Message
from datamodules.errors import ConfigurationError
from lightning_modules.rewards import NemotronReward, nemotron
from lightning_modules.rewards.base import preflight
from lightning_modules.rewards.nemotron import RateLimiter, explained, folded_system, parse_score, retry_after_s

KEY = "nvapi-a-key-that-no-log-may-hold"
PROMPT = [{"role": "user", "content": "Hi"}]
ATTRIBUTES = {
    "helpfulness": 1.6171875,
    "correctness": 1.6484375,
    "coherence": 3.3125,
    "complexity": 0.546875,
    "verbosity": 0.515625,
}
ATTRIBUTE_TEXT = ",".join(f"{name}:{value}" for name, value in ATTRIBUTES.items())
ATTRIBUTE_SCORE = 3.315625
"""0.3 x 1.6171875 + 0.74 x 1.6484375 + 0.46 x 3.3125 + 0.47 x 0.546875 - 0.33 x 0.515625, worked out by hand."""


class Asked(NamedTuple):
    """A request as the server got it."""

    index: int
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    arrived_s: float


class Reply(NamedTuple):
    """What the server sends; ``missing_bytes`` of the body never come, and with no status nothing comes at all."""

    body: bytes = b""
    status: int | None = 200
    headers: Mapping[str, str] = {}
    missing_bytes: int = 0


class Handler(BaseHTTPRequestHandler):
    """Keeps connections open, as the real API does."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    timeout = 20

    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, RewardServer)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            asked = Asked(len(server.asked), self.path, dict(self.headers), body, time.monotonic())
            server.asked.append(asked)
        reply = server.respond(asked)
        if reply.status is None or reply.missing_bytes:
            self.close_connection = True
        if reply.status is None:
            return
        self.send_response(reply.status)
        self.send_header("Content-Length", str(len(reply.body) + reply.missing_bytes))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)

    @override
    def log_message(self, format: str, *args: Any) -> None:
        pass


class RewardServer(ThreadingHTTPServer):
    """Answers as ``respond`` says and remembers what it was asked."""

    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.asked: list[Asked] = []
        self.respond: Callable[[Asked], Reply] = lambda asked: text_reply("reward:-12.5")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def answers(self, *replies: Reply) -> None:
        """Give these replies in turn, and the last one for good."""
        self.respond = lambda asked: replies[min(asked.index, len(replies) - 1)]

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up."""


class Clock:
    """Stands in for the ``time`` module: time passes in sleeps alone."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_700_000_000.0 + self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if seconds:
            self.sleeps.append(seconds)


@pytest.fixture
def server() -> Iterator[RewardServer]:
    with RewardServer() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    ticking = Clock()
    monkeypatch.setattr(nemotron, "time", ticking)
    return ticking


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in {*getproxies_environment(), "http", "https", "all", "no"}:
        monkeypatch.delenv(f"{scheme}_proxy", raising=False)
        monkeypatch.delenv(f"{scheme}_proxy".upper(), raising=False)
    for name in ("NVIDIA_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)


def reply_of(content: object, logprobs: object = None, *, as_list: bool = False) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {"choices": [{"index": 0, "message": [message] if as_list else message, "logprobs": logprobs}]}


def text_reply(content: str) -> Reply:
    return Reply(json.dumps(reply_of(content)).encode())


def client(server: RewardServer, **options: Any) -> NemotronReward:
    return NemotronReward(**{"base_url": server.url, "requests_per_minute": 0, **options})


def score_one(reward: NemotronReward, completion: str = "Hello.") -> float:
    (score,) = reward([PROMPT], [completion])
    return score


# What is sent


def test_a_request_holds_the_model_and_the_conversation_up_to_the_completion(server: RewardServer) -> None:
    prompt = [*PROMPT, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye?"}]
    assert client(server, model="org/judge")([prompt], ["Bye."]) == [-12.5]
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.body == {"model": "org/judge", "messages": [*prompt, {"role": "assistant", "content": "Bye."}]}


def test_a_slash_after_the_url_changes_nothing(server: RewardServer) -> None:
    assert score_one(client(server, base_url=server.url + "/")) == -12.5
    assert server.asked[0].path == "/v1/chat/completions"


def test_a_system_turn_travels_at_the_head_of_the_first_user_turn(server: RewardServer) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, *PROMPT, {"role": "assistant", "content": "Yes?"}, PROMPT[0]]
    client(server)([prompt], ["Hello."])
    assert server.asked[0].body["messages"] == [
        {"role": "user", "content": "Be brief.\n\nHi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ]
    assert prompt[0] == {"role": "system", "content": "Be brief."}
    assert prompt[1] == {"role": "user", "content": "Hi"}


def test_a_prompt_without_a_system_turn_is_folded_to_itself() -> None:
    prompt: list[Message] = [{"role": "user", "content": "system"}]
    assert folded_system(prompt) == prompt
    assert folded_system(prompt) is not prompt
    assert folded_system([]) == []


def test_the_key_is_sent_as_a_bearer_token(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_API_KEY", f" {KEY}\n")
    score_one(client(server))
    assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    assert KEY not in json.dumps(server.asked[0].body)


def test_a_server_of_ones_own_needs_no_key(server: RewardServer) -> None:
    assert score_one(client(server)) == -12.5
    assert "Authorization" not in server.asked[0].headers


@pytest.mark.parametrize("key", [None, KEY])
def test_no_netrc_entry_is_sent(
    server: RewardServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str | None
) -> None:
    entry = tmp_path / "netrc"
    entry.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(entry))
    assert requests.utils.get_netrc_auth(server.url) == ("me", "secret")
    if key:
        monkeypatch.setenv("NVIDIA_API_KEY", key)
    score_one(client(server))
    assert server.asked[0].headers.get("Authorization") == (f"Bearer {key}" if key else None)


def test_a_proxy_of_the_environment_is_asked(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    assert score_one(client(server, base_url="http://reward.invalid/v1")) == -12.5
    assert server.asked[0].path == "http://reward.invalid/v1/chat/completions"


def test_a_host_that_no_proxy_names_is_asked_directly(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url.replace("/v1", ""))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert score_one(client(server)) == -12.5
    assert server.asked[0].path == "/v1/chat/completions"


@pytest.mark.parametrize("end", ["", "/"])
def test_the_hosted_api_without_a_key_is_not_asked_at_all(
    server: RewardServer, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    assert NemotronReward().base_url == nemotron.HOSTED_URL == "https://integrate.api.nvidia.com/v1"
    monkeypatch.setattr(nemotron, "HOSTED_URL", server.url)
    monkeypatch.setenv("NVIDIA_API_KEY", " ")
    with pytest.raises(ConfigurationError, match="NVIDIA_API_KEY is not set: export it"):
        score_one(client(server, base_url=server.url + end))
    assert server.asked == []
    monkeypatch.setenv("NVIDIA_API_KEY", KEY)
    assert score_one(client(server, base_url=server.url + end)) == -12.5


@pytest.mark.parametrize("key", ["two words", "two\nlines", "nvapi-…", "nvapi-\x07"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(
    server: RewardServer, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("NVIDIA_API_KEY", key)
    with pytest.raises(ConfigurationError, match="NVIDIA_API_KEY holds") as caught:
        score_one(client(server))
    assert key not in str(caught.value)
    assert server.asked == []


def test_nothing_to_score_asks_nothing(server: RewardServer) -> None:
    assert client(server)([], []) == []
    assert server.asked == []
    assert NemotronReward()([], []) == []  # nor for a key


def test_a_prompt_for_each_completion_is_demanded(server: RewardServer) -> None:
    with pytest.raises(ValueError, match="zip"):
        client(server)([PROMPT], ["one", "two"])
    assert server.asked == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "integrate.api.nvidia.com/v1"}, "must begin with http:// or https://, got 'integrate"),
        ({"parallel_requests": 0}, "parallel_requests must be at least 1, got 0"),
        ({"max_attempts": 0}, "max_attempts must be at least 1, got 0"),
        ({"requests_per_minute": -1}, "requests_per_minute must not be negative, got -1"),
    ],
)
def test_options_without_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        NemotronReward(**options)


# What is read


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize(
    ("content", "logprobs", "score"),
    [
        ("reward:-25.625", None, -25.625),
        ("reward: 3.5 ", None, 3.5),
        ("-3.28", None, -3.28),
        ("reward:-1e-05", {"content": [{"token": "reward", "logprob": 9.0}]}, -1e-05),
        (None, {"content": [{"token": "reward", "logprob": -4}]}, -4.0),
        (ATTRIBUTE_TEXT, None, ATTRIBUTE_SCORE),
        ("", {"content": [{"token": name, "logprob": x} for name, x in ATTRIBUTES.items()]}, ATTRIBUTE_SCORE),
    ],
)
def test_both_models_replies_are_read_in_both_shapes(
    content: str | None, logprobs: object, score: float, as_list: bool
) -> None:
    assert parse_score(reply_of(content, logprobs, as_list=as_list)) == pytest.approx(score, abs=1e-12)


@given(score=st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_score_comes_back_exactly(score: float) -> None:
    assert parse_score(reply_of(f"reward:{score!r}")) == score


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_each_attribute_has_its_published_weight(name: str) -> None:
    weights = {"helpfulness": 0.3, "correctness": 0.74, "coherence": 0.46, "complexity": 0.47, "verbosity": -0.33}
    text = ",".join(f"{other}:{float(other == name)}" for other in reversed(list(weights)))
    assert parse_score(reply_of(text)) == weights[name]


def test_scores_come_over_the_wire_in_every_shape(server: RewardServer) -> None:
    server.answers(
        Reply(json.dumps(reply_of("reward:-25.625", as_list=True)).encode()),
        Reply(json.dumps(reply_of(ATTRIBUTE_TEXT, as_list=True)).encode()),
    )
    reward = client(server)
    assert score_one(reward) == -25.625
    assert score_one(reward) == pytest.approx(ATTRIBUTE_SCORE, abs=1e-12)


NOT_SCORES = [
    b"",
    b"<html>Bad gateway</html>",
    b"\xff\xfe",
    b"[]",
    b"null",
    b"{}",
    *(
        json.dumps(reply).encode()
        for reply in (
            {"choices": []},
            {"choices": None},
            {"choices": [{"message": None}]},
            {"choices": [{"message": []}]},
            reply_of(None),
            reply_of(None, {"content": None}),
            reply_of(None, {"content": []}),
            reply_of(None, {"content": [{"token": "reward", "logprob": None}]}),
            reply_of(None, {"content": [{"token": "reward", "logprob": 10**400}]}),
            reply_of(None, {"content": [{"token": "I", "logprob": -0.5}]}),
            reply_of(-12.5),
            reply_of(" "),
            reply_of("reward:NaN"),
            reply_of("nan"),
            reply_of("inf"),
            reply_of("reward:-Infinity"),
            reply_of("reward:1e999"),
            reply_of("reward:"),
            reply_of("score:1.0"),
            reply_of("I am a language model."),
            reply_of("reward:1.0,helpfulness:1.0"),
            reply_of("reward:-25,625"),
            reply_of(ATTRIBUTE_TEXT.rpartition(",")[0]),
            reply_of(ATTRIBUTE_TEXT + ",reward:1.0"),
            reply_of(ATTRIBUTE_TEXT.replace("3.3125", "nan")),
        )
    ),
]


@pytest.mark.parametrize("body", NOT_SCORES, ids=lambda body: body[-60:].decode(errors="replace"))
def test_a_reply_without_a_score_is_never_a_number(server: RewardServer, clock: Clock, body: bytes) -> None:
    server.answers(Reply(body))
    reward = client(server, max_attempts=2)
    assert math.isnan(score_one(reward))
    assert reward.last_error == f"{server.url} sends a reply without a score"
    assert len(server.asked) == 2


def test_one_completion_without_a_score_takes_none_from_the_others(server: RewardServer) -> None:
    def respond(asked: Asked) -> Reply:
        text = asked.body["messages"][-1]["content"]
        return Reply(status=422) if text == "bad" else text_reply(f"reward:{text}")

    server.respond = respond
    scores = client(server)([PROMPT] * 4, ["1.5", "bad", "-2.5", "3.5"])
    assert scores == pytest.approx([1.5, math.nan, -2.5, 3.5], nan_ok=True)


# When it asks again


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_failure_is_asked_again(server: RewardServer, clock: Clock, status: int) -> None:
    server.answers(Reply(status=status), text_reply("reward:2.5"))
    assert score_one(client(server)) == 2.5
    assert len(server.asked) == 2
    assert server.asked[0].body == server.asked[1].body


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (301, "301"),
        (400, "400"),
        (401, "401: the key is not accepted, check NVIDIA_API_KEY"),
        (402, "402: the account has no credits left"),
        (403, "403: the key may not use this model, check NVIDIA_API_KEY"),
        (404, "404: the model org/judge is not available to this account, change the reward's model"),
        (410, "410: the model org/judge was retired, change the reward's model or base_url"),
        (422, "422: the conversation is refused, it may be too long"),
    ],
)
def test_a_lasting_refusal_is_explained_and_not_asked_again(
    server: RewardServer, clock: Clock, status: int, advice: str
) -> None:
    server.answers(Reply(b"{}", status=status, headers={"Retry-After": "5"}), text_reply("reward:2.5"))
    reward = client(server, model="org/judge")
    assert math.isnan(score_one(reward))
    assert len(server.asked) == 1
    assert clock.sleeps == []
    assert explained(status, "org/judge") == advice
    assert reward.last_error == f"{server.url} answers {advice}"


def test_unavailable_until_the_attempts_run_out_is_not_a_number(server: RewardServer, clock: Clock) -> None:
    server.answers(*[Reply(status=503)] * 4, text_reply("reward:2.5"))
    reward = client(server, max_attempts=4)
    assert math.isnan(score_one(reward))
    assert len(server.asked) == 4
    assert reward.last_error == f"{server.url} answers 503"
    assert score_one(client(server, max_attempts=1)) == 2.5


def test_waits_double_up_to_half_a_minute_and_are_jittered(server: RewardServer, clock: Clock) -> None:
    server.answers(Reply(status=500))
    random.seed(3)
    client(server, max_attempts=9, deadline_s=1000.0)([PROMPT], ["Hello."])
    longest = [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    shares = [wait / most for wait, most in zip(clock.sleeps, longest, strict=True)]
    assert all(0.5 <= share <= 1.0 for share in shares)
    assert len({round(share, 6) for share in shares}) == len(shares)


def test_retry_after_is_honoured_in_real_time(server: RewardServer) -> None:
    """The wait of its own choice would be one second at most."""
    server.answers(Reply(status=429, headers={"retry-after": "1.2"}), text_reply("reward:2.5"))
    assert score_one(client(server)) == 2.5
    first, second = server.asked
    assert second.arrived_s - first.arrived_s >= 1.2


@pytest.mark.parametrize(("asked_s", "waited_s"), [("7", 7.0), ("3600", 60.0)])
def test_retry_after_is_slept_exactly_and_for_a_minute_at_most(
    server: RewardServer, clock: Clock, asked_s: str, waited_s: float
) -> None:
    server.answers(Reply(status=503, headers={"Retry-After": asked_s}), text_reply("reward:2.5"))
    assert score_one(client(server)) == 2.5
    assert clock.sleeps == [waited_s]


def test_retry_after_may_be_a_date(clock: Clock) -> None:
    for ahead_s, wait_s in ((20.0, 20.0), (-20.0, 0.0), (3600.0, 60.0)):
        date = email.utils.formatdate(clock.time() + ahead_s, usegmt=True)
        assert retry_after_s({"Retry-After": date}) == wait_s


@pytest.mark.parametrize(
    "value",
    [
        "",
        "0",
        "-5",
        "nan",
        "inf",
        "soon",
        "Thu, 32 Jan 2026 00:00:00 GMT",
        "Thu, 1 Jan 99999999999999999999 00:00:00 GMT",
    ],
)
def test_a_retry_after_without_sense_asks_for_no_wait(value: str) -> None:
    assert retry_after_s({"Retry-After": value}) == 0.0
    assert retry_after_s({}) == 0.0


@pytest.mark.parametrize("broken", [Reply(status=None), Reply(b'{"choices"', missing_bytes=20)])
def test_a_dropped_connection_is_asked_again(server: RewardServer, clock: Clock, broken: Reply) -> None:
    server.answers(broken, text_reply("reward:2.5"))
    assert score_one(client(server)) == 2.5
    assert len(server.asked) == 2


def test_a_connection_dropped_for_good_is_explained(server: RewardServer, clock: Clock) -> None:
    server.answers(Reply(status=None))
    reward = client(server, max_attempts=2)
    assert math.isnan(score_one(reward))
    assert reward.last_error == f"{server.url} cannot be reached (ConnectionError)"


def test_a_server_that_is_down_stops_the_preflight(clock: Clock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    reward = NemotronReward(base_url=f"http://127.0.0.1:{port}/v1")
    with pytest.raises(
        ConfigurationError, match=r"nemotron-70b-reward does not answer: .* cannot be reached"
    ) as caught:
        preflight(reward, PROMPT, option="evaluation.reward")
    assert "change evaluation.reward" in str(caught.value)


def test_a_reply_that_takes_too_long_is_asked_for_again(server: RewardServer) -> None:
    release = threading.Event()

    def respond(asked: Asked) -> Reply:
        if asked.index == 0:
            release.wait(10.0)
        return text_reply(f"reward:{asked.index}.5")

    server.respond = respond
    assert score_one(client(server, timeout_s=0.2)) == 1.5
    release.set()


def test_a_redirect_is_not_followed(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_API_KEY", KEY)
    for status in (302, 307, 308):
        server.asked.clear()
        server.answers(Reply(status=status, headers={"Location": f"{server.url}/elsewhere"}), text_reply("reward:2.5"))
        reward = client(server)
        assert math.isnan(score_one(reward))
        assert [asked.path for asked in server.asked] == ["/v1/chat/completions"]
        assert reward.last_error == f"{server.url} answers {status}"


@pytest.mark.parametrize(
    "reply", [Reply(KEY.encode()), Reply(KEY.encode(), status=401), Reply(KEY.encode(), status=500), Reply(status=None)]
)
def test_no_error_holds_the_key(
    server: RewardServer, clock: Clock, monkeypatch: pytest.MonkeyPatch, reply: Reply
) -> None:
    monkeypatch.setenv("NVIDIA_API_KEY", KEY)
    server.answers(reply)
    reward = client(server, max_attempts=2)
    assert math.isnan(score_one(reward))
    assert reward.last_error
    assert KEY not in reward.last_error
    assert "\n" not in reward.last_error


def test_a_failure_that_passed_is_no_last_error(server: RewardServer, clock: Clock) -> None:
    server.answers(Reply(status=500), text_reply("reward:2.5"))
    reward = client(server)
    assert score_one(reward) == 2.5
    assert reward.last_error == ""


def test_the_deadline_ends_the_attempts(server: RewardServer, clock: Clock) -> None:
    """At 0, 30, 60 and 90 s; the wait after that would end at 120 s."""
    server.answers(Reply(status=503, headers={"Retry-After": "30"}))
    reward = client(server, max_attempts=20, deadline_s=100.0)
    assert math.isnan(score_one(reward))
    assert clock.sleeps == [30.0, 30.0, 30.0]
    assert len(server.asked) == 4
    assert reward.last_error == f"{server.url} answers 503"


def test_a_wait_beyond_the_deadline_is_not_begun(server: RewardServer) -> None:
    server.answers(Reply(status=429, headers={"Retry-After": "30"}))
    start = time.monotonic()
    assert math.isnan(score_one(client(server, deadline_s=0.5)))
    assert time.monotonic() - start < 5.0
    assert len(server.asked) == 1


# How many at once, and in what order


def completions_in_reverse(server: RewardServer, count: int) -> None:
    """Answer the completions only when all have arrived, the last one first."""
    waiting: list[str] = []
    changed = threading.Condition()

    def respond(asked: Asked) -> Reply:
        user, assistant = (message["content"] for message in asked.body["messages"])
        with changed:
            waiting.append(assistant)
            changed.notify_all()
            if not changed.wait_for(lambda: len(waiting) == count, timeout=10.0):
                return Reply(status=418)
        time.sleep(0.02 * (count - int(assistant)))
        return text_reply(f"reward:{user}.{assistant}")

    server.respond = respond


def test_requests_run_in_parallel_and_scores_keep_the_order_of_the_completions(server: RewardServer) -> None:
    """No request is answered before all six are there, and the first is answered last."""
    completions_in_reverse(server, 6)
    prompts = [[{"role": "user", "content": str(10 * i)}] for i in range(6)]
    scores = client(server, parallel_requests=6)(prompts, [str(i) for i in range(6)])
    assert scores == [0.0, 10.1, 20.2, 30.3, 40.4, 50.5]


def test_no_more_than_parallel_requests_are_under_way(server: RewardServer) -> None:
    under_way = most = 0

    def respond(asked: Asked) -> Reply:
        nonlocal under_way, most
        with server.lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.05)
        with server.lock:
            under_way -= 1
        return text_reply("reward:1.0")

    server.respond = respond
    assert client(server, parallel_requests=3)([PROMPT] * 9, ["x"] * 9) == [1.0] * 9
    assert most == 3


def test_progress_is_told_once_for_each_completion_scored_or_not(server: RewardServer, clock: Clock) -> None:
    server.answers(Reply(status=500), text_reply("reward:1.0"), Reply(status=404))
    told: list[None] = []
    reward = client(server, parallel_requests=1)
    reward.on_progress = lambda: told.append(None)
    assert reward([PROMPT] * 3, ["x"] * 3) == pytest.approx([1.0, math.nan, math.nan], nan_ok=True)
    assert len(told) == 3


def begins_no_earlier_than_the_limit_allows(times: Sequence[float], start: float, interval_s: float) -> bool:
    return all(moment >= start + i * interval_s for i, moment in enumerate(sorted(times)))


def test_requests_keep_to_the_limit_in_real_time_over_all_threads(server: RewardServer) -> None:
    """At 1,200 a minute they are 50 ms apart, so the twelfth comes after 550 ms."""
    reward = client(server, requests_per_minute=1200, parallel_requests=6)
    start = time.monotonic()
    assert reward([PROMPT] * 6, ["x"] * 6) == [-12.5] * 6
    assert reward([PROMPT] * 6, ["x"] * 6) == [-12.5] * 6
    assert begins_no_earlier_than_the_limit_allows([asked.arrived_s for asked in server.asked], start, 0.05)
    assert 0.55 <= time.monotonic() - start < 5.0


def test_no_two_threads_get_the_same_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still and threads are switched as often as can be, so a turn given twice shows."""
    waits: list[float] = []
    standing = SimpleNamespace(monotonic=lambda: 1000.0, sleep=waits.append)
    monkeypatch.setattr(nemotron, "time", standing)
    limiter = RateLimiter(60)

    def work() -> None:
        for _ in range(2000):
            limiter.wait()

    threads = [threading.Thread(target=work) for _ in range(8)]
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval_s)
    assert sorted(waits) == [float(turn) for turn in range(16_000)]


def test_the_limiter_spaces_calls_evenly_and_saves_nothing_up(clock: Clock) -> None:
    limiter = RateLimiter(40)
    times = []
    for pause_s in (0.0, 0.0, 1.0, 100.0, 0.0):
        clock.now += pause_s
        limiter.wait()
        times.append(clock.now - 1000.0)
    assert times == [0.0, 1.5, 3.0, 103.0, 104.5]


def test_no_limit_never_waits(clock: Clock) -> None:
    limiter = RateLimiter(0)
    for _ in range(100):
        limiter.wait()
    assert clock.sleeps == []


def test_a_further_attempt_counts_against_the_limit(server: RewardServer, clock: Clock) -> None:
    server.answers(Reply(status=500), text_reply("reward:2.5"))
    assert score_one(client(server, requests_per_minute=6)) == 2.5
    assert clock.now == pytest.approx(1010.0)
