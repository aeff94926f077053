"""Conversations as messages, whatever writes them as text."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = dict[str, Any]
"""``role`` (system, user, assistant or tool) and ``content``; an assistant's may have ``tool_calls``, and ``weight`` 0
where it is not to be learned."""

ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""What others call the four."""


class UnusableRowError(Exception):
    """Why a row is dropped."""


def as_messages(value: Any) -> Any:
    """Turns in any usual spelling as ours: ``from`` and ``value``, other names of roles, lists of text parts, JSON.

    What is no list of turns comes back as it is; :func:`flaw` says so.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed(value)
    if not isinstance(value, list):
        return value
    return [_as_message(turn) if isinstance(turn, Mapping) else turn for turn in value]


def _as_message(turn: Mapping[str, Any]) -> Message:
    role, content = (turn.get(ours) if turn.get(ours) is not None else turn.get(theirs) for ours, theirs in SPELLINGS)
    if isinstance(content, list):
        content = _text_of_parts(content)
    message: Message = {"role": ROLES.get(role, role) if isinstance(role, str) else role, "content": content}
    if calls := without_nulls(parsed(turn.get("tool_calls"))):
        message |= {"content": content or "", "tool_calls": [_call(call) for call in calls]}
    if message["role"] == "assistant" and turn.get("weight") == 0:  # as OpenAI's rows have it
        message["weight"] = 0
    for name in ("name", "tool_call_id"):
        if message["role"] == "tool" and isinstance(turn.get(name), str):
            message[name] = turn[name]
    return message


SPELLINGS = (("role", "from"), ("content", "value"))


def _text_of_parts(parts: Sequence[Any]) -> Any:
    """The text of a content in parts; the parts as they are where one is no text."""
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else parts  # type: ignore[arg-type]


def _call(call: Any) -> Any:
    """A tool call whose arguments are values, as templates write them as JSON themselves."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    given = {**function, "arguments": parsed(function.get("arguments"))}
    return {**call, "function": given} if "function" in call else given


def parsed(value: Any) -> Any:
    """What a text in JSON stands for; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def without_nulls(value: Any) -> Any:
    """Nested values without the keys that hold nothing, which a table gives each row for what another row has."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def flaw(messages: object) -> str:
    """Why this is no conversation of turns with text, the system's or a user's first; empty where it is one."""
    if not isinstance(messages, list) or not messages:
        return "malformed"
    for position, message in enumerate(messages):
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            return "content in parts that are not text"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return "malformed"
        if message.get("role") not in ("user", "assistant", "tool", "system" if position == 0 else "user"):
            return "malformed"
        if message["role"] == "tool" and (position == 0 or messages[position - 1]["role"] not in ("assistant", "tool")):
            return "a tool's turn behind no call"
    return "begins with an assistant turn" if messages[0]["role"] == "assistant" else ""


def says_something(message: Message) -> bool:
    """Whether a turn has text, or calls a tool."""
    return bool(message["content"].strip() or message.get("tool_calls"))


def uses_tools(messages: Sequence[Message]) -> tuple[bool, bool]:
    """Whether an assistant calls a tool, and whether a tool has a turn."""
    return any("tool_calls" in message for message in messages), any(message["role"] == "tool" for message in messages)


def plain(message: Message) -> dict[str, str]:
    """Role and content alone, as reward sources take them; a call without text is shown as JSON."""
    content = message["content"] or json.dumps(message.get("tool_calls", ""))
    return {"role": message["role"], "content": content if says_something(message) else ""}


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
