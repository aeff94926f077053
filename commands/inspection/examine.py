"""What becomes of rows: the pieces in which a model meets them, why others are dropped, how long they are."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean, median
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from core.errors import ConfigurationError
from core.text import printable
from datamodules.base import ChatDataModule
from datamodules.encoding import row_lengths

LONGEST_EXAMPLE = 400
"""Characters that are shown of a row that was dropped."""
BARS = 12


class Piece(NamedTuple):
    """Tokens that are given to the model, learned by it, or learned to be avoided."""

    text: str
    kind: str
    ids: list[int]


class Dropped(NamedTuple):
    """Why rows cannot be used, how many, and the first of them."""

    reason: str
    rows: int
    number: int
    example: str


class Bar(NamedTuple):
    """How many rows have from ``low`` to ``high`` tokens."""

    low: int
    high: int
    rows: int


class Examined(NamedTuple):
    """A split as the model meets it."""

    title: str
    usable: str
    examples: list[tuple[int, list[Piece]]]
    dropped: list[Dropped]
    lengths: list[Bar]
    summary: str


def examine(data: ChatDataModule, split: str, *, examples: int, title: str) -> Examined:
    """Encode a split and describe it.

    Args:
        data: With its tokenizer loaded.
        split: Its name.
        examples: How many rows to show.
        title: Of the dataset and its split.
    """
    rows, encoded = data.encode(split)
    reasons = encoded["dropped"]
    kept = [number for number, reason in enumerate(reasons) if not reason]
    shown = [(number, pieces(encoded[number], data.tokenizer)) for number in kept[:examples]]
    lengths = row_lengths(encoded.select(kept)) if kept else []
    return Examined(
        title,
        f"{len(kept):,} of {'the first ' if data.max_samples == len(rows) else ''}{len(reasons):,} rows can be used",
        shown,
        why_dropped(rows, reasons),
        histogram(lengths),
        summary(lengths, encoded.select(kept), data),
    )


def pieces(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """An encoded row in the pieces in which the model meets it."""
    if "input_ids" in row:
        tokens = zip(row["input_ids"], row["completion_mask"], strict=True)
        parts = [
            ("learned" if learned else "given", [token for token, _ in group])
            for learned, group in groupby(tokens, lambda pair: pair[1])
        ]
    else:
        parts = [("given", row["prompt_ids"])]
        parts += [(kind, row[f"{kind}_ids"]) for kind in ("chosen", "rejected") if f"{kind}_ids" in row]
    return [Piece(str(tokenizer.decode(ids)), kind, list(ids)) for kind, ids in parts]


def why_dropped(rows: Dataset, reasons: Sequence[str]) -> list[Dropped]:
    """Each reason with its number of rows, the most frequent first, and the first row of it.

    Where a text gives several rows, which row was dropped is not known, and none is shown.
    """
    found = []
    for reason, count in Counter(reason for reason in reasons if reason).most_common():
        number = reasons.index(reason)
        row = json.dumps(rows[number], ensure_ascii=False, default=str) if len(rows) == len(reasons) else ""
        found.append(Dropped(reason, count, number, printable(row[:LONGEST_EXAMPLE])))
    return found


def histogram(lengths: Sequence[int]) -> list[Bar]:
    """How many rows have how many tokens, in about a dozen steps of a round width."""
    if not lengths:
        return []
    width = round_width(max(lengths) / BARS)
    counts = Counter((length - 1) // width for length in lengths)
    return [Bar(step * width + 1, (step + 1) * width, counts[step]) for step in range(max(counts) + 1)]


def round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not below."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= least:
                return digit * power
        power *= 10


def summary(lengths: Sequence[int], rows: Dataset, data: ChatDataModule) -> str:
    """The lengths in a line, and what share of the tokens is learned."""
    if not lengths:
        return "no row can be used"
    ordered = sorted(lengths)
    pair = ", a pair's prompt counted once" if "chosen_ids" in rows.column_names else ""
    line = (
        f"{sum(lengths):,} tokens{pair}; a row has {fmean(lengths):.0f} on average, {median(lengths):.0f} in the "
        f"median, at most {ordered[-1]} (data.max_length {data.max_length})"
    )
    if "completion_mask" in rows.column_names:
        learned = sum(map(sum, rows["completion_mask"]))
        line += f"; {learned / sum(lengths):.0%} of them learned"
    return line


def chosen_splits(data: ChatDataModule, wanted: str) -> list[tuple[str, ChatDataModule, str]]:
    """Title, data module and split for each split to look at; of a mixture each part's.

    Raises:
        ConfigurationError: If there is no such split.
    """
    roles = {"train": "train_split", "validation": "validation_split"}
    if wanted not in (*roles, "both"):
        raise ConfigurationError(f"--split must be train, validation or both, got {wanted}")
    found = []
    for name, part in data.datasets().items():
        for role in [wanted] if wanted in roles else roles:
            split = getattr(part, roles[role])
            found.append((f"{f'{name}: ' if name else ''}{part.dataset_name} {split}", part, split))
    return found
