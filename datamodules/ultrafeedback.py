"""UltraFeedback: preference pairs; also their prompts, and the chosen side as conversations."""

from typing import Any

from datamodules.base import ChatDataModule
from datamodules.formats import Task, conversations_and_prompts, read_chosen, read_pair


class UltraFeedbackDataModule(ChatDataModule):
    """`HuggingFaceH4/ultrafeedback_binarized`, or the same columns from a local path.

    Pairs whose two scores are equal are kept, as in the published dataset.

    Args:
        dataset_name: Hub id, or a directory or file of parquet, JSONL or CSV with ``chosen`` and ``rejected``.
        task: ``preferences``, ``prompts``, or ``conversations`` (the chosen ones).
    """

    train_split = "train_prefs"
    validation_split = "test_prefs"
    needed_columns = ("chosen", "rejected")
    readers = {"preferences": read_pair, **conversations_and_prompts(read_chosen)}

    def __init__(
        self,
        dataset_name: str = "HuggingFaceH4/ultrafeedback_binarized",
        task: Task = "preferences",
        **options: Any,
    ) -> None:
        super().__init__(dataset_name=dataset_name, task=task, **options)
