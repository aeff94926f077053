"""From a row's messages to the columns a task trains on; a row that cannot be used carries the reason instead."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from datamodules.chat import Message, encode_conversation, malformed, shortened
from datamodules.errors import ConfigurationError

Row = Mapping[str, Any]
Columns = dict[str, Any]


def encode_conversation_row(
    row: Row,
    index: int,
    *,
    read: Callable[[Row], list[Message]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Columns:
    """Columns ``input_ids`` and ``completion_mask``; a long conversation loses its earliest exchanges."""
    messages = read(row)
    columns: Columns = {"input_ids": [], "completion_mask": [], "dropped": ""}
    if malformed(messages):
        return {**columns, "dropped": "malformed"}
    if not any(message["role"] == "assistant" for message in messages):
        return {**columns, "dropped": "no supervised token"}
    if any(message["role"] == "assistant" and not message["content"].strip() for message in messages):
        return {**columns, "dropped": "empty completion"}
    for shorter in shortened(messages):
        if not any(message["role"] == "assistant" for message in shorter):
            break
        encoded = _encode(tokenizer, shorter, index)
        if len(encoded.input_ids) <= max_length:
            return {"input_ids": encoded.input_ids, "completion_mask": encoded.completion_mask, "dropped": ""}
    return {**columns, "dropped": "too long"}


def encode_preference_row(
    row: Row,
    index: int,
    *,
    read: Callable[[Row], tuple[list[Message], list[Message]]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Columns:
    """Columns ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and ``tied``, whether the two were scored alike."""
    chosen, rejected = read(row)
    score = row.get("score_chosen")
    tied = score is not None and score == row.get("score_rejected")
    columns: Columns = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "tied": tied, "dropped": ""}
    if malformed(chosen) or malformed(rejected):
        return {**columns, "dropped": "malformed"}
    if chosen[:-1] != rejected[:-1] or chosen[-1]["role"] != "assistant" or len(chosen) < 2:
        return {**columns, "dropped": "prompts differ"}
    if not chosen[-1]["content"].strip() or not rejected[-1]["content"].strip():
        return {**columns, "dropped": "empty completion"}
    if chosen[-1] == rejected[-1]:
        return {**columns, "dropped": "chosen equals rejected"}
    for prompt in shortened(chosen[:-1]):
        start = len(_encode(tokenizer, prompt, index, add_generation_prompt=True).input_ids)
        prompt_and_chosen = _encode(tokenizer, [*prompt, chosen[-1]], index).input_ids
        prompt_and_rejected = _encode(tokenizer, [*prompt, rejected[-1]], index).input_ids
        if max(len(prompt_and_chosen), len(prompt_and_rejected)) <= max_length:
            return {
                "prompt_ids": prompt_and_chosen[:start],
                "chosen_ids": prompt_and_chosen[start:],
                "rejected_ids": prompt_and_rejected[start:],
                "tied": tied,
                "dropped": "",
            }
    return {**columns, "dropped": "too long"}


def encode_prompt_row(
    row: Row,
    index: int,
    *,
    read: Callable[[Row], list[Message]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Columns:
    """Columns ``messages`` and ``prompt_ids``; a long prompt loses its earliest exchanges."""
    messages = read(row)
    columns: Columns = {"messages": [], "prompt_ids": [], "dropped": ""}
    if malformed(messages) or messages[-1]["role"] != "user":
        return {**columns, "dropped": "malformed"}
    for shorter in shortened(messages):
        encoded = _encode(tokenizer, shorter, index, add_generation_prompt=True)
        if len(encoded.input_ids) <= max_length:
            return {"messages": shorter, "prompt_ids": encoded.input_ids, "dropped": ""}
    return {**columns, "dropped": "too long"}


def _encode(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], index: int, *, add_generation_prompt: bool = False
) -> Any:
    try:
        return encode_conversation(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    except ConfigurationError as error:
        raise ConfigurationError(f"row {index}: {error}") from error
