"""A tokenizer's chat template: found, tried before it is trusted, and what it knows of turns and tools."""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.nodes
from transformers import PreTrainedTokenizerBase

from core.errors import ConfigurationError
from core.limits import memory_limit
from datamodules.messages import Message, UnusableRowError, uses_tools
from datamodules.rendering import TemplateRefusalError, render

TEMPLATES = Path(__file__).parent / "templates"
"""The chat templates that ship, each under its file's name."""
CHATML_TEMPLATE = (TEMPLATES / "chatml.jinja").read_text("utf-8")
PROBE = ("the question of a probe", "the answer to a probe")
"""Texts that every template must show, whatever it puts around them."""
PROBE_BYTES = 1 << 30
"""Memory that a template may take for a conversation of two short turns."""


class UnusableTemplateError(ConfigurationError):
    """A chat template that nothing can be learned or sampled with, for the ``reason``."""

    def __init__(self, reason: str, template: str) -> None:
        super().__init__(f"{reason}; {another_template(template)}")
        self.reason = reason


class UnstableTemplateError(ConfigurationError):
    """A chat template that writes a prefix of a conversation otherwise than the conversation begins."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, position: int) -> None:
        super().__init__(
            f"the chat template rewrites earlier text at turn {position}, so a prompt is no prefix of its "
            f"conversation; {another_template(str(tokenizer.chat_template))}"
        )


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
        UnusableTemplateError: If the template does not show what a turn says, or closes a turn without a special
            token, so that nothing could stop.
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
        raise UnusableTemplateError(str(error), template) from error
    if not all(text in rendered for text in PROBE):
        reason = "the chat template leaves out what a turn says, as one made for lists of content parts does"
        raise UnusableTemplateError(reason, template)
    after_content = rendered.rpartition(PROBE[1])[2]
    special = _special_token_pattern(tokenizer, len(tokenizer)).search(after_content)
    if special is None:
        told = f"ends an assistant turn with {after_content!r}, which holds no special token to stop on"
        raise UnusableTemplateError(f"the chat template {told}", template)
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


OF_A_TURN = ("role", "content", "tool_calls", "name", "tool_call_id", "weight")


@lru_cache(maxsize=8)
def _special_token_pattern(tokenizer: PreTrainedTokenizerBase, _vocabulary_size: int) -> re.Pattern[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def another_template(template: str) -> str:
    """What to do about a template that cannot be used."""
    return f"name another in --data.chat_template: a file, or chatml, which ships (this one begins {template[:60]!r})"
