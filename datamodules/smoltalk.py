"""SmolTalk: conversations of several turns, for SFT, or their last prompts for RLOO."""

from typing import Any

from datamodules.base import ChatDataModule
from datamodules.formats import Task, conversations_and_prompts, read_messages


class SmolTalkDataModule(ChatDataModule):
    """`HuggingFaceTB/smol-smoltalk`, or the same columns from a local path.

    Args:
        dataset_name: Hub id, or a directory or file of parquet, JSONL or CSV with ``messages``.
        task: ``conversations`` or ``prompts``.
    """

    train_split = "train"
    validation_split = "test"
    needed_columns = ("messages",)
    readers = conversations_and_prompts(read_messages)

    def __init__(
        self, dataset_name: str = "HuggingFaceTB/smol-smoltalk", task: Task = "conversations", **options: Any
    ) -> None:
        super().__init__(dataset_name=dataset_name, task=task, **options)
