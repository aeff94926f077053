"""A real HTTP server on loopback that stands in for a reward API: it remembers what it was asked."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from typing_extensions import override


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


def reply_of(content: object, logprobs: object = None, *, as_list: bool = False) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {"choices": [{"index": 0, "message": [message] if as_list else message, "logprobs": logprobs}]}


def text_reply(content: str) -> Reply:
    return Reply(json.dumps(reply_of(content)).encode())
