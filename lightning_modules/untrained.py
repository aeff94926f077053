"""A model that is evaluated and not trained: any Hugging Face directory or hub id, under any method's checkpoint."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset
from typing_extensions import override

from lightning_modules.base import FineTuningModule


class EvaluationModule(FineTuningModule):
    """What ``validate`` takes where no method is named; the evaluation callback does all there is to do.

    Args:
        model_name: Hub id or directory of the model to evaluate.
    """

    method = "evaluation"
    task = "conversations"

    def __init__(self, model_name: str = "Qwen/Qwen2.5-0.5B") -> None:
        super().__init__(model_name=model_name)

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: there are no rows."""


class NoRows(IterableDataset[Any]):
    """What a validation iterates over that is only about the evaluation's prompts."""

    @override
    def __iter__(self) -> Iterator[Any]:
        return iter(())
