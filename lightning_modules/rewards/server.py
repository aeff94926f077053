"""A reward model behind HTTP, under the protocol of the Nemotron API; needs the ``serve`` extra."""

import hashlib
import json
import math
import threading
import time
import uuid
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from lightning_modules.rewards.base import Reward, reward_identity, reward_name


class ChatMessage(BaseModel):
    """One turn."""

    role: str
    content: str


class ChatRequest(BaseModel):
    """The part of a chat-completions request that a reward model reads."""

    messages: list[ChatMessage]
    model: str = ""


def create_app(reward: Reward) -> FastAPI:
    """An application with ``POST /v1/chat/completions``, ``GET /v1/models`` and ``GET /health``.

    The score is the text of the reply, ``reward:-12.5``, as the hosted 70B model sends it.
    """
    app = FastAPI(title="Reward model", docs_url=None, redoc_url=None)
    name = reward_name(reward)
    identity = json.dumps(reward_identity(reward))
    digest = hashlib.sha256(identity.encode()).hexdigest() if identity != "null" else uuid.uuid4().hex
    one_at_a_time = threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "digest": digest}]}

    @app.post("/v1/chat/completions")
    def chat_completions(request: ChatRequest) -> dict[str, Any]:
        messages = [message.model_dump() for message in request.messages]
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise HTTPException(422, "the last message must be the assistant turn to score")
        with one_at_a_time:
            score = reward([messages[:-1]], [messages[-1]["content"]])[0]
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


def serve(reward: Reward, *, host: str, port: int) -> None:
    """Serve until interrupted."""
    print(f"serving {reward_name(reward)} at http://{host}:{port}/v1", flush=True)
    uvicorn.run(create_app(reward), host=host, port=port, log_level="warning")
