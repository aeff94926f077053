"""Rows encoded: on all cores, part by part, each part kept on disk; and what the rows of a batch need, together."""

import hashlib
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from core.errors import ConfigurationError
from datamodules.chat import Encoded, encode_conversations
from datamodules.messages import (
    UnusableRowError,
)
from datamodules.rendering import Conversation, TemplateRefusalError

Row = Mapping[str, Any]
Columns = dict[str, Any]
"""Of a row."""
Steps = Generator[list[Conversation], list[Encoded], Columns]
"""A row's way to its columns: see :func:`row_encoder`."""
KEY = "prompt_key"
"""The column of what tells prompts apart, whatever their case and spaces."""
CODE = ("messages", "formats", "rendering", "chat_template", "chat", "encoding", "encoders")
"""The modules that rows are encoded with."""
ROWS_PER_PROCESS = 2_000
"""The fewest for which starting a process pays."""
ROWS_PER_PART = 50_000
"""What is encoded and kept at a time, so a stop costs no more."""
ROWS_PER_BATCH = 100
"""What a process has in memory: enough for what is done together, however long rows are."""


@runtime_checkable
class Encoder(Protocol):
    """From rows, their numbers and options to the columns of all; ``features`` says what those hold."""

    features: Features

    def __call__(self, rows: Sequence[Row], indices: Sequence[int], **options: Any) -> dict[str, list[Any]]: ...


def giving(features: Features) -> Callable[[Callable[..., dict[str, list[Any]]]], Encoder]:
    """Make a function an encoder, which says what its columns hold."""

    def decorate(encode: Any) -> Encoder:
        encode.features = features
        return cast(Encoder, encode)

    return decorate


def row_encoder(**columns: Any) -> Callable[[Callable[..., Steps]], Encoder]:
    """Make an encoder of many rows out of one of a single row, and give it two columns more.

    The single row's is a generator: it yields the conversations that it needs encoded, is sent them so, and returns
    its columns. What all rows need is encoded together, which takes far less time than one by one.

    The column ``dropped`` has why a row cannot be used (an unusable option stays an error), and ``prompt_key`` what
    rows of the same prompt share.

    Args:
        columns: What the other columns hold; a list is empty in a dropped row, a number false.
    """
    columns[KEY] = Value("int64")
    empty: Columns = {name: [] if isinstance(kind, List) else False for name, kind in columns.items()}
    empty |= {KEY: 0, "dropped": ""}

    def decorate(encode: Callable[..., Steps]) -> Encoder:
        @giving(Features({**columns, "dropped": Value("string")}))
        @wraps(encode)
        def encoded(
            rows: Sequence[Row], indices: Sequence[int], *, tokenizer: PreTrainedTokenizerBase, **options: Any
        ) -> dict[str, list[Any]]:
            found: list[Columns] = []
            steps = [encode(row, tokenizer=tokenizer, **options) for row in rows]
            for index, result in zip(indices, _run(steps, tokenizer), strict=True):
                if isinstance(result, ConfigurationError):
                    raise ConfigurationError(f"row {index}: {result}") from result
                found.append({**empty, **result})
            return {name: [result[name] for result in found] for name in empty}

        return encoded

    return decorate


def _run(rows: Sequence[Steps], tokenizer: PreTrainedTokenizerBase) -> list[Columns | ConfigurationError]:
    """What each row's encoder returns, or that its row is dropped, or its error; all are taken a step at a time."""
    ended: dict[int, Columns | ConfigurationError] = {}
    sent: dict[int, Any] = dict.fromkeys(range(len(rows)))
    while sent:
        asked: dict[int, list[Conversation]] = {}
        for number, encodings in sent.items():
            error = next((one for one in encodings or () if isinstance(one, ConfigurationError)), None)
            try:
                asked[number] = rows[number].throw(error) if error else rows[number].send(encodings)
            except StopIteration as end:
                ended[number] = end.value
            except UnusableRowError as reason:
                ended[number] = {"dropped": str(reason)}
            except TemplateRefusalError as refusal:
                ended[number] = {"dropped": f"refused by the chat template ({refusal.reason[:80]})"}
            except ConfigurationError as unusable:
                ended[number] = unusable
        encoded = iter(encode_conversations(tokenizer, [one for each in asked.values() for one in each]))
        sent = {number: list(islice(encoded, len(each))) for number, each in asked.items()}
    return [ended[number] for number in range(len(rows))]


def encode_rows(rows: Dataset, encode: Encoder, *, title: str, **options: Any) -> Dataset:
    """Encode rows part by part, on all cores; a part that is whole is on disk, and not made again nor held in memory.

    Args:
        rows: Of a split.
        encode: A function that :func:`row_encoder` made, or another that gives the columns of many rows.
        title: Of the progress bar.
        options: Of the encoder.
    """
    processes = min(cores(), len(rows) // ROWS_PER_PROCESS)
    parts: list[Dataset] = []
    for first in range(0, len(rows), ROWS_PER_PART):
        part = rows.select(range(first, min(first + ROWS_PER_PART, len(rows))))
        number = f" ({len(parts) + 1} of {-(-len(rows) // ROWS_PER_PART)})" if len(rows) > ROWS_PER_PART else ""
        encoded = part.map(
            _encoded,
            with_indices=True,
            batched=True,
            batch_size=ROWS_PER_BATCH,
            fn_kwargs={"encode": encode, "options": options, "code": code_digest()},
            features=encode.features,
            remove_columns=rows.column_names,
            num_proc=processes if processes > 1 else None,
            desc=title + number,
        )
        parts.append(encoded)
    return concatenate_datasets(parts)


def _encoded(
    columns: Mapping[str, Sequence[Any]], indices: Sequence[int], *, encode: Encoder, options: Any, code: str
) -> dict[str, list[Any]]:
    """Columns of a batch; ``code`` is of the cache's key alone, so that rows that other code encoded have another."""
    return encode(rows_of(columns), indices, **options)


def rows_of(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The rows that columns are of."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def code_digest() -> str:
    """Of the code that rows are encoded with."""
    files = (Path(__file__).with_name(f"{name}.py") for name in CODE)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


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
