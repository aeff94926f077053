"""From a conversation to token ids and the mask of what is learned, with any prefix-stable chat template."""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from core.errors import ConfigurationError
from core.text import told
from datamodules.chat_template import (
    CHATML_TEMPLATE,
    PROBE,
    UnstableTemplateError,
    read_template,
    turn_end,
    without_special_tokens,
)
from datamodules.messages import Message
from datamodules.rendering import Conversation, TemplateRefusalError, render, render_all


class Encoded(NamedTuple):
    """A conversation as tokens; ``completion_mask`` is True on assistant tokens, their end-of-turn token included.

    Turns of weight 0 are context.
    """

    input_ids: list[int]
    completion_mask: list[bool]


class Piece(NamedTuple):
    """Text that a model is given, or that it is to learn to write."""

    text: str
    learned: bool


def check_model_name(model_name: str, *, option: str = "model.model_name") -> None:
    """Raise a ConfigurationError where the name can be neither a directory nor a hub id."""
    looks_local = model_name.startswith((".", "/", "~")) or model_name.count("/") > 1
    if not Path(model_name).is_dir() and (looks_local or model_name.startswith("outputs/")):
        raise ConfigurationError(
            f"model directory {model_name} does not exist; run the stage that makes it or change {option}"
        )


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


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Any] | None = None,
) -> Encoded:
    """Token ids and completion mask of a conversation, up to its last assistant turn or to a generation prompt.

    Text is tokenised in the pieces in which a model meets it: what it is given, then what it writes. So the tokens
    of a prompt are an exact prefix of the tokens of every conversation that goes on from it. Under a template that
    rewrites earlier turns nothing can be learned of them; a prompt is then what the template writes, in one piece.

    Args:
        tokenizer: With a chat template.
        messages: The turns in order.
        add_generation_prompt: End with the opening of an assistant turn instead of the last assistant turn.
        tools: What may be called, as JSON schemas, for templates that list it.

    Raises:
        UnstableTemplateError: If rendering a prefix of the conversation is not a prefix of its rendering, as when a
            template rewrites earlier turns, and the conversation is to be learned.
        ConfigurationError: If the template cannot be used at all.
    """
    (found,) = encode_conversations(tokenizer, [Conversation(messages, add_generation_prompt, tools)])
    if isinstance(found, ConfigurationError):
        raise found
    return found


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> list[Encoded | ConfigurationError]:
    """Each conversation as :func:`encode_conversation` gives it, or the error that it raises; together it is faster."""
    stages = [_stages(tokenizer, conversation) for conversation in conversations]
    texts = render_all(tokenizer, chain.from_iterable(stages))
    found: list[Encoded | ConfigurationError] = []
    for conversation, one in zip(conversations, stages, strict=True):
        written = islice(texts, len(one))
        try:
            found.append(encode_pieces(tokenizer, _pieces(tokenizer, conversation, written)))
        except ConfigurationError as error:
            found.append(error)
        deque(written, maxlen=0)  # what is left of it
    return found


def _stages(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[Conversation]:
    """The conversation as it grows: before each answer and behind it, and up to what is asked for at its end."""
    messages, add_generation_prompt, tools = conversation
    messages = without_special_tokens(tokenizer, messages)
    stages: list[Conversation] = []
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            stages += [
                Conversation(messages[:position], add_generation_prompt=True, tools=tools),
                Conversation(messages[: position + 1], add_generation_prompt=False, tools=tools),
            ]
    return [*stages, Conversation(messages, True, tools)] if add_generation_prompt else stages


def _pieces(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, texts: Iterable[str | TemplateRefusalError]
) -> list[Piece]:
    """What each stage of a conversation adds to the one before, of which it must be a continuation."""
    end = turn_end(tokenizer)
    answers = [position for position, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    pieces: list[Piece] = []
    done = ""
    for number, text in enumerate(texts):
        if isinstance(text, TemplateRefusalError):
            raise text
        answered = number % 2 == 1
        if not (text.startswith(done) and (not answered or text.endswith(end.closing + end.tail))):
            if conversation.add_generation_prompt:
                whole = deque(chain([text], texts), maxlen=1).pop()
                if isinstance(whole, TemplateRefusalError):
                    raise whole
                return [Piece(whole, learned=False)]
            raise UnstableTemplateError(tokenizer, answers[number // 2])
        text = text.removesuffix(end.tail) if answered else text
        learned = answered and conversation.messages[answers[number // 2]].get("weight") != 0
        pieces.append(Piece(text[len(done) :], learned))
        done = text
    return pieces


def encode_whole(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Any] | None = None,
) -> Encoded:
    """What the template writes of a conversation that is only read, in one piece and with its tail."""
    messages = without_special_tokens(tokenizer, messages)
    text = render(tokenizer, messages, add_generation_prompt=add_generation_prompt, tools=tools)
    return encode_pieces(tokenizer, [Piece(text, learned=False)])


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece]) -> Encoded:
    """The tokens of each piece, one after the other."""
    encoded = Encoded([], [])
    for ids, (_, learned) in zip(token_ids(tokenizer, [text for text, _ in pieces]), pieces, strict=True):
        encoded.input_ids.extend(ids)
        encoded.completion_mask.extend([learned] * len(ids))
    return encoded


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text as it is, without any around it.

    Where the tokenizer is a plain one of Rust's it is asked directly, and not for offsets that nobody needs: the same
    tokens in two thirds of the time.
    """
    plain = isinstance(tokenizer, PreTrainedTokenizerFast) and not tokenizer.split_special_tokens
    if not plain or type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus:
        return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None or backend.padding is not None:  # as its file, or an earlier call, may have it
        backend.no_truncation()
        backend.no_padding()
    return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the template's end of turn, and the tokenizer's end of text."""
    ids = dict.fromkeys([turn_end(tokenizer).token_id, tokenizer.eos_token_id])
    return [int(token_id) for token_id in ids if token_id is not None]


def tail_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the template writes after the end-of-turn token; ChatML's line break."""
    tail = turn_end(tokenizer).tail
    ids: list[int] = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    return ids
