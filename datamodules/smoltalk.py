"""SmolTalk: conversations of several turns, for SFT, or their last prompts for RLOO."""

from collections.abc import Mapping
from typing import Any

from datamodules.base import ChatDataModule, Task
from datamodules.messages import before_answer


def read_conversation(row: Mapping[str, Any]) -> Any:
    """The whole conversation."""
    return row["messages"]


def read_prompt(row: Mapping[str, Any]) -> Any:
    """The conversation up to its last user turn."""
    return before_answer(row["messages"])


class SmolTalkDataModule(ChatDataModule):
    """`HuggingFaceTB/smol-smoltalk`, or the same columns from a local path.

    Args:
        dataset_name: Hub id, or a directory or file of parquet or JSONL with ``messages``.
        task: ``conversations`` or ``prompts``.
    """

    train_split = "train"
    validation_split = "test"
    columns = ("messages",)
    readers = {"conversations": read_conversation, "prompts": read_prompt}

    def __init__(
        self, dataset_name: str = "HuggingFaceTB/smol-smoltalk", task: Task = "conversations", **options: Any
    ) -> None:
        super().__init__(dataset_name=dataset_name, task=task, **options)
