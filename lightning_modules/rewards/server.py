"""A reward model behind HTTP, under the protocol of the Nemotron API; needs the ``serve`` extra."""

import asyncio
import hashlib
import json
import math
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

from core.secrets import redact
from core.text import printable
from lightning_modules.rewards.base import Reward, checked_scores, reward_identity, reward_name

LARGEST_BODY = 1_000_000
"""Bytes; a conversation of some two hundred thousand words."""
PATIENCE_S = 30.0
"""How long a client may take to send its request."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ChatMessage(BaseModel):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(BaseModel):
    """The part of a chat-completions request that a reward model reads."""

    messages: list[ChatMessage]
    model: str = ""


def create_app(reward: Reward) -> FastAPI:
    """An application with ``POST /v1/chat/completions``, ``GET /v1/models`` and ``GET /health``.

    The score is the text of the reply, ``reward:-12.5``, as the hosted 70B model sends it. Conversations are scored one
    after the other, while the other two answer at any time.
    """
    app = FastAPI(title="Reward model", docs_url=None, redoc_url=None)
    app.add_middleware(BoundedBody)
    name = reward_name(reward)
    identity = json.dumps(reward_identity(reward))
    digest = hashlib.sha256(identity.encode()).hexdigest() if identity != "null" else uuid.uuid4().hex
    one_at_a_time = asyncio.Lock()

    @app.exception_handler(RequestValidationError)
    async def unusable(request: Request, error: RequestValidationError) -> JSONResponse:
        places = sorted({".".join(map(str, problem["loc"])) for problem in error.errors()})
        return JSONResponse({"detail": f"no conversation to score: {', '.join(places)}"}, 422)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "digest": digest}]}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest) -> dict[str, Any]:
        messages = [message.model_dump() for message in request.messages]
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise HTTPException(422, "the last message must be the assistant turn to score")
        async with one_at_a_time:
            score = await run_in_threadpool(score_of, reward, messages)
        if not math.isfinite(score):
            raise HTTPException(422, "the reward model gives this conversation no score")
        message = {"role": "assistant", "content": f"reward:{float(score)!r}"}
        return {
            "id": uuid.uuid4().hex,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": name,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
        }

    return app


def score_of(reward: Reward, messages: list[dict[str, str]]) -> float:
    """The score of the last turn.

    Raises:
        HTTPException: If the reward fails, with the reason in the log alone and no key in it.
    """
    try:
        return checked_scores(reward, [messages[:-1]], [messages[-1]["content"]])[0]
    except Exception as error:
        print(
            f"the reward failed: {printable(redact(f'{type(error).__name__}: {error}'))}", file=sys.stderr, flush=True
        )
        raise HTTPException(500, "the reward failed; the server's log says why") from None


class BoundedBody:
    """Refuses a request whose body is too large or too long on its way, before anything is made of it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, more = bytearray(), True
        give_up_at = time.monotonic() + PATIENCE_S
        while more:
            try:
                message = await asyncio.wait_for(receive(), give_up_at - time.monotonic())
            except TimeoutError:
                await refuse(send, 408, f"the request was not complete within {PATIENCE_S:g} s")
                return
            if message["type"] != "http.request":  # the client has gone
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > LARGEST_BODY:
                await refuse(send, 413, f"the request has more than {LARGEST_BODY:,} bytes")
                return
        whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def once() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, once, send)


async def refuse(send: Send, status: int, why: str) -> None:
    """Answer with a status and close the connection, as the rest of the request is not read."""
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": why}).encode()})


class Impatient(H11Protocol):
    """Closes a connection on which no request comes."""

    @override
    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(PATIENCE_S, self._close_idle)

    def _close_idle(self) -> None:
        if self.cycle is None:
            self.transport.close()


def serve(reward: Reward, *, host: str, port: int) -> None:
    """Serve until interrupted."""
    print(f"serving {printable(reward_name(reward))} at http://{host}:{port}/v1", flush=True)
    uvicorn.run(create_app(reward), host=host, port=port, log_level="warning", http=Impatient)
