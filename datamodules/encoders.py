"""From a row's messages to the columns a task trains on; a row that cannot be used carries the reason instead."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import List, Value
from transformers import PreTrainedTokenizerBase

from datamodules.chat_template import check_tools, tool_turns, without_special_tokens
from datamodules.encoding import KEY, Encoder, Row, Steps, giving, row_encoder
from datamodules.formats import Task
from datamodules.messages import (
    Message,
    UnusableRowError,
    before_answer,
    flaw,
    parsed,
    plain,
    says_something,
    shortened,
    without_nulls,
)
from datamodules.rendering import Conversation

IDS = List(Value("int32"))


@row_encoder(input_ids=IDS, completion_mask=List(Value("bool")))
def encode_conversation_rows(
    row: Row, *, read: Callable[[Row], Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Steps:
    """Columns ``input_ids`` and ``completion_mask``; a long conversation loses its earliest exchanges."""
    messages = _conversation(tokenizer, read(row))
    answers = [message for message in messages if message["role"] == "assistant"]
    _drop_if(not answers, "no supervised token")
    _drop_if(not all(map(says_something, answers)), "empty completion")
    tools = _tools(row, tokenizer)
    for shorter in shortened(messages):
        if not any(message["role"] == "assistant" for message in shorter):
            break
        (encoded,) = yield [Conversation(shorter, tools=tools)]
        if len(encoded.input_ids) <= max_length:
            _drop_if(not any(encoded.completion_mask), "no supervised token")
            key = prompt_key(before_answer(messages))
            return {"input_ids": encoded.input_ids, "completion_mask": encoded.completion_mask, KEY: key}
    raise UnusableRowError("too long")


@giving(encode_conversation_rows.features)
def encode_text_rows(
    rows: Sequence[Row],
    indices: Sequence[int],
    *,
    read: Callable[[Row], Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> dict[str, list[Any]]:
    """Columns as of conversations, for texts in which all is learned, with an end token; a long one gives several rows.

    The first token of a row is given, as nothing stands before it.
    """
    columns: dict[str, list[Any]] = {name: [] for name in encode_conversation_rows.features}
    for text in map(read, rows):
        reason = "" if isinstance(text, str) and text.strip() else "no text"
        ids = [] if reason else [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
        for first in range(0, max(1, len(ids)), max_length):
            piece = [token for token in ids[first : first + max_length] if token is not None]
            why = reason or ("" if len(piece) > 1 else "no supervised token")
            columns["input_ids"].append([] if why else piece)
            columns["completion_mask"].append([] if why else [False] + [True] * (len(piece) - 1))
            columns[KEY].append(0 if why else text_key(" ".join(text.casefold().split())))
            columns["dropped"].append(why)
    return columns


@row_encoder(prompt_ids=IDS, chosen_ids=IDS, rejected_ids=IDS, tied=Value("bool"))
def encode_preference_rows(
    row: Row,
    *,
    read: Callable[[Row], tuple[Any, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Steps:
    """Columns ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and ``tied``, whether the two were scored alike."""
    chosen, rejected = (_conversation(tokenizer, messages) for messages in read(row))
    _drop_if(chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant", "no answer at the end")
    _drop_if(chosen[:-1] != rejected[:-1], "prompts differ")
    _drop_if(not (says_something(chosen[-1]) and says_something(rejected[-1])), "empty completion")
    tools = _tools(row, tokenizer)
    for prompt in shortened(chosen[:-1]):
        both = [Conversation([*prompt, side[-1]], tools=tools) for side in (chosen, rejected)]
        encoded = yield [Conversation(prompt, add_generation_prompt=True, tools=tools), *both]
        start = len(encoded[0].input_ids)
        prompt_and_chosen, prompt_and_rejected = (answered.input_ids for answered in encoded[1:])
        if max(len(prompt_and_chosen), len(prompt_and_rejected)) <= max_length:
            _drop_if(prompt_and_chosen == prompt_and_rejected, "chosen equals rejected")
            score = row.get("score_chosen")
            return {
                "prompt_ids": prompt_and_chosen[:start],
                "chosen_ids": prompt_and_chosen[start:],
                "rejected_ids": prompt_and_rejected[start:],
                "tied": score is not None and score == row.get("score_rejected"),
                KEY: prompt_key(chosen[:-1]),
            }
    raise UnusableRowError("too long")


@row_encoder(messages=List({"role": Value("string"), "content": Value("string")}), prompt_ids=IDS)
def encode_prompt_rows(
    row: Row, *, read: Callable[[Row], Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Steps:
    """Columns ``messages`` and ``prompt_ids``; a long prompt loses its earliest exchanges."""
    messages = _conversation(tokenizer, read(row))
    _drop_if(messages[-1]["role"] not in ("user", "tool"), "no question at the end")
    tools = _tools(row, tokenizer)
    for shorter in shortened(messages):
        (encoded,) = yield [Conversation(shorter, add_generation_prompt=True, tools=tools)]
        if len(encoded.input_ids) <= max_length:
            turns = [plain(message) for message in shorter]
            return {"messages": turns, "prompt_ids": encoded.input_ids, KEY: prompt_key(messages)}
    raise UnusableRowError("too long")


def _conversation(tokenizer: PreTrainedTokenizerBase, messages: Any) -> list[Message]:
    """The turns as they are encoded: control tokens are no text, so what consists of them alone is empty."""
    reason = flaw(messages)
    _drop_if(bool(reason), reason)
    check_tools(tokenizer, messages)
    return without_special_tokens(tokenizer, messages)


def _tools(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Any] | None:
    """What a row says may be called, where the template lists it."""
    tools = without_nulls(parsed(row.get("tools")))
    if not (isinstance(tools, list) and tools and tool_turns(tokenizer, str(tokenizer.chat_template)).listed):
        return None
    return tools


def prompt_key(messages: Sequence[Message]) -> int:
    """A number that conversations of the same words share; the system's turn, case and spaces aside."""
    said = [" ".join(turn["content"].casefold().split()) for turn in messages if turn["role"] != "system"]
    return text_key(json.dumps(said))


def text_key(text: str) -> int:
    """A number of a text, of 63 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()) >> 1


def _drop_if(condition: bool, reason: str) -> None:
    if condition:
        raise UnusableRowError(reason)


ENCODERS: Mapping[Task, Encoder] = {
    "conversations": encode_conversation_rows,
    "preferences": encode_preference_rows,
    "prompts": encode_prompt_rows,
}
