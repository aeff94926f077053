"""Several datasets as one: an epoch has a share of each, drawn anew, and a validation tells them apart."""

import inspect
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from core.errors import ConfigurationError
from datamodules.base import ChatDataModule
from datamodules.encoding import row_lengths
from datamodules.formats import FORMATS, Reader
from datamodules.position import ResumableSampler
from datamodules.shards import ShardSampler
from datamodules.splits import decontaminated, kept
from datamodules.token_budget import best_fit, to_number

SHARED = (
    "batch_size",
    "max_length",
    "num_workers",
    "seed",
    "chat_template",
    "tokens_per_batch",
    "length_grouping",
    "decontaminate",
)
"""Options that are the mixture's alone."""
USABLE = re.compile(r"[A-Za-z0-9_-]+")


class MixtureSampler(ResumableSampler):
    """Rows of several parts, so many of each, drawn anew in each epoch from its number and the seed.

    A part's rows are all seen before one is seen again. With a token budget lists of rows are yielded, as many in
    every epoch.

    Args:
        sizes: Rows that each part has, which lie one part after the other.
        counts: Rows that an epoch has of each.
        world_size: Processes.
        rank: Of this process.
        lengths: Tokens of every row, and the budget of a batch, where batches are filled to one.
        options: Of :class:`ResumableSampler`: ``seed``, ``start``, ``rows_per_batch``.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        counts: Sequence[int],
        world_size: int,
        rank: int,
        *,
        lengths: tuple[Sequence[int], int] | None = None,
        **options: Any,
    ) -> None:
        self.sizes = sizes
        self.counts = counts
        self.lengths = lengths
        number = sum(counts)
        if lengths is not None:
            packed = len(best_fit(lengths[0], self.drawn(0, options["seed"]), budget=lengths[1]))
            number = -(-packed * 51 // 50)  # other epochs pack into some more or some fewer
        number = max(number, world_size)
        super().__init__(range(-(-number // world_size) * world_size), world_size, rank, **options)

    def drawn(self, epoch: int, seed: int) -> list[int]:
        """The rows of an epoch, in order."""
        rows: list[int] = []
        firsts = accumulate(self.sizes, initial=0)
        for part, (first, size, count) in enumerate(zip(firsts, self.sizes, self.counts, strict=False)):
            rounds = -(-count // size)
            orders = [_order(size, seed, epoch, part, turn) for turn in range(rounds)]
            rows += [first + row for order in orders for row in order][:count]
        return [rows[at] for at in _order(len(rows), seed, epoch)]

    @override
    def in_order(self) -> Iterator[Any]:
        items: list[Any] = self.drawn(self.epoch, self.seed)
        if self.lengths is not None:
            lengths, budget = self.lengths
            items = to_number(best_fit(lengths, items, budget=budget), self.total_size)
        items += items[: self.total_size - len(items)]  # every process has as many
        return iter(items[self.rank :: self.num_replicas])


def _order(count: int, *words: int) -> list[int]:
    """A permutation that the words decide."""
    seed = random.Random("-".join(map(str, words))).getrandbits(63)
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


class MixtureDataModule(ChatDataModule):
    """Trains on several datasets at once, and validates on each: ``val/<part>/loss`` beside ``val/loss``.

    Args:
        parts: Data modules of one task, by the names that their metrics have. What concerns batches and tokens is
            said of the mixture alone: ``batch_size``, ``max_length``, ``chat_template`` and the like.
        weights: What share of an epoch's rows each part has, up to a common factor.
        rows_per_epoch: How many rows that is in all; where not given, as many as there are without one coming twice.
    """

    needed_columns = ()
    train_split = "train"
    validation_split = "validation"
    readers = {task: reader for form in FORMATS for task, reader in form.readers.items()}

    def __init__(
        self,
        parts: dict[str, ChatDataModule],
        weights: dict[str, float],
        rows_per_epoch: int | None = None,
        model_name: str | None = None,
        batch_size: int = 8,
        max_length: int = 512,
        num_workers: int = 0,
        max_samples: int | None = None,
        seed: int = 42,
        chat_template: str | None = None,
        tokens_per_batch: int | None = None,
        decontaminate: bool = False,
    ) -> None:
        self.parts = parts
        self.rows_per_epoch = rows_per_epoch
        self.weights = checked_weights(parts, weights)
        if rows_per_epoch is not None and rows_per_epoch < len(parts):
            raise ConfigurationError(f"data.rows_per_epoch must be at least {len(parts)}, got {rows_per_epoch}")
        super().__init__(
            model_name=model_name,
            dataset_name=" + ".join(part.dataset_name for part in parts.values()),
            task=next(iter(parts.values())).task,
            batch_size=batch_size,
            max_length=max_length,
            num_workers=num_workers,
            max_samples=max_samples,
            seed=seed,
            chat_template=chat_template,
            tokens_per_batch=tokens_per_batch,
            decontaminate=decontaminate,
        )
        self.part_names = tuple(parts)
        self._sizes: dict[str, dict[str, int]] = {}
        self._validated: list[str] = []

    @override
    def setup(self, stage: str) -> None:
        wanted = ["train", "validation"] if stage == "fit" else ["validation"]
        if set(wanted) <= set(self._splits):
            return
        found: dict[str, dict[str, Dataset]] = {split: {} for split in wanted}
        for name, part in self.datasets().items():
            for split in wanted:
                theirs = part.train_split if split == "train" else part.validation_split
                title = f"{part.dataset_name} {theirs}"
                rows, dropped = kept(part.encode(theirs)[1], title=title, max_length=self.max_length)
                found[split][name] = rows
                self.dropped[split] = self.dropped.get(split, Counter()) + dropped
        if stage == "fit":
            held_out = concatenate_datasets(list(found["validation"].values()))
            for name, rows in found["train"].items():
                found["train"][name] = decontaminated(
                    rows, held_out, leave_out=self.decontaminate, title=self.parts[name].dataset_name
                )
        for split, parts in found.items():
            self._sizes[split] = {name: len(rows) for name, rows in parts.items()}
            self._splits[split] = concatenate_datasets(list(parts.values()))

    @override
    def datasets(self) -> dict[str, ChatDataModule]:
        """The parts, with the mixture's options; what a part says otherwise is refused."""
        super().datasets()
        defaults = inspect.signature(ChatDataModule).parameters
        for name, part in self.parts.items():
            for option in SHARED:
                theirs, ours = getattr(part, option), getattr(self, option)
                if theirs not in (defaults[option].default, ours):
                    raise ConfigurationError(
                        f"data.parts.{name}.{option} is {theirs} and data.{option} {ours}; say it of the mixture alone"
                    )
                setattr(part, option, ours)
            part.model_name = self.model_name
            part.max_samples = part.max_samples or self.max_samples
            part.tokenizer = self.tokenizer
        return self.parts

    def counts(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """How many rows of each part an epoch has, by how many there are."""
        number = self.rows_per_epoch or int(min(sizes[name] / self.weights[name] for name in sizes) + 1e-9)
        return apportioned(number, self.weights)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        self.refuse_overfitting()
        rows, sizes = self._splits["train"], self._sizes["train"]
        counts = self.counts(sizes)
        rank_zero_info(f"an epoch has {sum(counts.values()):,} rows: {told(counts, sizes)}")
        if few := [name for name, count in counts.items() if not count]:
            raise ConfigurationError(
                f"no row of {few[0]} is in an epoch; raise data.weights.{few[0]} or data.rows_per_epoch"
            )
        budget = self.tokens_per_batch
        sampler = MixtureSampler(
            list(sizes.values()),
            list(counts.values()),
            *self._ranks(),
            lengths=(row_lengths(rows), budget) if budget is not None else None,
            seed=self.seed,
            start=self.start,
            rows_per_batch=1 if budget is not None else self.batch_size,
        )
        return self._loader(rows, sampler, in_lists=budget is not None)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        rows = self._splits["validation"]
        batches = [(name, batch) for name, part in self._rows_of_parts() for batch in self._batches(rows, part)]
        sampler = ShardSampler([batch for _, batch in batches], *self._ranks())
        self.counted_batches = sampler.counted
        world_size, rank = self._ranks()
        self._validated = [name for name, _ in batches[rank::world_size]]
        return self._loader(rows, sampler, in_lists=True)

    def _rows_of_parts(self) -> Iterator[tuple[str, range]]:
        sizes = self._sizes["validation"]
        for name, first in zip(sizes, accumulate(sizes.values(), initial=0), strict=False):
            yield name, range(first, first + sizes[name])

    def _batches(self, rows: Dataset, part: range) -> list[list[int]]:
        if self.tokens_per_batch is not None:
            return best_fit(row_lengths(rows), part, budget=self.tokens_per_batch)
        return [list(part[at : at + self.batch_size]) for at in range(0, len(part), self.batch_size)]

    @override
    def validation_part(self, batch_idx: int) -> str | None:
        return self._validated[batch_idx] if batch_idx < len(self._validated) else None

    @override
    def prompt_rows(self, split: str) -> tuple[Dataset, Reader]:
        raise ConfigurationError("evaluation.dataset_name must be one dataset, not a mixture; name a part's")


def checked_weights(parts: Mapping[str, ChatDataModule], weights: Mapping[str, float]) -> dict[str, float]:
    """Shares that add up to 1, in the order of the parts.

    Raises:
        ConfigurationError: If parts and weights do not fit, or the parts each other.
    """
    if len(parts) < 2:
        raise ConfigurationError(f"data.parts must be at least two, got {list(parts)}")
    if odd := [name for name in parts if not USABLE.fullmatch(name)]:
        raise ConfigurationError(f"data.parts: {odd[0]!r} is no name for metrics; use letters, digits, - and _")
    if set(parts) != set(weights):
        raise ConfigurationError(f"data.weights must be of the parts {list(parts)}, got {list(weights)}")
    if few := [name for name, weight in weights.items() if not 0 < weight < float("inf")]:
        raise ConfigurationError(f"data.weights.{few[0]} must be positive, got {weights[few[0]]}")
    tasks = {name: part.task for name, part in parts.items()}
    if len(set(tasks.values())) > 1:
        listed = ", ".join(f"{name} yields {task}" for name, task in tasks.items())
        raise ConfigurationError(f"the parts of a mixture are of one task: {listed}; change data.parts.NAME.task")
    return {name: weights[name] / sum(weights.values()) for name in parts}


def apportioned(number: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers in the weights' proportion that add up: the largest remainders are rounded up."""
    exact = {name: number * weight for name, weight in weights.items()}
    counts = {name: int(share + 1e-9) for name, share in exact.items()}
    by_remainder = sorted(counts, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: number - sum(counts.values())]:
        counts[name] += 1
    return counts


def told(counts: Mapping[str, int], sizes: Mapping[str, int]) -> str:
    """What an epoch has of each part."""
    number = sum(counts.values())
    return ", ".join(
        f"{count:,} of {sizes[name]:,} of {name} ({count / number:.1%}"
        + (f", each about {count / sizes[name]:.1f} times)" if count > sizes[name] else ")")
        for name, count in counts.items()
    )
