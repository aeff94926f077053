"""What every data module does alike: load, encode, report what was dropped, and batch, on one process or many."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from datasets import Dataset
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from core.errors import ConfigurationError
from datamodules import chat, chat_template, encoding, messages
from datamodules.batches import collate_conversations, collate_preferences, collate_prompts
from datamodules.chat import load_tokenizer, tail_ids
from datamodules.chat_template import read_template
from datamodules.encoding import (
    encode_conversation_row,
    encode_preference_row,
    encode_prompt_row,
    encode_rows,
    row_lengths,
    rows_digest,
)
from datamodules.position import BEGINNING, ResumableSampler
from datamodules.shards import ShardSampler
from datamodules.source import load_rows
from datamodules.token_budget import TokenBudgetSampler, best_fit

Task = Literal["conversations", "preferences", "prompts"]
"""What a batch holds: whole conversations (SFT), preference pairs (DPO, reward), or prompts to sample from (RLOO)."""

ROWS_PER_WORKER = 2_000

ENCODERS: Mapping[Task, Callable[..., dict[str, Any]]] = {
    "conversations": encode_conversation_row,
    "preferences": encode_preference_row,
    "prompts": encode_prompt_row,
}


class ChatDataModule(LightningDataModule):
    """Loads a chat dataset and yields it as one of the tasks; a dataset's own module says where its rows come from.

    Args:
        model_name: Whose tokenizer and chat template to use; under ``cli.py`` it is linked to the model's.
        dataset_name: Hub id, or a directory or file of parquet or JSONL in the same columns.
        task: What a batch holds: ``conversations``, ``preferences`` or ``prompts``.
        batch_size: Rows per batch and process.
        max_length: Longest sequence in tokens; of a prompt alone where the task is ``prompts``. A longer one loses
            its earliest exchanges, and is dropped where its last exchange alone is too long.
        num_workers: Processes that load batches, and that tokenise where a split is large.
        max_samples: Take only this many rows of each split.
        seed: Of the order in which the rows are seen.
        chat_template: How conversations are written out, in the place of the tokenizer's own template: a file, or the
            name of a template that ships (``chatml``). The exported model keeps it.
        tokens_per_batch: Fill batches to this many tokens (best fit) in the place of ``batch_size`` rows; a pair
            counts its prompt once. Not for prompts.
    """

    train_split: ClassVar[str]
    validation_split: ClassVar[str]
    readers: ClassVar[Mapping[str, Callable[[Mapping[str, Any]], Any]]]
    """For each task that the dataset serves, the function from a row to what stands for its messages there."""
    columns: ClassVar[Sequence[str]]

    def __init__(
        self,
        model_name: str,
        dataset_name: str,
        task: Task,
        batch_size: int = 8,
        max_length: int = 512,
        num_workers: int = 0,
        max_samples: int | None = None,
        seed: int = 42,
        chat_template: str | None = None,
        tokens_per_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.model_name = model_name
        self.dataset_name = dataset_name
        self.task: Task = task
        self.batch_size = batch_size
        self.max_length = max_length
        self.num_workers = num_workers
        self.max_samples = max_samples
        self.seed = seed
        self.chat_template = chat_template
        self.tokens_per_batch = tokens_per_batch
        self.dropped: dict[str, Counter[str]] = {}
        self.start = BEGINNING
        """Where training begins; a run that is resumed sets it."""
        self.repeats_validation = False
        """Whether this process validates on another one's rows, as there are fewer rows than processes."""
        self._splits: dict[str, Dataset] = {}
        self._check_options()

    def _check_options(self) -> None:
        if not isinstance(self.dataset_name, str):
            raise ConfigurationError(f"data.dataset_name must be one name or path, got {self.dataset_name!r}")
        if self.task not in get_args(Task):
            raise ConfigurationError(f"data.task must be one of {get_args(Task)}, got {self.task!r}")
        if self.task not in self.readers:
            name = type(self).__name__
            raise ConfigurationError(f"{name} has no {self.task}, only {list(self.readers)}; change data.task or data")
        for option in ("batch_size", "max_length", "max_samples"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ConfigurationError(f"data.{option} must be at least 1, got {value}")
        if self.num_workers < 0:
            raise ConfigurationError(f"data.num_workers must not be negative, got {self.num_workers}")
        if self.chat_template is not None:
            read_template(self.chat_template)
        budget = self.tokens_per_batch
        if budget is not None and (self.task == "prompts" or budget < self.max_length):
            raise ConfigurationError(
                f"data.tokens_per_batch must be at least data.max_length ({self.max_length}), and is for conversations "
                f"and preferences; got {budget} for {self.task}"
            )

    @override
    def prepare_data(self) -> None:
        """Tokenise on one process first; the others then read its cache."""
        validates = self.trainer is not None and self.trainer.state.fn == "validate"
        self.setup("validate" if validates else "fit")

    @override
    def setup(self, stage: str) -> None:
        wanted = [self.train_split, self.validation_split] if stage == "fit" else [self.validation_split]
        if set(wanted) <= set(self._splits):
            return
        self.tokenizer = load_tokenizer(self.model_name, chat_template=self.chat_template)
        for split in wanted:
            if split not in self._splits:
                self._splits[split] = self._encoded(split)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        if self.tokens_per_batch is not None and self.trainer is not None and self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            raise ConfigurationError("trainer.overfit_batches takes batches of data.batch_size; unset tokens_per_batch")
        rows = self._splits[self.train_split]
        sampler: ResumableSampler
        if self.tokens_per_batch is not None:
            sampler = TokenBudgetSampler(
                row_lengths(rows), *self._ranks(), budget=self.tokens_per_batch, seed=self.seed, start=self.start
            )
        else:
            sampler = ResumableSampler(
                rows, *self._ranks(), rows_per_batch=self.batch_size, seed=self.seed, start=self.start
            )
        return self._loader(rows, sampler)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        rows = self._splits[self.validation_split]
        items: Sequence[Any] = range(len(rows))
        if self.tokens_per_batch is not None:
            items = best_fit(row_lengths(rows), items, budget=self.tokens_per_batch)
        sampler = ShardSampler(items, *self._ranks())
        self.repeats_validation = sampler.repeats
        return self._loader(rows, sampler)

    def digests(self) -> dict[str, str]:
        """Of the content of each split as it is trained on: two runs with the same have seen the same tokens."""
        return {split: rows_digest(rows) for split, rows in self._splits.items()}

    def _ranks(self) -> tuple[int, int]:
        """How many processes there are, and which one this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader(self, rows: Dataset, sampler: DistributedSampler[Any]) -> DataLoader[Any]:
        collate = self._collate()
        return DataLoader(
            rows,  # type: ignore[arg-type]  # a Dataset has the protocol of a map-style one
            batch_size=None if self.tokens_per_batch else self.batch_size,
            sampler=sampler,
            collate_fn=partial(collate_columns, collate=collate) if self.tokens_per_batch else collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self._on_gpu(),
        )

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _collate(self) -> Callable[[Sequence[Mapping[str, Any]]], Any]:
        pad_token_id = int(self.tokenizer.pad_token_id)
        if self.task == "conversations":
            return partial(collate_conversations, pad_token_id=pad_token_id)
        if self.task == "preferences":
            return partial(collate_preferences, pad_token_id=pad_token_id, tail_ids=tail_ids(self.tokenizer))
        return collate_prompts

    def _encoded(self, split: str) -> Dataset:
        held_out = split == self.validation_split
        rows = load_rows(self.dataset_name, split, columns=self.columns, held_out=held_out)
        if self.max_samples is not None:
            rows = rows.select(range(min(self.max_samples, len(rows))))
        tail = len(tail_ids(self.tokenizer)) if self.task == "preferences" else 0
        encoded = encode_rows(
            rows,
            ENCODERS[self.task],
            processes=min(self.num_workers, len(rows) // ROWS_PER_WORKER) or None,
            title=f"tokenising {split}",
            read=self.readers[self.task],
            tokenizer=self.tokenizer,
            max_length=self.max_length - tail,
            code=code_digest(),  # rows that other code encoded are in the cache under another key
        )
        return self._without_dropped(encoded, split)

    def _without_dropped(self, encoded: Dataset, split: str) -> Dataset:
        reasons = encoded["dropped"]
        kept = [index for index, reason in enumerate(reasons) if not reason]
        dropped = Counter(reason for reason in reasons if reason)
        self.dropped[split] = dropped
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        ties = sum(encoded.select(kept)["tied"]) if "tied" in encoded.column_names else 0
        rank_zero_info(
            f"{self.dataset_name} {split}: {len(kept):,} of {len(reasons):,} rows kept"
            + (f", {ties} of them with tied scores" if ties else "")
            + (f" (dropped: {listed})" if listed else "")
        )
        if not kept:
            raise ConfigurationError(
                f"no row of {self.dataset_name} {split} can be used ({listed}); "
                f"check data.dataset_name and data.max_length ({self.max_length})"
            )
        if dropped["too long"] > len(reasons) // 2:
            warnings.warn(f"more than half of {split} is longer than data.max_length={self.max_length}", stacklevel=2)
        return encoded.select(kept).remove_columns("dropped")


def code_digest() -> str:
    """Of the code that rows are encoded with."""
    files = (Path(str(module.__file__)) for module in (messages, chat_template, chat, encoding))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def collate_columns(columns: Mapping[str, Sequence[Any]], *, collate: Callable[[Sequence[Any]], Any]) -> Any:
    """Collate the rows that a dataset gives for a list of indices, which come as columns."""
    return collate([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
