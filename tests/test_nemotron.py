"""The client of the Nemotron API against a real server on loopback: what it sends, what it reads, when it gives up."""

import email.utils
import json
import math
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import getproxies_environment

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer

from core.errors import ConfigurationError
from datamodules.messages import Message
from lightning_modules import RLOOModule
from lightning_modules.rewards import NemotronReward, WeightedReward, asking, nemotron, rate_limit, replies
from lightning_modules.rewards.budget import Budget
from lightning_modules.rewards.http import ALTERNATIVES
from lightning_modules.rewards.nemotron import folded_system, parse_score
from lightning_modules.rewards.preflight import preflight
from lightning_modules.rewards.replies import retry_after_s
from tests.clock import Clock
from tests.reward_server import Asked, Reply, RewardServer, reply_of, text_reply

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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    ticking = Clock()
    for module in (asking, rate_limit, replies):
        monkeypatch.setattr(module, "time", ticking)
    monkeypatch.setattr(asking.Asking, "_pause", lambda self, seconds: ticking.sleep(seconds))
    return ticking


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in {*getproxies_environment(), "http", "https", "all", "no"}:
        monkeypatch.delenv(f"{scheme}_proxy", raising=False)
        monkeypatch.delenv(f"{scheme}_proxy".upper(), raising=False)
    for name in ("NVIDIA_API_KEY", "REWARD_API_KEY", "REWARD_API_HOST", "NETRC"):
        monkeypatch.delenv(name, raising=False)


def key_for_server(monkeypatch: pytest.MonkeyPatch, server: RewardServer, key: str = KEY) -> None:
    """The key of a server of one's own, and the host it is for."""
    monkeypatch.setenv("REWARD_API_KEY", key)
    monkeypatch.setenv("REWARD_API_HOST", f"127.0.0.1:{server.server_port}")


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


def test_the_hosted_api_gets_a_system_turn_at_the_head_of_the_first_user_turn(
    server: RewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nemotron, "HOSTED_URL", server.url)
    key_for_server(monkeypatch, server)
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


def test_a_server_of_one_s_own_gets_a_system_turn_as_it_is(server: RewardServer) -> None:
    """As the same model would read it within the process."""
    prompt = [{"role": "system", "content": "Be brief."}, *PROMPT]
    client(server)([prompt], ["Hello."])
    assert server.asked[0].body["messages"] == [*prompt, {"role": "assistant", "content": "Hello."}]


def test_a_reply_too_large_to_be_a_score_is_told_as_that_and_not_asked_for_again(server: RewardServer) -> None:
    server.respond = lambda asked: text_reply("reward:1.0" + " " * 1_100_000)
    reward = client(server)
    assert math.isnan(score_one(reward))
    assert reward.last_error == f"{server.url} sends a reply of more than 1,000,000 bytes, which is no score"
    assert reward.calls == {"requests": 1, "too large": 1}


def test_a_prompt_without_a_system_turn_is_folded_to_itself() -> None:
    prompt: list[Message] = [{"role": "user", "content": "system"}]
    assert folded_system(prompt) == prompt
    assert folded_system(prompt) is not prompt
    assert folded_system([]) == []


def test_the_key_is_sent_as_a_bearer_token(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    key_for_server(monkeypatch, server, f" {KEY}\n")
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
        key_for_server(monkeypatch, server, key)
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
    key_for_server(monkeypatch, server)
    assert score_one(client(server, base_url=server.url + end)) == -12.5


@pytest.mark.parametrize("key", ["two words", "two\nlines", "nvapi-…", "nvapi-\x07"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(
    server: RewardServer, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    key_for_server(monkeypatch, server, key)
    with pytest.raises(ConfigurationError, match="REWARD_API_KEY holds") as caught:
        score_one(client(server))
    assert key not in str(caught.value)
    assert server.asked == []


def test_the_key_takes_no_way_through_a_proxy_to_this_machine(
    server: RewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_for_server(monkeypatch, server)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert score_one(client(server)) == -12.5
    assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"


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
        ({"base_url": "integrate.api.nvidia.com/v1"}, "must be http:// or https://, a host and a path, got 'integrate"),
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
        (401, "401: the key is not accepted, check REWARD_API_KEY, sent where REWARD_API_HOST is {host}"),
        (402, "402: the account has no credits left; add some, or judge with a reward model of your own"),
        (403, "403: the key may not use this model, check REWARD_API_KEY, sent where REWARD_API_HOST is {host}"),
        (404, f"404: the model org/judge is not there for this account; {ALTERNATIVES}"),
        (410, f"410: the model org/judge was retired; {ALTERNATIVES}"),
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
    advice = advice.format(host=f"127.0.0.1:{server.server_port}")
    assert reward.explained(status) == advice
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
    client(server, max_attempts=9, time_limit_s=1000.0)([PROMPT], ["Hello."])
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
    key_for_server(monkeypatch, server)
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
    key_for_server(monkeypatch, server)
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
    reward = client(server, max_attempts=20, time_limit_s=100.0)
    assert math.isnan(score_one(reward))
    assert clock.sleeps == [30.0, 30.0, 30.0]
    assert len(server.asked) == 4
    assert reward.last_error == f"{server.url} answers 503"


def test_a_wait_beyond_the_deadline_is_not_begun(server: RewardServer) -> None:
    server.answers(Reply(status=429, headers={"Retry-After": "30"}))
    start = time.monotonic()
    assert math.isnan(score_one(client(server, time_limit_s=0.5)))
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


def test_scores_arrive_as_they_are_had_and_not_all_at_the_end(server: RewardServer) -> None:
    """The second completion is held back until the score of the first has been received."""
    received = threading.Event()

    def respond(asked: Asked) -> Reply:
        text = asked.body["messages"][-1]["content"]
        if text == "2" and not received.wait(10.0):
            return Reply(status=418)
        return text_reply(f"reward:{text}")

    server.respond = respond
    arrived = []
    for position, score in client(server).stream([PROMPT] * 2, ["1", "2"]):
        arrived.append((position, score))
        received.set()
    assert arrived == [(0, 1.0), (1, 2.0)]


@pytest.mark.parametrize("status", [401, 500])
def test_the_end_of_the_asking_wakes_who_waits_for_a_turn(server: RewardServer, status: int) -> None:
    """Four threads under a limit of one a minute: the refusal of the first ends the wait of the others."""
    server.answers(Reply(status=status))
    reward = client(server, requests_per_minute=1, parallel_requests=4, max_attempts=1)
    started = time.monotonic()
    if status == 401:
        assert all(math.isnan(score) for score in reward([PROMPT] * 8, ["x"] * 8))
    else:
        next(iter(reward.stream([PROMPT] * 8, ["x"] * 8)))
    assert time.monotonic() - started < 10.0
    assert len(server.asked) == reward.calls["requests"] == 1


def test_a_server_that_trickles_its_headers_is_left_at_the_time_limit(server: RewardServer) -> None:
    def trickle(asked: Asked) -> Reply:
        time.sleep(4.0)
        return text_reply("reward:1.0")

    server.respond = trickle
    reward = client(server, timeout_s=30.0, time_limit_s=0.3, max_attempts=1)
    started = time.monotonic()
    assert math.isnan(score_one(reward))
    assert time.monotonic() - started < 3.0


def test_whoever_stops_listening_stops_the_asking(server: RewardServer) -> None:
    reward = client(server, parallel_requests=2)
    for _ in reward.stream([PROMPT] * 50, [str(i) for i in range(50)]):
        break
    assert len(server.asked) < 10


def test_requests_and_failures_are_counted_by_kind(server: RewardServer, clock: Clock) -> None:
    server.answers(
        Reply(status=500), Reply(b"{}"), Reply(status=None), text_reply("reward:1.0"), Reply(status=422), Reply()
    )
    reward = client(server, parallel_requests=1)
    assert reward([PROMPT] * 2, ["x", "y"]) == pytest.approx([1.0, math.nan], nan_ok=True)
    assert reward.calls == {"requests": 5, "500": 1, "no score": 1, "connection": 1, "422": 1}


# When it stops for good


@pytest.mark.parametrize("status", [401, 402, 403, 404, 410])
def test_after_a_lasting_refusal_nothing_more_is_asked(server: RewardServer, status: int) -> None:
    server.answers(text_reply("reward:1.0"), Reply(status=status))
    reward = client(server, parallel_requests=1)
    scores = reward([PROMPT] * 9, [str(i) for i in range(9)])
    assert scores == pytest.approx([1.0] + [math.nan] * 8, nan_ok=True)
    assert len(server.asked) == 2
    assert reward.last_error == f"{server.url} answers {reward.explained(status)}"


def test_a_refused_conversation_stops_no_other(server: RewardServer) -> None:
    server.answers(*[Reply(status=422)] * 15, text_reply("reward:1.0"))
    scores = client(server, parallel_requests=1)([PROMPT] * 16, [str(i) for i in range(16)])
    assert [math.isnan(score) for score in scores] == [True] * 15 + [False]


def test_a_dead_server_is_given_up_after_a_run_of_failures(server: RewardServer, clock: Clock) -> None:
    """Ten failures in a row, where eighty conversations of five attempts would have been four hundred."""
    server.answers(Reply(status=500))
    reward = client(server, parallel_requests=1)
    assert all(math.isnan(score) for score in reward([PROMPT] * 80, ["x"] * 80))
    assert len(server.asked) == 10
    assert reward.last_error == f"{server.url} answers 500 (10 times in a row)"


def test_any_score_ends_a_run_of_failures(server: RewardServer, clock: Clock) -> None:
    server.respond = lambda asked: Reply(status=500) if asked.index % 5 else text_reply("reward:1.0")
    scores = client(server, parallel_requests=1)([PROMPT] * 20, ["x"] * 20)
    assert scores == [1.0] * 20
    assert len(server.asked) > 60


def test_being_throttled_is_not_being_dead(server: RewardServer, clock: Clock) -> None:
    server.answers(*[Reply(status=429)] * 12, text_reply("reward:1.0"))
    assert score_one(client(server, max_attempts=20)) == 1.0


def test_no_more_than_max_calls_are_made_and_the_rest_says_so(server: RewardServer, clock: Clock) -> None:
    server.answers(Reply(status=500), text_reply("reward:1.0"))
    reward = client(server, parallel_requests=1, max_calls=3)
    assert reward([PROMPT] * 4, list("abcd")) == pytest.approx([1.0, 1.0, math.nan, math.nan], nan_ok=True)
    assert len(server.asked) == 3
    assert reward.last_error == "max_calls=3 is used up; start again to go on, or raise it"


def test_the_time_limit_is_for_all_scores_together(server: RewardServer) -> None:
    """A hundred hanging requests of half a second, four at a time, would take over a minute with their attempts."""
    server.respond = lambda asked: (time.sleep(0.6), Reply(status=None))[1]
    reward = client(server, parallel_requests=4, timeout_s=0.5, time_limit_s=1.5)
    started = time.monotonic()
    scores = reward([PROMPT] * 100, ["x"] * 100)
    assert time.monotonic() - started < 1.5 + 1.0
    assert all(math.isnan(score) for score in scores)
    assert reward.last_error


def test_processes_share_the_calls_and_machines_the_rate(server: RewardServer) -> None:
    reward = client(server, requests_per_minute=40, max_calls=100)
    shares = []
    for rank in range(8):
        reward.share_budget(processes=8, rank=rank, machines=2)
        shares.append(reward.budget.left)
    assert shares == [13] * 4 + [12] * 4
    assert reward.budget.limiter.per_minute == 20


def test_a_reward_that_trains_shares_its_calls_and_rate_as_one_that_evaluates(
    server: RewardServer, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 1 of 8 on two machines; of its 13 calls the preflight takes one. Within a weighted sum as well."""
    for name, value in (("world_size", 8), ("global_rank", 1), ("num_nodes", 2)):
        monkeypatch.setattr(Trainer, name, value)
    rewards = [client(server, requests_per_minute=40, max_calls=100) for _ in range(2)]
    for reward in (rewards[0], WeightedReward([rewards[1]], weights=[1.0])):
        module = RLOOModule(reward=reward, model_name=str(tiny_model_dir))
        module.trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        module.setup("fit")
    assert [reward.budget.left for reward in rewards] == [12, 12]
    assert [reward.budget.limiter.per_minute for reward in rewards] == [20, 20]


def test_a_further_attempt_counts_against_the_limit(server: RewardServer, clock: Clock) -> None:
    server.answers(Reply(status=500), text_reply("reward:2.5"))
    assert score_one(client(server, requests_per_minute=1)) == 2.5
    assert clock.now == pytest.approx(1000.0 + rate_limit.WINDOW_S)


def test_the_budget_is_one_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen threads look at it in the same moment, and three calls are left."""

    class Slow(Budget):
        """Between the look at what is left and the spending of it, others get a turn."""

        @property
        def left(self) -> int | None:  # type: ignore[override]
            left: int | None = self.__dict__["left"]
            time.sleep(0.01)
            return left

        @left.setter
        def left(self, value: int | None) -> None:
            self.__dict__["left"] = value

    budget = Slow(0, 3, "source")
    started = threading.Barrier(16)

    def take(_: int) -> bool:
        started.wait(5)
        return budget.take()

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(take, range(16))) == 3
    assert budget.left == 0


def test_a_turn_that_is_not_taken_is_given_back_to_the_budget(server: RewardServer) -> None:
    """Where the rate's limit would have it wait beyond the time limit."""
    reward = client(server, requests_per_minute=1, max_calls=5, time_limit_s=0.2)
    scores = reward([PROMPT] * 2, ["a", "b"])
    assert sum(math.isnan(score) for score in scores) == 1
    assert reward.budget.left == 4


def test_what_is_served_is_not_looked_up_behind_a_redirect(
    server: RewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def get(self: Any, url: str, **options: Any) -> Any:
        asked.append(options)
        raise requests.ConnectionError

    monkeypatch.setattr(requests.Session, "get", get)
    assert client(server)._served() == []
    assert [options["allow_redirects"] for options in asked] == [False] * 3
