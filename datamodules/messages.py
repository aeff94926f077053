"""Conversations as messages, whatever writes them as text."""

from collections.abc import Iterator, Sequence
from typing import Any

Message = dict[str, str]
"""``role`` (system, user or assistant) and ``content``."""


def flaw(messages: object) -> str:
    """Why this is no conversation of turns with text, the system's or a user's first; empty where it is one."""
    if not isinstance(messages, list) or not messages:
        return "malformed"
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return "malformed"
        if message.get("role") not in ("user", "assistant", "system" if position == 0 else "user"):
            return "malformed"
    return "begins with an assistant turn" if messages[0]["role"] == "assistant" else ""


def before_answer(messages: Any) -> Any:
    """The conversation without the assistant turn at its end; what is no conversation comes back as it is."""
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return messages
    return messages[:-1] if messages[-1].get("role") == "assistant" else messages


def shortened(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The conversation, then the same without its earliest exchanges, ever shorter; a system turn stays."""
    yield list(messages)
    first = 1 if messages and messages[0]["role"] == "system" else 0
    for position in range(first + 1, len(messages)):
        if messages[position]["role"] == "user":
            yield [*messages[:first], *messages[position:]]
