"""Held-out prompts for the evaluation, from any dataset of conversations, pairs or plain prompts."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from core.errors import ConfigurationError
from datamodules.chat import encode_conversation
from datamodules.chat_template import TemplateRefusalError
from datamodules.messages import Message, before_answer, flaw
from datamodules.source import load_rows

OPTION = "evaluation.dataset_name"


class Prompt(NamedTuple):
    """A conversation that ends with a user turn, its length in tokens, and where its dataset has it from."""

    messages: list[Message]
    tokens: int
    source: str | None


def read_prompt(row: Mapping[str, Any]) -> Any:
    """The conversation before the last assistant turn, from a list in ``chosen``, ``messages`` or ``prompt``, or text.

    What a row has there may be anything; :func:`unfit` says why it is no prompt.
    """
    found = [row.get(name) for name in ("chosen", "messages", "prompt")]
    conversation = next((value for value in found if isinstance(value, list) and value), None)
    if conversation is not None:
        return before_answer(conversation)
    text = found[-1]
    return [{"role": "user", "content": text}] if isinstance(text, str) else text


def unfit(messages: Any) -> str:
    """Why this is no conversation that ends with a question; empty where it is one."""
    return flaw(messages) or ("" if messages[-1]["role"] == "user" else "no question at the end")


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: Any) -> tuple[int, str]:
    """How many tokens a prompt has, and why it is none; empty where it is one."""
    if reason := unfit(messages):
        return 0, reason
    try:
        return len(encode_conversation(tokenizer, messages, add_generation_prompt=True).input_ids), ""
    except TemplateRefusalError as refusal:
        return 0, f"refused by the chat template ({refusal.reason[:80]})"


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
        ConfigurationError: If the dataset has no prompts, or none that can be used, with the reasons.
    """
    rows = load_rows(dataset_name, split, columns=(), held_out=held_out, option=OPTION)
    if not {"chosen", "messages", "prompt"} & set(rows.column_names):
        raise ConfigurationError(
            f"{dataset_name} has no chosen, messages or prompt among its columns {rows.column_names}; change {OPTION}"
        )
    prompts: list[Prompt] = []
    passed_over: Counter[str] = Counter()
    seen: set[str] = set()
    for row in rows:
        if len(prompts) == count:
            break
        messages = read_prompt(row)
        if not unfit(messages) and str(messages) in seen:
            continue
        tokens, reason = prompt_tokens(tokenizer, messages)
        if reason or tokens > max_length:
            passed_over[reason or f"longer than {max_length} tokens"] += 1
            continue
        seen.add(str(messages))
        source = row.get("source")
        prompts.append(Prompt(messages, tokens, source if isinstance(source, str) else None))
    listed = ", ".join(f"{number} {reason}" for reason, number in sorted(passed_over.items()))
    if not prompts:
        raise ConfigurationError(
            f"no row of {dataset_name} {split} is a prompt to evaluate on ({listed}); change {OPTION}, or "
            "evaluation.max_prompt_length"
        )
    if passed_over:
        rank_zero_info(f"{dataset_name} {split}: passed over {sum(passed_over.values())} rows for prompts ({listed})")
    return prompts
