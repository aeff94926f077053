"""From a row's messages to the columns a task trains on; a row that cannot be used carries the reason instead."""

import hashlib
import json
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
from datamodules.chat_template import (
    Conversation,
    TemplateRefusalError,
    check_tools,
    tool_turns,
    without_special_tokens,
)
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

Row = Mapping[str, Any]
Columns = dict[str, Any]
"""Of a row."""
Steps = Generator[list[Conversation], list[Encoded], Columns]
"""A row's way to its columns: see :func:`row_encoder`."""
IDS = List(Value("int32"))
KEY = "prompt_key"
"""The column of what tells prompts apart, whatever their case and spaces."""
CODE = ("messages", "formats", "chat_template", "chat", "encoding")
"""The modules that rows are encoded with."""
ROWS_PER_PROCESS = 2_000
"""The fewest for which starting a process pays."""
ROWS_PER_PART = 50_000
"""What is encoded and kept at a time, so a stop costs no more."""
ROWS_TOGETHER = 100
"""What is rendered at a time: enough that a call costs nothing, and few enough for long rows' texts in memory."""


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
    its columns. What the rows of a group need is encoded together, which takes far less time than one by one.

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
            for first in range(0, len(rows), ROWS_TOGETHER):
                group = [encode(row, tokenizer=tokenizer, **options) for row in rows[first : first + ROWS_TOGETHER]]
                for index, result in zip(indices[first:], _run(group, tokenizer), strict=False):
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
