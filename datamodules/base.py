"""What every data module does alike: load, encode, report what was dropped, and batch, on one process or many."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, get_args

from datasets import Dataset
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from core.errors import ConfigurationError
from datamodules.batches import collate_conversations, collate_preferences, collate_prompts
from datamodules.chat import load_tokenizer, tail_ids
from datamodules.chat_template import read_template
from datamodules.encoders import ENCODERS
from datamodules.encoding import Encoder, encode_rows, row_lengths, rows_digest
from datamodules.formats import Reader, Task
from datamodules.length_groups import LengthGroupedSampler
from datamodules.position import BEGINNING, ResumableSampler
from datamodules.shards import ShardSampler
from datamodules.source import load_rows
from datamodules.splits import decontaminated, kept
from datamodules.token_budget import TokenBudgetSampler, best_fit


class ChatDataModule(LightningDataModule):
    """Loads a chat dataset and yields it as one of the tasks; a dataset's own module says where its rows come from.

    Args:
        dataset_name: Hub id, or a directory or file of parquet, JSONL or CSV in the same columns.
        task: What a batch holds: ``conversations``, ``preferences`` or ``prompts``.
        model_name: Whose tokenizer and chat template to use; under ``cli.py`` it is linked to the model's.
        batch_size: Rows per batch and process.
        max_length: Longest sequence in tokens; of a prompt alone where the task is ``prompts``. A longer one loses
            its earliest exchanges, and is dropped where its last exchange alone is too long.
        num_workers: Processes that load batches. Large splits are tokenised on all cores.
        max_samples: Take only this many rows of each split.
        seed: Of the order in which the rows are seen.
        chat_template: How conversations are written out, in the place of the tokenizer's own template: a file, or the
            name of a template that ships (``chatml``). The exported model keeps it.
        tokens_per_batch: Fill batches to this many tokens in the place of ``batch_size`` rows. This is what others
            call packing: rows of all lengths lie one after the other without padding, filled by best fit, and here
            none attends to another and none is cut. A pair counts its prompt once. Not for prompts.
        length_grouping: Have batches hold rows of about the same length. It pays for models whose batches are padded,
            as is said when they are first run; others waste nothing in any case. Not with ``tokens_per_batch``.
        decontaminate: Leave out training rows whose prompt is a held-out one too. They are counted in any case; case,
            spaces and the system's turn make no difference.
    """

    train_split: ClassVar[str]
    validation_split: ClassVar[str]
    readers: ClassVar[Mapping[Task, Reader]]
    """For each task that the dataset serves, the function from a row to what stands for its messages there."""
    needed_columns: ClassVar[Sequence[str]]

    def __init__(
        self,
        dataset_name: str,
        task: Task,
        model_name: str | None = None,
        batch_size: int = 8,
        max_length: int = 512,
        num_workers: int = 0,
        max_samples: int | None = None,
        seed: int = 42,
        chat_template: str | None = None,
        tokens_per_batch: int | None = None,
        length_grouping: bool = False,
        decontaminate: bool = False,
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
        self.length_grouping = length_grouping
        self.decontaminate = decontaminate
        self.dropped: dict[str, Counter[str]] = {}
        self.start = BEGINNING
        """Where training begins; a run that is resumed sets it."""
        self.part_names: tuple[str, ...] = ()
        """Of what a validation tells apart."""
        self.counted_batches = 0
        """How many of the first batches of a validation count here; a later one repeats another process's row."""
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

        if self.length_grouping and budget is not None:
            raise ConfigurationError(
                "data.length_grouping is for batches of data.batch_size rows; unset it, or data.tokens_per_batch"
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
        self.tokenizer = load_tokenizer(self.named_model(), chat_template=self.chat_template)
        for split in wanted:
            if split not in self._splits:
                title = f"{self.dataset_name} {split}"
                _, encoded = self.encode(split)
                self._splits[split], self.dropped[split] = kept(encoded, title=title, max_length=self.max_length)
        if stage == "fit":
            training, held_out = (self._splits[split] for split in wanted)
            self._splits[self.train_split] = decontaminated(
                training, held_out, leave_out=self.decontaminate, title=self.dataset_name
            )

    def named_model(self) -> str:
        """The model whose tokenizer is used.

        Raises:
            ConfigurationError: If none is named.
        """
        if self.model_name is None:
            raise ConfigurationError("data.model_name is not given; name the model whose tokenizer is to be used")
        return self.model_name

    def datasets(self) -> dict[str, "ChatDataModule"]:
        """The data modules that have rows of their own, ready to encode them: this one, or a mixture's parts."""
        self.tokenizer = load_tokenizer(self.named_model(), chat_template=self.chat_template)
        return {"": self}

    def load(self, split: str) -> Dataset:
        """The rows of a split, as the dataset has them."""
        return load_rows(self.dataset_name, split, columns=self.needed_columns, held_out=split == self.validation_split)

    def reading(self, rows: Dataset) -> tuple[Encoder, Reader]:
        """What encodes such rows for the task, and what reads each."""
        return ENCODERS[self.task], self.readers[self.task]

    def prompt_rows(self, split: str) -> tuple[Dataset, Reader]:
        """Rows to evaluate on that are not trained on, and what reads the prompt of each."""
        rows = load_rows(self.dataset_name, split, columns=self.needed_columns, held_out=True)
        return rows, self.readers["prompts"]

    def encode(self, split: str) -> tuple[Dataset, Dataset]:
        """The rows of a split, and each of them encoded or with the reason that it is dropped."""
        rows = self.load(split)
        if self.max_samples is not None:
            rows = rows.select(range(min(self.max_samples, len(rows))))
        encoder, reader = self.reading(rows)
        tail = len(tail_ids(self.tokenizer)) if self.task == "preferences" else 0
        encoded = encode_rows(
            rows,
            encoder,
            title=f"tokenising {split}",
            read=reader,
            tokenizer=self.tokenizer,
            max_length=self.max_length - tail,
        )
        return rows, encoded

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        if self.tokens_per_batch is not None or self.length_grouping:
            self.refuse_overfitting()
        rows = self._splits[self.train_split]
        sampler: ResumableSampler
        if self.tokens_per_batch is not None:
            sampler = TokenBudgetSampler(
                row_lengths(rows), *self._ranks(), budget=self.tokens_per_batch, seed=self.seed, start=self.start
            )
        else:
            options: dict[str, Any] = {"rows_per_batch": self.batch_size, "seed": self.seed, "start": self.start}
            grouped = self.length_grouping
            sampler = (
                LengthGroupedSampler(row_lengths(rows), *self._ranks(), **options)
                if grouped
                else ResumableSampler(rows, *self._ranks(), **options)
            )
        return self._loader(rows, sampler, in_lists=self.tokens_per_batch is not None)

    def refuse_overfitting(self) -> None:
        """Raise a ConfigurationError for Lightning's ``overfit_batches``, which would replace the sampler."""
        if self.trainer is not None and self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            raise ConfigurationError(
                "trainer.overfit_batches takes batches of data.batch_size of one dataset; unset data.tokens_per_batch "
                "and data.length_grouping"
            )

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        rows = self._splits[self.validation_split]
        items: Sequence[Any] = range(len(rows))
        if self.tokens_per_batch is not None:
            items = best_fit(row_lengths(rows), items, budget=self.tokens_per_batch)
        in_lists = self.tokens_per_batch is not None
        sampler = ShardSampler(items, *self._ranks(), items_per_batch=1 if in_lists else self.batch_size)
        self.counted_batches = sampler.counted
        return self._loader(rows, sampler, in_lists=in_lists)

    def validation_part(self, batch_idx: int) -> str | None:
        """The part whose rows a validation batch of this process has; None where there are no parts."""
        return None

    def digests(self) -> dict[str, str]:
        """Of the content of each split as it is trained on: two runs with the same have seen the same tokens."""
        return {split: rows_digest(rows) for split, rows in self._splits.items()}

    def _ranks(self) -> tuple[int, int]:
        """How many processes there are, and which one this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader(self, rows: Dataset, sampler: DistributedSampler[Any], *, in_lists: bool) -> DataLoader[Any]:
        """Batches of the rows that a sampler yields one by one, or in lists."""
        collate = self._collate()
        return DataLoader(
            rows,  # type: ignore[arg-type]  # a Dataset has the protocol of a map-style one
            batch_size=None if in_lists else self.batch_size,
            sampler=sampler,
            collate_fn=partial(collate_columns, collate=collate) if in_lists else collate,
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


def collate_columns(columns: Mapping[str, Sequence[Any]], *, collate: Callable[[Sequence[Any]], Any]) -> Any:
    """Collate the rows that a dataset gives for a list of indices, which come as columns."""
    return collate([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
