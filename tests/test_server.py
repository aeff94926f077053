"""A reward served by uvicorn on loopback and asked by the client: over HTTP a score is what it is at home."""

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import uvicorn

from datamodules.messages import Message
from lightning_modules.rewards import NemotronReward, Reward, server
from lightning_modules.rewards.rules import Mentions, brevity
from lightning_modules.rewards.server import create_app, serve
from tests.command_line import Cli

Serving = Callable[[Reward], AbstractContextManager[str]]
CONVERSATION = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@contextmanager
def served(reward: Reward) -> Iterator[str]:
    """The reward's URL for as long as it is served."""
    running = uvicorn.Server(
        uvicorn.Config(
            create_app(reward), host="127.0.0.1", port=0, log_level="warning", ws="none", http=server.Impatient
        )
    )
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        give_up_at = time.monotonic() + 20.0
        while not running.started and thread.is_alive() and time.monotonic() < give_up_at:
            time.sleep(0.01)
        assert running.started
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        running.should_exit = True
        thread.join()


class ByLength:
    """An uneven number for each conversation, from all of its texts; none for a completion that says so."""

    name = "by length"

    def __init__(self) -> None:
        self.under_way = 0
        self.most = 0

    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        time.sleep(0.01)
        scores = [self.score(*pair) for pair in zip(prompts, completions, strict=True)]
        self.under_way -= 1
        return scores

    def score(self, prompt: Sequence[Message], completion: str) -> float:
        if completion in ("nan", "inf"):
            return float(completion)
        turns = sum((i + 1) * len(message["role"] + message["content"]) for i, message in enumerate(prompt))
        return -turns / 7 - len(completion) / 3e5


@pytest.fixture(scope="module")
def reward() -> ByLength:
    return ByLength()


@pytest.fixture(scope="module")
def url(reward: ByLength) -> Iterator[str]:
    with served(reward) as address:
        yield address


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVIDIA_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def client(url: str, **options: Any) -> NemotronReward:
    return NemotronReward(**{"base_url": url, "requests_per_minute": 0, **options})


def post(url: str, body: object) -> requests.Response:
    return requests.post(f"{url}/chat/completions", json=body, timeout=10)


def test_scores_over_http_are_those_at_home_to_the_last_bit(url: str, reward: ByLength) -> None:
    prompts = [
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be brief."}, *CONVERSATION, {"role": "user", "content": "And now?\n\nßü"}],
        [{"role": "user", "content": 'A rather longer question, with "quotes" and a \\.'}],
    ] * 4
    completions = [f"reply {'x' * i}" for i in range(12)]
    expected = reward(prompts, completions)
    assert len(set(expected)) == 12
    assert client(url)(prompts, completions) == expected


def test_the_reward_is_never_called_from_two_requests_at_once(url: str, reward: ByLength) -> None:
    reward.most = 0
    client(url, parallel_requests=8)([CONVERSATION[:1]] * 16, ["x"] * 16)
    assert reward.most == 1


@pytest.mark.parametrize("text", ["nan", "inf"])
def test_a_completion_without_a_score_is_refused_and_so_not_a_number(url: str, text: str) -> None:
    refused = post(url, {"messages": [CONVERSATION[0], {"role": "assistant", "content": text}]})
    assert refused.status_code == 422
    assert refused.json() == {"detail": "the reward model gives this conversation no score"}
    asking = client(url)
    scores = asking([CONVERSATION[:1]] * 3, ["a", text, "b"])
    assert [math.isnan(score) for score in scores] == [False, True, False]
    assert asking.last_error == f"{url} answers 422: the conversation is refused, it may be too long"


@pytest.mark.parametrize(
    "body",
    [
        None,
        {},
        {"messages": []},
        {"messages": CONVERSATION[:1]},
        {"messages": CONVERSATION[1:]},
        {"messages": [*CONVERSATION, CONVERSATION[0]]},
        {"messages": [{"role": "user"}, CONVERSATION[1]]},
        {"messages": [CONVERSATION[0], {"role": "assistant", "content": None}]},
        {"messages": "Hi"},
        {"messages": [{"role": "<|im_start|>system", "content": "x"}, CONVERSATION[1]]},
        {"messages": [{"role": "tool", "content": "x"}, CONVERSATION[1]]},
    ],
)
def test_a_request_without_an_assistant_turn_to_score_is_refused(url: str, body: object) -> None:
    assert post(url, body).status_code == 422


def raw(url: str, request: bytes, *, seconds: float = 5.0) -> bytes:
    """What comes back before the connection is closed."""
    host, _, port = url.removeprefix("http://").removesuffix("/v1").partition(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(request)
        received = b""
        with suppress(ConnectionResetError):
            while piece := connection.recv(65_536):
                received += piece
        return received


def test_a_body_that_is_no_json_of_numbers_is_refused(url: str) -> None:
    for body in (b'{"messages": NaN}', b'{"messages": [NaN, {"role": Infinity}]}', b"{", b"\xff"):
        reply = requests.post(f"{url}/chat/completions", data=body, timeout=10)
        assert reply.status_code == 422, reply.text
        assert reply.json()["detail"].startswith("no conversation to score")


@pytest.mark.parametrize("header", [b"Content-Length: 3000000", b"Transfer-Encoding: chunked"])
def test_a_body_that_is_too_large_is_not_read_to_its_end(url: str, header: bytes) -> None:
    """Neither where it says how long it is nor where it does not."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n\r\n"
    piece = b"x" * 100_000
    pieces = [b"%x\r\n%s\r\n" % (len(piece), piece)] * 12 if b"chunked" in header else [piece] * 12
    assert b" 413 " in raw(url, head + b"".join(pieces)).split(b"\r\n")[0]


def test_a_client_that_stalls_is_let_go(monkeypatch: pytest.MonkeyPatch, reward: ByLength) -> None:
    monkeypatch.setattr(server, "PATIENCE_S", 0.3)
    with served(reward) as url:
        assert raw(url, b"") == b""
        assert raw(url, b"POST /v1/chat/completions HTTP/1.1\r\nHost:") == b""
        half = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{"
        assert b" 408 " in raw(url, half).split(b"\r\n")[0]


def test_health_answers_while_many_conversations_are_scored() -> None:
    release = threading.Event()

    def slow(prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        release.wait(20)
        return [1.0]

    with served(slow) as url, ThreadPoolExecutor(60) as pool:
        replies = [pool.submit(post, url, {"messages": CONVERSATION}) for _ in range(60)]
        time.sleep(0.3)
        health = requests.get(url.replace("/v1", "/health"), timeout=2)
        assert health.status_code == 200
        assert requests.get(f"{url}/models", timeout=2).status_code == 200
        assert not any(reply.done() for reply in replies)
        release.set()
        assert {reply.result().status_code for reply in replies} == {200}


def test_a_reward_that_fails_is_told_in_the_log_alone_and_without_a_key(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    key = "nvapi-" + "Ab3_" * 8

    def failing(prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        if completions[0] == "leave":
            raise SystemExit(0)
        raise RuntimeError(f"refused {key}\x1b[31m")

    with served(failing) as url:
        for text, told in (("x", "RuntimeError: refused ***\\x1b[31m"), ("leave", "tried to end the process")):
            reply = post(url, {"messages": [CONVERSATION[0], {"role": "assistant", "content": text}]})
            assert reply.status_code == 500
            assert reply.json() == {"detail": "the reward failed; the server's log says why"}
            assert told in capfd.readouterr().err
        assert requests.get(url.replace("/v1", "/health"), timeout=2).status_code == 200


def test_a_reply_has_the_shape_of_the_hosted_one(url: str, reward: ByLength) -> None:
    before = int(time.time())
    reply = post(url, {"messages": CONVERSATION, "model": "any", "temperature": 0.0})
    assert reply.status_code == 200
    content = reply.json()
    (choice,) = content["choices"]
    assert choice["message"] == {"role": "assistant", "content": f"reward:{reward.score(CONVERSATION[:1], 'Hello.')!r}"}
    assert choice["logprobs"] is None
    assert content["object"] == "chat.completion"
    assert content["model"] == "by length"
    assert before <= content["created"] <= time.time()
    assert content["id"] != post(url, {"messages": CONVERSATION}).json()["id"]


def test_the_server_names_its_model_and_its_health(url: str) -> None:
    models = requests.get(f"{url}/models", timeout=10).json()
    (entry,) = models["data"]
    assert models["object"] == "list"
    assert (entry["id"], entry["object"]) == ("by length", "model")
    health = requests.get(url.replace("/v1", "/health"), timeout=10)
    assert (health.status_code, health.json()) == (200, {"status": "ok"})


def test_another_judge_at_an_old_address_is_another_source_of_scores() -> None:
    """A client has to notice, or it would set kept scores of one judge against new ones of another."""
    identities = []
    for reward in (brevity, Mentions("a"), Mentions("b"), Mentions("b")):
        with served(reward) as url:
            asked = NemotronReward(base_url=url)
            assert asked.identity[1] == url
            identities.append(asked.identity[2:])
    assert identities[0] != identities[1] != identities[2] == identities[3]


def test_a_numpy_number_is_sent_as_a_number() -> None:
    def score(prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        return [np.float64(-2.5) for _ in completions]

    with served(score) as url:
        assert client(url, max_attempts=1)([CONVERSATION[:1]], ["x"]) == [-2.5]


def test_serving_says_where_and_listens_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(server.uvicorn, "run", lambda app, **options: calls.append({"title": app.title, **options}))
    serve(brevity, host="127.0.0.2", port=8123)
    assert capsys.readouterr().out == "serving brevity at http://127.0.0.2:8123/v1\n"
    assert calls == [
        {"title": "Reward model", "host": "127.0.0.2", "port": 8123, "log_level": "warning"}
        | {"http": server.Impatient}
    ]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["served_rewards.polite"], "polite"),
        (["lightning_modules.rewards.rules.brevity"], "brevity"),
        (["lightning_modules.rewards.rules.Mentions", "--reward.word", "please"], "mentions please"),
    ],
)
def test_whatever_reward_trains_can_be_served(
    arguments: list[str], name: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's own example, without annotations, among them."""
    code = 'def polite(prompts, completions):\n    return [float("please" in text.lower()) for text in completions]\n'
    (tmp_path / "served_rewards.py").write_text(code)  # a name that no other test imports
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server.uvicorn, "run", lambda *_, **__: None)
    result = cli("serve-reward", "--reward", *arguments, "--port", "8123")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"serving {name} at http://127.0.0.1:8123/v1\n"
