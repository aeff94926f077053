"""The largest batch that a run is to expect, from a sample of its rows."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from core.errors import ConfigurationError
from datamodules.base import ChatDataModule
from datamodules.batches import PreferenceBatch, PromptBatch, TokenBatch, pad
from datamodules.token_budget import best_fit
from lightning_modules.rloo import RLOOModule

SAMPLE = 256
"""Rows of each dataset that are tokenised."""
TRIES = 2_000
"""Batches that are drawn at most."""


class Largest(NamedTuple):
    """What a step's forward pass reads at most."""

    tokens: TokenBatch
    groups: Sequence[int] | None
    """Rows that begin alike."""
    prompts: list[int]
    """Tokens of the prompts, where the step samples."""
    mean_tokens: float
    """Of a row, prompt and completions together."""
    usable: dict[str, float]
    """The share of the rows that can be used, of each dataset."""


def largest_batch(data: ChatDataModule, module: Any) -> Largest:
    """Draw batches from the first rows and take the one of most tokens.

    Args:
        data: The run's; its rows are read, and some of them tokenised.
        module: The run's.
    """
    samples = {name: sample(part) for name, part in data.datasets().items()}
    usable = {name: sum(not row["dropped"] for row in rows) / len(rows) for name, rows in samples.items()}
    rows = [row for rows in samples.values() for row in rows if not row["dropped"]]
    if not rows:
        raise ConfigurationError(f"none of the first rows of {data.dataset_name} can be used; cli.py inspect says why")
    lengths = [sum(len(row[name]) for name in row if name.endswith("_ids")) for row in rows]
    batch = data._collate()([rows[at] for at in most_tokens(lengths, data)])
    mean = sum(lengths) / len(lengths)
    if isinstance(batch, PromptBatch):
        tokens, groups = with_samples(batch, module)
        prompts = [len(ids) for ids in batch.prompt_ids]
        return Largest(tokens, groups, prompts, mean + module.max_completion_length, usable)
    if isinstance(batch, PreferenceBatch):
        return Largest(batch.tokens, batch.pairs(), [], mean, usable)
    return Largest(batch, None, [], mean, usable)


def sample(part: ChatDataModule) -> list[Mapping[str, Any]]:
    """The first training rows of a dataset, encoded or with the reason that they are dropped."""
    limit, part.max_samples = part.max_samples, min(SAMPLE, part.max_samples or SAMPLE)
    encoded = part.encode(part.train_split)[1]
    part.max_samples = limit
    return list(encoded)


def most_tokens(lengths: Sequence[int], data: ChatDataModule) -> list[int]:
    """The rows of the largest of many batches, drawn as an epoch draws them or filled to the budget."""
    if data.tokens_per_batch is not None:
        batches = best_fit(lengths, range(len(lengths)), budget=data.tokens_per_batch)
    else:
        rng = random.Random(0)
        size = min(data.batch_size, len(lengths))
        batches = [rng.sample(range(len(lengths)), size) for _ in range(TRIES)]
    return max(batches, key=lambda batch: sum(lengths[row] for row in batch))


def with_samples(batch: PromptBatch, module: RLOOModule) -> tuple[TokenBatch, list[int]]:
    """The prompts, each with samples of the greatest length behind it."""
    count, length = module.samples_per_prompt, module.max_completion_length
    rows, masks, groups = [], [], []
    for number, ids in enumerate(batch.prompt_ids):
        for sample_number in range(count):
            rows.append([*ids.tolist(), *[sample_number] * length])
            masks.append([False] * len(ids) + [True] * length)
            groups.append(number)
    return pad(rows, masks, pad_token_id=0), groups
