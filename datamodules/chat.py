"""From a conversation to token ids and the mask of what is learned, with any prefix-stable chat template."""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.nodes
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from core.errors import ConfigurationError
from core.limits import memory_limit, time_limit
from core.text import printable, told

Message = dict[str, str]
"""``role`` (system, user or assistant) and ``content``."""

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


class Encoded(NamedTuple):
    """A conversation as tokens; ``completion_mask`` is True on assistant tokens, their end-of-turn token included."""

    input_ids: list[int]
    completion_mask: list[bool]


class Piece(NamedTuple):
    """Text that a model is given, or that it is to learn to write."""

    text: str
    learned: bool


class TurnEnd(NamedTuple):
    """How a template closes an assistant turn: the text up to and with its end token, and what follows that."""

    closing: str
    tail: str
    token_id: int


def check_model_name(model_name: str, *, option: str = "model.model_name") -> None:
    """Raise a ConfigurationError where the name can be neither a directory nor a hub id."""
    looks_local = model_name.startswith((".", "/", "~")) or model_name.count("/") > 1
    if not Path(model_name).is_dir() and (looks_local or model_name.startswith("outputs/")):
        raise ConfigurationError(
            f"model directory {model_name} does not exist; run the stage that makes it or change {option}"
        )


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


def load_tokenizer(
    model_name: str, *, chat_template: str | None = None, option: str = "model.model_name"
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a chat template and a pad token whatever it came with.

    A tokenizer without a template gets ChatML, whose two markers become special tokens where the vocabulary lacks
    them; the model then needs :func:`lightning_modules.models.loading.resize_embeddings`.

    Args:
        model_name: Hub id or directory.
        chat_template: A file, or the name of a template that ships, in the place of the tokenizer's own.
        option: The option to name in an error.

    Raises:
        ConfigurationError: If there is no such tokenizer or template.
    """
    check_model_name(model_name, option=option)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_name)
    except Exception as error:  # whatever a foreign file can raise
        raise ConfigurationError(f"no tokenizer in {model_name!r} ({told(error)}); change {option}") from error
    if not tokenizer(PROBE[0], add_special_tokens=False)["input_ids"]:  # as of a directory without tokenizer files
        raise ConfigurationError(f"no tokenizer in {model_name!r} (its vocabulary is empty); change {option}")
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML_TEMPLATE
    if tokenizer.chat_template == CHATML_TEMPLATE:
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in ("<|im_start|>", "<|im_end|>") if token not in vocabulary]
        if missing:
            tokenizer.add_special_tokens({"additional_special_tokens": missing})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(turn_end(tokenizer).token_id)
    tokenizer.padding_side = "left"
    return tokenizer


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The conversation as the template writes it.

    Raises:
        TemplateRefusalError: If the template refuses the conversation.
    """
    try:
        with time_limit(RENDER_S):
            text = str(
                tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
    except Exception as error:  # a template is a program
        reason = printable(str(error)) if isinstance(error, jinja2.TemplateError) else told(error)
        raise TemplateRefusalError([message["role"] for message in messages], reason) from error
    if len(text) > LARGEST_RENDERED:
        reason = f"it makes {len(text):,} characters of them, and {LARGEST_RENDERED:,} are the most"
        raise TemplateRefusalError([message["role"] for message in messages], reason)
    return text


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


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> Encoded:
    """Token ids and completion mask of a conversation, up to its last assistant turn or to a generation prompt.

    Text is tokenised in the pieces in which a model meets it: what it is given, then what it writes. So the tokens
    of a prompt are an exact prefix of the tokens of every conversation that goes on from it. Under a template that
    rewrites earlier turns nothing can be learned of them; a prompt is then what the template writes, in one piece.

    Args:
        tokenizer: With a chat template.
        messages: The turns in order.
        add_generation_prompt: End with the opening of an assistant turn instead of the last assistant turn.

    Raises:
        UnstableTemplateError: If rendering a prefix of the conversation is not a prefix of its rendering, as when a
            template rewrites earlier turns, and the conversation is to be learned.
        ConfigurationError: If the template cannot be used at all.
    """
    messages = without_special_tokens(tokenizer, messages)
    end = turn_end(tokenizer)
    pieces: list[Piece] = []
    done = ""
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:position], add_generation_prompt=True)
        turn = render(tokenizer, messages[: position + 1], add_generation_prompt=False)
        if not (prompt.startswith(done) and turn.startswith(prompt) and turn.endswith(end.closing + end.tail)):
            if add_generation_prompt:
                return encode_whole(tokenizer, messages, add_generation_prompt=True)
            raise UnstableTemplateError(tokenizer, position)
        finished = turn[: len(turn) - len(end.tail)]
        pieces += [Piece(prompt[len(done) :], learned=False), Piece(finished[len(prompt) :], learned=True)]
        done = finished
    if add_generation_prompt:
        prompt = render(tokenizer, messages, add_generation_prompt=True)
        if not prompt.startswith(done):
            return encode_whole(tokenizer, messages, add_generation_prompt=True)
        pieces.append(Piece(prompt[len(done) :], learned=False))
    return encode_pieces(tokenizer, pieces)


def encode_whole(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> Encoded:
    """What the template writes of a conversation that is only read, in one piece and with its tail."""
    messages = without_special_tokens(tokenizer, messages)
    text = render(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    return encode_pieces(tokenizer, [Piece(text, learned=False)])


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece]) -> Encoded:
    """The tokens of each piece, one after the other."""
    encoded = Encoded([], [])
    for text, learned in pieces:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        encoded.input_ids.extend(ids)
        encoded.completion_mask.extend([learned] * len(ids))
    return encoded


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the template's end of turn, and the tokenizer's end of text."""
    ids = dict.fromkeys([turn_end(tokenizer).token_id, tokenizer.eos_token_id])
    return [int(token_id) for token_id in ids if token_id is not None]


def tail_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the template writes after the end-of-turn token; ChatML's line break."""
    tail = turn_end(tokenizer).tail
    ids: list[int] = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    return ids


def shortened(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The conversation, then the same without its earliest exchanges, ever shorter; a system turn stays."""
    yield list(messages)
    first = 1 if messages and messages[0]["role"] == "system" else 0
    for position in range(first + 1, len(messages)):
        if messages[position]["role"] == "user":
            yield [*messages[:first], *messages[position:]]


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


@lru_cache(maxsize=8)
def _special_token_pattern(tokenizer: PreTrainedTokenizerBase, _vocabulary_size: int) -> re.Pattern[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def without_special_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
    """The turns with control tokens taken out of the text, so that no text can open or close a turn."""
    pattern = _special_token_pattern(tokenizer, len(tokenizer))

    def cleaned(text: str) -> str:
        while (shorter := pattern.sub("", text)) != text:  # what is left may have closed up to another one
            text = shorter
        return text

    return [{"role": message["role"], "content": cleaned(message["content"])} for message in messages]


def another_template(template: str) -> str:
    """What to do about a template that cannot be used."""
    return f"name another in --data.chat_template: a file, or chatml, which ships (this one begins {template[:60]!r})"
