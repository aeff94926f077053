"""UltraFeedback: preference pairs; also their prompts, and the chosen side as conversations."""

from collections.abc import Mapping
from typing import Any

from datamodules.base import ChatDataModule, Task
from datamodules.messages import before_answer


def read_preference(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Both conversations; each holds the prompt and one answer."""
    return row["chosen"], row["rejected"]


def read_chosen(row: Mapping[str, Any]) -> Any:
    """The conversation with the chosen answer."""
    return row["chosen"]


def read_prompt(row: Mapping[str, Any]) -> Any:
    """The conversation without its answer."""
    return before_answer(row["chosen"])


class UltraFeedbackDataModule(ChatDataModule):
    """`HuggingFaceH4/ultrafeedback_binarized`, or the same columns from a local path.

    Pairs whose two scores are equal are kept, as in the published dataset.

    Args:
        dataset_name: Hub id, or a directory or file of parquet or JSONL with ``chosen`` and ``rejected``.
        task: ``preferences``, ``prompts``, or ``conversations`` (the chosen ones).
    """

    train_split = "train_prefs"
    validation_split = "test_prefs"
    columns = ("chosen", "rejected")
    readers = {"preferences": read_preference, "prompts": read_prompt, "conversations": read_chosen}

    def __init__(
        self,
        dataset_name: str = "HuggingFaceH4/ultrafeedback_binarized",
        task: Task = "preferences",
        **options: Any,
    ) -> None:
        super().__init__(dataset_name=dataset_name, task=task, **options)
