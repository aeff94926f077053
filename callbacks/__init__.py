"""Callbacks and loggers, one a file."""

from callbacks.hugging_face_export import HuggingFaceExport
from callbacks.nemotron_evaluation import NemotronEvaluation
from callbacks.training_health import TrainingHealth

__all__ = ["HuggingFaceExport", "NemotronEvaluation", "TrainingHealth"]
