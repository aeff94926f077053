"""Held-out prompts for the evaluation, from any dataset of conversations, pairs or plain prompts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from datamodules.chat import Message, encode_conversation, malformed
from datamodules.errors import ConfigurationError
from datamodules.source import load_rows

OPTION = "evaluation.dataset_name"


class Prompt(NamedTuple):
    """A conversation that ends with a user turn, its length in tokens, and where its dataset has it from."""

    messages: list[Message]
    tokens: int
    source: str | None


def read_prompt(row: Mapping[str, Any]) -> list[Message] | None:
    """The conversation before the last assistant turn, from ``chosen``, ``messages`` or the text of ``prompt``."""
    messages = row.get("chosen") or row.get("messages")
    if messages is None:
        prompt = row.get("prompt")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if malformed(messages):
        return None
    assert isinstance(messages, list)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages if messages and messages[-1]["role"] == "user" else None


def load_prompts(
    dataset_name: str,
    split: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    max_length: int,
    held_out: bool | None = None,
) -> list[Prompt]:
    """The first ``count`` distinct prompts of a split that have at most ``max_length`` tokens.

    Of a single file all rows are taken, or with ``held_out`` the ones that training leaves out.

    Raises:
        ConfigurationError: If the dataset has no prompts, or none that short.
    """
    rows = load_rows(dataset_name, split, columns=(), held_out=held_out, option=OPTION)
    if not {"chosen", "messages", "prompt"} & set(rows.column_names):
        raise ConfigurationError(
            f"{dataset_name} has no chosen, messages or prompt among its columns {rows.column_names}; change {OPTION}"
        )
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for row in rows:
        if len(prompts) == count:
            break
        prompt = read_prompt(row)
        if prompt is None or str(prompt) in seen:
            continue
        tokens = len(encode_conversation(tokenizer, prompt, add_generation_prompt=True).input_ids)
        if tokens <= max_length:
            seen.add(str(prompt))
            source = row.get("source")
            prompts.append(Prompt(prompt, tokens, source if isinstance(source, str) else None))
    if not prompts:
        raise ConfigurationError(
            f"{dataset_name} {split} has no prompt of at most {max_length} tokens; "
            f"change {OPTION} or evaluation.max_prompt_length"
        )
    return prompts
