"""Batches of like length: every row once, little padding, at random, alike on many processes, resumable."""

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from core.errors import ConfigurationError
from datamodules import SmolTalkDataModule
from datamodules.length_groups import LengthGroupedSampler
from datamodules.position import Position

LENGTHS = [1 + (37 * row) % 499 for row in range(1_007)]


def sampler(**options: Any) -> LengthGroupedSampler:
    given: dict[str, Any] = {"world_size": 1, "rank": 0, "rows_per_batch": 8, "seed": 3} | options
    return LengthGroupedSampler(LENGTHS, **given)


def batches(rows: list[int]) -> list[list[int]]:
    return [rows[at : at + 8] for at in range(0, len(rows), 8)]


def padding(rows: list[int]) -> float:
    """Padded tokens over tokens."""
    padded = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches(rows))
    return padded / sum(LENGTHS[row] for row in rows)


def test_every_row_comes_once_and_little_is_padded() -> None:
    rows = list(sampler())
    assert sorted(rows) == list(range(len(LENGTHS)))
    assert padding(rows) < 1.1
    assert padding(list(range(len(LENGTHS)))) > 1.5


def test_batches_come_in_no_order_of_length_and_epochs_differ() -> None:
    grouped = sampler()
    first = list(grouped)
    longest = [max(LENGTHS[row] for row in batch) for batch in batches(first)]
    assert longest != sorted(longest)
    rises = sum(a < b for a, b in pairwise(longest))
    assert 0.3 < rises / len(longest) < 0.7
    grouped.set_epoch(1)
    assert list(grouped) != first
    assert {frozenset(batch) for batch in batches(list(grouped))} != {frozenset(batch) for batch in batches(first)}


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_rows_and_have_as_many(world_size: int) -> None:
    shares = [list(sampler(world_size=world_size, rank=rank)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    counts = Counter(row for share in shares for row in share)
    assert set(counts) == set(range(len(LENGTHS)))
    assert sum(counts.values()) - len(LENGTHS) < world_size
    assert all(padding(share) < 1.1 for share in shares)


def test_an_epoch_goes_on_behind_what_is_done() -> None:
    whole = sampler()
    whole.set_epoch(2)
    assert list(sampler(start=Position(2, 5))) == list(whole)[5 * 8 :]


def test_it_goes_with_no_token_budget() -> None:
    with pytest.raises(ConfigurationError, match=r"data\.length_grouping is for batches of data\.batch_size"):
        SmolTalkDataModule("x", model_name="y", tokens_per_batch=600, length_grouping=True)
