"""A chat template made to write: conversations one by one or many at a time, within bounds of time and size."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from core.errors import ConfigurationError
from core.limits import time_limit
from core.text import printable, told
from datamodules.messages import Message

RENDER_S = 10.0
"""Seconds that a call of a template may take, which is some hundred times what any takes."""
LARGEST_RENDERED = 50_000_000
"""Characters of a conversation."""
RENDERED_TOGETHER = 250_000
"""Characters of the conversations that a template is given in one call; about a hundred usual rows."""


class TemplateRefusalError(ConfigurationError):
    """A chat template that does not take a conversation, and in ``reason`` what it says of it."""

    def __init__(self, roles: Sequence[str], reason: str) -> None:
        super().__init__(f"the chat template refuses a conversation with the roles {list(roles)}: {reason}")
        self.reason = reason


class Conversation(NamedTuple):
    """What a template is to write: turns, and behind them the opening of an assistant's or nothing.

    ``tools`` is what may be called, as JSON schemas, for templates that list it.
    """

    messages: Sequence[Message]
    add_generation_prompt: bool = False
    tools: Sequence[Any] | None = None


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Any] | None = None,
) -> str:
    """The conversation as the template writes it, with the tools that may be called where it takes them.

    Raises:
        TemplateRefusalError: If the template refuses the conversation.
    """
    try:
        return _written(tokenizer, [messages], add_generation_prompt, tools)[0]
    except Exception as error:  # a template is a program
        reason = printable(str(error)) if isinstance(error, jinja2.TemplateError) else told(error)
        raise TemplateRefusalError([message["role"] for message in messages], reason) from error


def render_all(
    tokenizer: PreTrainedTokenizerBase, conversations: Iterable[Conversation]
) -> Iterator[str | TemplateRefusalError]:
    """Each conversation as :func:`render` gives it, or the error that it raises, one after the other.

    Those without tools are asked for together, which takes half the time of as many calls.
    """
    for group in _groups(conversations):
        found: dict[int, str | TemplateRefusalError] = {}
        for opened in (True, False):
            alike = [n for n, one in enumerate(group) if one.add_generation_prompt is opened and not one.tools]
            turns = [group[number].messages for number in alike]
            with contextlib.suppress(Exception):  # each is then asked for alone, and says what is wrong with it
                found |= zip(alike, _written(tokenizer, turns, opened) if len(turns) > 1 else [], strict=False)
        for number, (messages, opened, tools) in enumerate(group):
            if number not in found:
                try:
                    found[number] = render(tokenizer, messages, add_generation_prompt=opened, tools=tools)
                except TemplateRefusalError as refusal:
                    found[number] = refusal
            yield found.pop(number)


def _groups(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    """As many as make a call worth while, and no more text in memory."""
    group: list[Conversation] = []
    size = 0
    for conversation in conversations:
        group.append(conversation)
        size += sum(len(str(message.get("content", ""))) for message in conversation.messages)
        if size >= RENDERED_TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group


def _written(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    add_generation_prompt: bool,
    tools: Sequence[Any] | None = None,
) -> list[str]:
    if not all(conversations):
        raise ValueError("it has no turns")
    with time_limit(RENDER_S):
        texts: list[str] = tokenizer.apply_chat_template(  # type: ignore[assignment]
            [list(messages) for messages in conversations],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            tools=list(tools) if tools else None,
        )
    longest = max(map(len, texts))
    if longest > LARGEST_RENDERED:
        raise ValueError(f"it makes {longest:,} characters of them, and {LARGEST_RENDERED:,} are the most")
    return texts
