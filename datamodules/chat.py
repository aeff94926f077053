"""From a conversation to token ids and the mask of what is learned, with any prefix-stable chat template."""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from datamodules.errors import ConfigurationError

Message = dict[str, str]
"""``role`` (system, user or assistant) and ``content``."""

CHATML_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


class Encoded(NamedTuple):
    """A conversation as tokens; ``completion_mask`` is True on assistant tokens, their end-of-turn token included."""

    input_ids: list[int]
    completion_mask: list[bool]


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


def load_tokenizer(model_name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a chat template and a pad token whatever it came with.

    A tokenizer without a template gets ChatML, whose two markers become special tokens where the vocabulary lacks
    them; the model then needs :func:`lightning_modules.loading.resize_embeddings`.

    Raises:
        ConfigurationError: If there is no such tokenizer.
    """
    check_model_name(model_name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_name)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigurationError(f"no tokenizer in {model_name!r} ({first_line}); change model.model_name") from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML_TEMPLATE
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
        ConfigurationError: If the template refuses the conversation.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        roles = [message["role"] for message in messages]
        raise ConfigurationError(f"the chat template refuses a conversation with the roles {roles}: {error}") from error
    return str(text)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """Where an assistant turn ends under the tokenizer's template, and the token that generation stops on.

    Raises:
        ConfigurationError: If the template closes a turn without a special token, so that nothing could stop.
    """
    return _turn_end(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> TurnEnd:
    probe = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": "answer"}]
    after_content = render(tokenizer, probe, add_generation_prompt=False).rpartition("answer")[2]
    special = _special_token_pattern(tokenizer, len(tokenizer)).search(after_content)
    if special is None:
        raise ConfigurationError(
            f"the chat template ends an assistant turn with {after_content!r}, which holds no special token to stop "
            f"on; give the tokenizer another chat template (it begins {template[:60]!r})"
        )
    token_id: int = tokenizer.convert_tokens_to_ids(special.group())  # type: ignore[assignment]
    return TurnEnd(after_content[: special.end()], after_content[special.end() :], token_id)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> Encoded:
    """Token ids and completion mask of a conversation, up to its last assistant turn or to a generation prompt.

    Text is tokenised in the pieces in which a model meets it: what it is given, then what it writes. So the tokens
    of a prompt are an exact prefix of the tokens of every conversation that goes on from it.

    Args:
        tokenizer: With a chat template.
        messages: The turns in order.
        add_generation_prompt: End with the opening of an assistant turn instead of the last assistant turn.

    Raises:
        ConfigurationError: If rendering a prefix of the conversation is not a prefix of its rendering, as when a
            template rewrites earlier turns.
    """
    messages = without_special_tokens(tokenizer, messages)
    end = turn_end(tokenizer)
    ids: list[int] = []
    mask: list[bool] = []
    done = ""

    def append(text: str, *, learned: bool) -> None:
        piece = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids.extend(piece)
        mask.extend([learned] * len(piece))

    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:position], add_generation_prompt=True)
        turn = render(tokenizer, messages[: position + 1], add_generation_prompt=False)
        if not (prompt.startswith(done) and turn.startswith(prompt) and turn.endswith(end.closing + end.tail)):
            raise _unstable_template(tokenizer, position)
        finished = turn[: len(turn) - len(end.tail)]
        append(prompt[len(done) :], learned=False)
        append(finished[len(prompt) :], learned=True)
        done = finished
    if add_generation_prompt:
        prompt = render(tokenizer, messages, add_generation_prompt=True)
        if not prompt.startswith(done):
            raise _unstable_template(tokenizer, len(messages))
        append(prompt[len(done) :], learned=False)
    return Encoded(ids, mask)


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


def malformed(messages: object) -> bool:
    """Whether this is anything but a list of system, user and assistant turns with text, the system's first."""
    if not isinstance(messages, list) or not messages:
        return True
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return True
        if message.get("role") not in ("user", "assistant", "system" if position == 0 else "user"):
            return True
    return False


@lru_cache(maxsize=8)
def _special_token_pattern(tokenizer: PreTrainedTokenizerBase, _vocabulary_size: int) -> re.Pattern[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def without_special_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
    """The turns with control tokens taken out of the text, so that no text can open or close a turn."""
    pattern = _special_token_pattern(tokenizer, len(tokenizer))
    return [{"role": message["role"], "content": pattern.sub("", message["content"])} for message in messages]


def _unstable_template(tokenizer: PreTrainedTokenizerBase, position: int) -> ConfigurationError:
    template = str(tokenizer.chat_template)
    return ConfigurationError(
        f"the chat template rewrites earlier text at turn {position}, so a prompt is no prefix of its conversation; "
        f"use a template that only appends (this one begins {template[:60]!r})"
    )
