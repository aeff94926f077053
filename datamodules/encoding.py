"""From a row's messages to the columns a task trains on; a row that cannot be used carries the reason instead."""

import hashlib
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from core.errors import ConfigurationError
from datamodules.chat import encode_conversation
from datamodules.chat_template import TemplateRefusalError, without_special_tokens
from datamodules.messages import Message, flaw, shortened

Row = Mapping[str, Any]
Columns = dict[str, Any]
IDS = List(Value("int32"))
ROWS_PER_PART = 20_000
"""What is encoded and kept at a time, so a stop costs no more."""


class UnusableRowError(Exception):
    """Why a row is dropped."""


def row_encoder(**columns: Any) -> Callable[[Callable[..., Columns]], Callable[..., Columns]]:
    """Give an encoder the column ``dropped``, with why a row cannot be used; an unusable option stays an error.

    Args:
        columns: What the other columns hold; a list is empty in a dropped row, a number false.
    """
    empty: Columns = {name: [] if isinstance(kind, List) else False for name, kind in columns.items()}

    def decorate(encode: Callable[..., Columns]) -> Callable[..., Columns]:
        @wraps(encode)
        def encoded(row: Row, index: int, *, code: str = "", **options: Any) -> Columns:  # code: of a cache's key alone
            try:
                return {**empty, **encode(row, **options), "dropped": ""}
            except UnusableRowError as reason:
                return {**empty, "dropped": str(reason)}
            except TemplateRefusalError as refusal:
                return {**empty, "dropped": f"refused by the chat template ({refusal.reason[:80]})"}
            except ConfigurationError as error:
                raise ConfigurationError(f"row {index}: {error}") from error

        encoded.features = Features({**columns, "dropped": Value("string")})  # type: ignore[attr-defined]
        return encoded

    return decorate


def encode_rows(rows: Dataset, encode: Any, *, processes: int | None, title: str, **options: Any) -> Dataset:
    """Encode rows part by part; a part that is whole is on disk, and neither encoded again nor held in memory.

    Args:
        rows: Of a split.
        encode: A function that :func:`row_encoder` made.
        processes: How many share a part; None for this one alone.
        title: Of the progress bar.
        options: Of the encoder.
    """
    parts: list[Dataset] = []
    for first in range(0, len(rows), ROWS_PER_PART):
        part = rows.select(range(first, min(first + ROWS_PER_PART, len(rows))))
        number = f" ({len(parts) + 1} of {-(-len(rows) // ROWS_PER_PART)})" if len(rows) > ROWS_PER_PART else ""
        encoded = part.map(
            encode,
            with_indices=True,
            fn_kwargs=options,
            features=encode.features,
            remove_columns=rows.column_names,
            num_proc=processes,
            desc=title + number,
        )
        parts.append(encoded)
    return concatenate_datasets(parts)


@row_encoder(input_ids=IDS, completion_mask=List(Value("bool")))
def encode_conversation_row(
    row: Row, *, read: Callable[[Row], Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Columns:
    """Columns ``input_ids`` and ``completion_mask``; a long conversation loses its earliest exchanges."""
    messages = _conversation(tokenizer, read(row))
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    _drop_if(not answers, "no supervised token")
    _drop_if(not all(answer.strip() for answer in answers), "empty completion")
    for shorter in shortened(messages):
        if not any(message["role"] == "assistant" for message in shorter):
            break
        encoded = encode_conversation(tokenizer, shorter)
        if len(encoded.input_ids) <= max_length:
            _drop_if(not any(encoded.completion_mask), "no supervised token")
            return {"input_ids": encoded.input_ids, "completion_mask": encoded.completion_mask}
    raise UnusableRowError("too long")


@row_encoder(prompt_ids=IDS, chosen_ids=IDS, rejected_ids=IDS, tied=Value("bool"))
def encode_preference_row(
    row: Row,
    *,
    read: Callable[[Row], tuple[Any, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Columns:
    """Columns ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and ``tied``, whether the two were scored alike."""
    chosen, rejected = (_conversation(tokenizer, messages) for messages in read(row))
    _drop_if(chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant", "no answer at the end")
    _drop_if(chosen[:-1] != rejected[:-1], "prompts differ")
    _drop_if(not chosen[-1]["content"].strip() or not rejected[-1]["content"].strip(), "empty completion")
    for prompt in shortened(chosen[:-1]):
        start = len(encode_conversation(tokenizer, prompt, add_generation_prompt=True).input_ids)
        prompt_and_chosen, prompt_and_rejected = (
            encode_conversation(tokenizer, [*prompt, side[-1]]).input_ids for side in (chosen, rejected)
        )
        if max(len(prompt_and_chosen), len(prompt_and_rejected)) <= max_length:
            _drop_if(prompt_and_chosen == prompt_and_rejected, "chosen equals rejected")
            score = row.get("score_chosen")
            return {
                "prompt_ids": prompt_and_chosen[:start],
                "chosen_ids": prompt_and_chosen[start:],
                "rejected_ids": prompt_and_rejected[start:],
                "tied": score is not None and score == row.get("score_rejected"),
            }
    raise UnusableRowError("too long")


@row_encoder(messages=List({"role": Value("string"), "content": Value("string")}), prompt_ids=IDS)
def encode_prompt_row(
    row: Row, *, read: Callable[[Row], Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Columns:
    """Columns ``messages`` and ``prompt_ids``; a long prompt loses its earliest exchanges."""
    messages = _conversation(tokenizer, read(row))
    _drop_if(messages[-1]["role"] != "user", "no question at the end")
    for shorter in shortened(messages):
        encoded = encode_conversation(tokenizer, shorter, add_generation_prompt=True)
        if len(encoded.input_ids) <= max_length:
            return {"messages": shorter, "prompt_ids": encoded.input_ids}
    raise UnusableRowError("too long")


def _conversation(tokenizer: PreTrainedTokenizerBase, messages: Any) -> list[Message]:
    """The turns as they are encoded: control tokens are no text, so what consists of them alone is empty."""
    reason = flaw(messages)
    _drop_if(bool(reason), reason)
    return without_special_tokens(tokenizer, messages)


def _drop_if(condition: bool, reason: str) -> None:
    if condition:
        raise UnusableRowError(reason)


def row_lengths(rows: Dataset) -> list[int]:
    """Tokens of each row, over its token columns; read without making Python objects of the tokens."""
    lengths: list[int] = []
    columns = [name for name in rows.column_names if name.endswith("_ids")]
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=1_000):
        counts = [table.column(name).combine_chunks().value_lengths().to_pylist() for name in columns]
        lengths += map(sum, zip(*counts, strict=True))
    return lengths


def rows_digest(rows: Dataset) -> str:
    """Of the tokens and masks of all rows, in order."""
    names = sorted(name for name in rows.column_names if name.endswith(("_ids", "_mask")))
    digest = hashlib.sha256(str(names).encode())
    for table in rows.select_columns(names).with_format("arrow").iter(batch_size=1_000):
        for column in table.combine_chunks().columns:
            whole = column.combine_chunks()
            digest.update(whole.value_lengths().to_numpy().tobytes())
            digest.update(whole.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
