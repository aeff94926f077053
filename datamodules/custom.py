"""Data of one's own: a hub dataset, a directory or a file, whose rows are in any of the usual formats."""

from functools import cached_property
from typing import Any

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from core.errors import ConfigurationError
from datamodules.base import ChatDataModule
from datamodules.encoders import ENCODERS, encode_text_rows
from datamodules.encoding import Encoder
from datamodules.formats import FORMATS, Read, Reader, Task, find_format
from datamodules.source import load_rows, renamed, share, split_names

HELD_OUT = "held-out"
"""What the share of the training rows is called that is held out."""
USUAL_VALIDATIONS = ("validation", "valid", "val", "dev", "eval", "test")


class CustomDataModule(ChatDataModule):
    """Rows with ``messages``, ``prompt`` and ``completion``, ``chosen`` and ``rejected``, and others: docs/data.md.

    Args:
        dataset_name: Hub id (``name:subset`` where it has several), or a directory or file of parquet, JSONL, JSON, CSV
            or TSV, plain or compressed, or what ``save_to_disk`` made.
        task: What a batch holds; rows serve each task that they can: pairs also as conversations and as prompts.
        train_split: Its name; of a file, and of a dataset with one split, all rows are meant.
        validation_split: Its name; where not given, the first there is of validation, valid, val, dev, eval and test,
            and else a share of the training rows.
        validation_share: The share of the training rows that is held out where no split is.
        split_seed: Of which rows those are.
        columns: What the dataset calls the columns that have other names there: ``{prompt: question}``.
        system: The system's turn of conversations that have none.
    """

    needed_columns = ()
    readers = {task: reader for form in FORMATS for task, reader in form.readers.items()}

    def __init__(
        self,
        dataset_name: str,
        task: Task,
        train_split: str = "train",
        validation_split: str | None = None,
        validation_share: float = 0.05,
        split_seed: int = 0,
        columns: dict[str, str] | None = None,
        system: str | None = None,
        **options: Any,
    ) -> None:
        if not 0 < validation_share < 1:
            raise ConfigurationError(f"data.validation_share must be between 0 and 1, got {validation_share}")
        if train_split == validation_split:
            raise ConfigurationError(f"data.train_split and data.validation_split are both {train_split!r}")
        self.train_split = train_split  # type: ignore[misc]  # of this dataset, where other modules have theirs
        self.validation_split = validation_split or HELD_OUT  # type: ignore[misc]
        self.validation_share = validation_share
        self.split_seed = split_seed
        self.columns = columns or {}
        self.system = system
        self._said: set[str] = set()
        super().__init__(dataset_name=dataset_name, task=task, **options)

    @cached_property
    def sources(self) -> dict[str, str]:
        """The split of the dataset that each of ours is, or a share is of; said once."""
        present = split_names(self.dataset_name)
        training = self.train_split
        if present and training not in present:
            if len(present) > 1:
                raise ConfigurationError(
                    f"{self.dataset_name} has the splits {present} and no {training!r}; name one in data.train_split"
                )
            training = present[0]
        validation = self.validation_split
        if validation == HELD_OUT:
            usual = (name for name in USUAL_VALIDATIONS if name in present and name != training)
            validation = next(usual, training)
            told = (
                f"{self.validation_share:.0%} of its rows are"
                if validation == training
                else f"its split {validation} is"
            )
            self._say_once(f"{self.dataset_name}: {told} held out for validation")
        elif validation not in present:
            raise ConfigurationError(
                f"{self.dataset_name} has {f'the splits {present}' if present else 'no splits'} and no {validation!r}; "
                "change data.validation_split, or unset it to hold out a share of the rows"
            )
        return {self.train_split: training, self.validation_split: validation}

    @override
    def load(self, split: str) -> Dataset:
        source = self.sources[split]
        rows = load_rows(self.dataset_name, source, columns=list(self.columns.values()), held_out=None)
        if len(set(self.sources.values())) == 1:
            if len(rows) < 2:
                raise ConfigurationError(
                    f"{self.dataset_name} has one row, with the columns {rows.column_names}, and none to hold out; add "
                    "rows (a file of JSON is a list of them)"
                )
            held_out = split == self.validation_split
            rows = share(rows, self.validation_share, held_out=held_out, seed=self.split_seed)
        return renamed(rows, self.columns)

    @override
    def reading(self, rows: Dataset) -> tuple[Encoder, Reader]:
        form = find_format(rows.column_names, source=self.dataset_name)
        self._say_once(f"{self.dataset_name}: rows of {form.name}")
        if self.task not in form.readers:
            raise ConfigurationError(
                f"{self.dataset_name} has rows of {form.name}, which serve {', '.join(form.readers)} and no "
                f"{self.task}; change data.task or data.dataset_name"
            )
        if form.name == "text":
            if self.system is not None:
                raise ConfigurationError(f"{self.dataset_name} has plain text, which takes no data.system; unset it")
            return encode_text_rows, form.readers[self.task]
        return ENCODERS[self.task], Read(form.readers[self.task], system=self.system)

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            rank_zero_info(line)
            self._said.add(line)

    @override
    def prompt_rows(self, split: str) -> tuple[Dataset, Reader]:
        rows = self.load(self.validation_split)
        form = find_format(rows.column_names, source=self.dataset_name)
        if "prompts" not in form.readers:
            raise ConfigurationError(
                f"{self.dataset_name} has rows of {form.name}, which hold no prompts; change evaluation.dataset_name"
            )
        return rows, Read(form.readers["prompts"], system=self.system)
