"""A tokenizer's chat template: found, tried before it is trusted, and made to write."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.nodes
from transformers import PreTrainedTokenizerBase

from core.errors import ConfigurationError
from core.limits import memory_limit, time_limit
from core.text import printable, told
from datamodules.messages import Message, UnusableRowError, uses_tools

TEMPLATES = Path(__file__).parent / "templates"
"""The chat templates that ship, each under its file's name."""
CHATML_TEMPLATE = (TEMPLATES / "chatml.jinja").read_text("utf-8")
PROBE = ("the question of a probe", "the answer to a probe")
"""Texts that every template must show, whatever it puts around them."""
RENDER_S = 10.0
"""Seconds that a template may take for a conversation, which is some thousand times what any takes."""
PROBE_BYTES = 1 << 30
"""Memory that a template may take for a conversation of two short turns."""
LARGEST_RENDERED = 50_000_000
"""Characters of a conversation."""
RENDERED_TOGETHER = 250_000
"""Characters of the conversations that a template is given in one call; about a hundred usual rows."""


class UnstableTemplateError(ConfigurationError):
    """A chat template that writes a prefix of a conversation otherwise than the conversation begins."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, position: int) -> None:
        super().__init__(
            f"the chat template rewrites earlier text at turn {position}, so a prompt is no prefix of its "
            f"conversation; {another_template(str(tokenizer.chat_template))}"
        )


class TemplateRefusalError(ConfigurationError):
    """A chat template that does not take a conversation, and in ``reason`` what it says of it."""

    def __init__(self, roles: Sequence[str], reason: str) -> None:
        super().__init__(f"the chat template refuses a conversation with the roles {list(roles)}: {reason}")
        self.reason = reason


class TurnEnd(NamedTuple):
    """How a template closes an assistant turn: the text up to and with its end token, and what follows that."""

    closing: str
    tail: str
    token_id: int


def read_template(name: str) -> str:
    """The text of a chat template: of a file, or of one that ships.

    Raises:
        ConfigurationError: If it is neither.
    """
    shipped = {file.stem: file for file in TEMPLATES.glob("*.jinja")}
    file = Path(name) if Path(name).is_file() else shipped.get(name)
    try:
        if file is None:
            raise ConfigurationError(
                f"no chat template {name!r}; name a file in data.chat_template, or one that ships: {', '.join(shipped)}"
            )
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{name} cannot be read ({error}); change data.chat_template") from error


class ToolTurns(NamedTuple):
    """What a template writes of tools: an assistant's calls, a tool's turns, and the list of what may be called."""

    calls: bool
    results: bool
    listed: bool


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
        size += sum(len(message["content"]) for message in conversation.messages)
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


def check_template(template: str) -> None:
    """Raise a TemplateRefusalError for powers: a number can take longer to compute than any limit can interrupt."""
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        powers = parsed.find(jinja2.nodes.Pow) is not None
    except jinja2.TemplateError:  # for a tag that transformers adds, or one that rendering tells
        powers = "**" in template
    if powers:
        raise TemplateRefusalError(["user", "assistant"], "it computes powers, which no template needs")


def turn_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """Where an assistant turn ends under the tokenizer's template, and the token that generation stops on.

    Raises:
        ConfigurationError: If the template does not show what a turn says, or closes a turn without a special token,
            so that nothing could stop.
    """
    return _turn_end(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> TurnEnd:
    probe = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), PROBE, strict=True)]
    try:
        check_template(template)
        with memory_limit(PROBE_BYTES):
            rendered = render(tokenizer, probe, add_generation_prompt=False)
    except TemplateRefusalError as error:
        raise ConfigurationError(f"{error}; {another_template(template)}") from error
    if not all(text in rendered for text in PROBE):
        raise ConfigurationError(
            f"the chat template leaves out what a turn says, as one made for lists of content parts does; "
            f"{another_template(template)}"
        )
    after_content = rendered.rpartition(PROBE[1])[2]
    special = _special_token_pattern(tokenizer, len(tokenizer)).search(after_content)
    if special is None:
        raise ConfigurationError(
            f"the chat template ends an assistant turn with {after_content!r}, which holds no special token to stop "
            f"on; {another_template(template)}"
        )
    token_id: int = tokenizer.convert_tokens_to_ids(special.group())  # type: ignore[assignment]
    return TurnEnd(after_content[: special.end()], after_content[special.end() :], token_id)


def check_tools(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> None:
    """Refuse a conversation with tools under a template that would leave out what is called, or what it gave.

    Raises:
        UnusableRowError: Saying which.
    """
    calls, results = uses_tools(messages)
    if not (calls or results):
        return
    known = tool_turns(tokenizer, str(tokenizer.chat_template))
    if (calls and not known.calls) or (results and not known.results):
        raise UnusableRowError("tool turns that the chat template does not know")


@lru_cache(maxsize=8)
def tool_turns(tokenizer: PreTrainedTokenizerBase, template: str) -> ToolTurns:
    """What the tokenizer's template shows of tools, found out by having it write some."""
    call = {"name": "probe_function", "arguments": {"probe_argument": "probe value"}}
    calls = [{"id": "probe0001", "type": "function", "function": call}]  # nine letters, as Mistral's asks for
    turns: list[Message] = [
        {"role": "user", "content": PROBE[0]},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "name": "probe_function", "tool_call_id": "probe0001", "content": "what a probe gave"},
        {"role": "assistant", "content": PROBE[1]},
    ]
    nothing = {"type": "object", "properties": {}, "required": []}
    function = {"name": "probe_tool", "description": "A probe.", "parameters": nothing}

    def shows(text: str, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> bool:
        try:
            return text in render(tokenizer, messages, add_generation_prompt=False, tools=tools)
        except TemplateRefusalError:
            return False

    return ToolTurns(
        shows("probe_argument", turns),
        shows("what a probe gave", turns),
        shows("probe_tool", [turns[0], turns[3]], [{"type": "function", "function": function}]),
    )


def without_special_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
    """The turns with control tokens taken out of what they say, so that no text can open or close a turn."""
    pattern = _special_token_pattern(tokenizer, len(tokenizer))

    def cleaned(value: Any) -> Any:
        if isinstance(value, str):
            while (shorter := pattern.sub("", value)) != value:  # what is left may have closed up to another one
                value = shorter
        elif isinstance(value, dict):
            return {cleaned(key): cleaned(inner) for key, inner in value.items()}
        elif isinstance(value, list):
            return [cleaned(inner) for inner in value]
        return value

    return [
        {name: value if name == "role" else cleaned(value) for name, value in message.items() if name in OF_A_TURN}
        for message in messages
    ]


OF_A_TURN = ("role", "content", "tool_calls", "name", "tool_call_id")


@lru_cache(maxsize=8)
def _special_token_pattern(tokenizer: PreTrainedTokenizerBase, _vocabulary_size: int) -> re.Pattern[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def another_template(template: str) -> str:
    """What to do about a template that cannot be used."""
    return f"name another in --data.chat_template: a file, or chatml, which ships (this one begins {template[:60]!r})"
