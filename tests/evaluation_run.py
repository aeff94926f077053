"""An evaluation in a real run on small data, for the tests of what it asks, writes and survives."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.evaluation.metrics import Pair, evaluation_result
from callbacks.evaluation.result import EvaluationResult
from callbacks.nemotron_evaluation import NemotronEvaluation
from datamodules import SmolTalkDataModule
from lightning_modules import SFTModule


def write_rows(path: Path, count: int) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "yes"}]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(
    data: Path,
    model_dir: Path,
    evaluation: NemotronEvaluation,
    *,
    root: Path,
    fit: bool = True,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }
    trainer = Trainer(accelerator="cpu", default_root_dir=root, callbacks=[*callbacks, evaluation], **settings)
    module = SFTModule(model_name=str(model_dir), learning_rate=0.05)
    talks = SmolTalkDataModule(dataset_name=str(data), model_name=str(model_dir), max_length=64, batch_size=1)
    (trainer.fit if fit else trainer.validate)(module, datamodule=talks)
    return trainer


def evaluation(data: Path, reward: Any, **options: Any) -> NemotronEvaluation:
    settings = {
        "dataset_name": str(data),
        "split": "test",
        "num_prompts": 5,
        "max_completion_length": 6,
        "batch_size": 2,
        **options,
    }
    return NemotronEvaluation(reward=reward, **settings)


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return json.loads((folder / "metrics.json").read_text()), pairs


def result_of(pairs: Sequence[Pair], **about: Any) -> EvaluationResult:
    """What an evaluation with these pairs finds."""
    return evaluation_result(pairs, **{"reward_source": "judge", "reference": "base", **about})
