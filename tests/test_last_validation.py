"""However a run ends, the model it leaves is evaluated, once; or it is said beforehand that it will not be."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from lightning_modules.models.identity import tensors_digest
from lightning_modules.rewards.rules import brevity
from tests.evaluation_run import evaluation, read, run

pytestmark = pytest.mark.filterwarnings("ignore:.*log_every_n_steps|.*num_workers|.*treespec")


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [7, 14]),
        ({"max_steps": 10, "max_epochs": -1}, [7, 10]),
        ({"max_steps": 3}, [3]),
        ({"max_steps": 14}, [7, 14]),
        ({"val_check_interval": 3}, [6, 14]),
        ({"val_check_interval": 3, "max_steps": 13}, [6, 13]),
        ({"val_check_interval": 3, "max_steps": 12}, [6, 12]),
        ({"val_check_interval": 5, "check_val_every_n_epoch": None}, [5, 14]),
        ({"accumulate_grad_batches": 2, "max_steps": 3}, [3]),
        ({"max_epochs": 3}, [7, 14, 21]),
    ],
)
def test_the_end_of_a_run_is_evaluated_and_no_more_of_its_epoch(
    options: dict[str, Any],
    steps: list[int],
    talks: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seven batches an epoch; within a validation, so that checkpoints can be ranked by it."""
    judge = evaluation(talks, brevity, num_prompts=2)
    asked, evaluate = [], judge.evaluate

    def watched(trainer: Trainer, *rest: Any) -> Any:
        asked.append((trainer.global_step, trainer.validating))
        return evaluate(trainer, *rest)

    monkeypatch.setattr(judge, "evaluate", watched)
    trainer = run(talks, tiny_model_dir, judge, root=tmp_path / "run", **options)
    assert asked == [(step, True) for step in steps]
    last = max((tmp_path / "run" / "eval").iterdir(), key=lambda folder: int(folder.name.partition("=")[2]))
    model: Any = trainer.model.model  # type: ignore[union-attr]
    assert read(last)[0]["model_digest"] == tensors_digest(model.state_dict().values())


@pytest.mark.parametrize("epochs", [1, 2, 3, 5])
def test_the_last_epoch_is_evaluated_whatever_every_n_epochs(
    epochs: int, talks: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    judge = evaluation(talks, brevity, num_prompts=2, every_n_epochs=2)
    run(talks, tiny_model_dir, judge, root=tmp_path / "run", max_epochs=epochs)
    found = sorted(folder.name for folder in (tmp_path / "run" / "eval").iterdir())
    assert found == sorted({f"epoch={epoch}" for epoch in range(1, epochs, 2)} | {f"epoch={epochs - 1}"})


def test_a_run_that_ends_by_time_is_evaluated(talks: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    judge, limit = evaluation(talks, brevity, num_prompts=2), timedelta(seconds=0.05)
    run(talks, tiny_model_dir, judge, root=tmp_path / "run", max_epochs=500, max_time=limit)
    assert len(list((tmp_path / "run" / "eval").iterdir())) >= 1


def test_a_run_that_early_stopping_or_no_validation_ends_is_evaluated_afterwards(
    talks: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Stopped by a validation within the epoch, which could not know; and at the end of an epoch without one."""
    stops = EarlyStopping("val/loss", stopping_threshold=1e9)
    judge = evaluation(talks, brevity, num_prompts=2)
    trainer = run(talks, tiny_model_dir, judge, root=tmp_path / "a", callbacks=[stops], val_check_interval=3)
    assert trainer.global_step == 3
    assert read(tmp_path / "a" / "eval" / "epoch=0")[0]["model"].endswith("after 3 steps of sft")
    judge = evaluation(talks, brevity, num_prompts=2)
    run(talks, tiny_model_dir, judge, root=tmp_path / "b", max_epochs=3, check_val_every_n_epoch=2)
    assert sorted(folder.name for folder in (tmp_path / "b" / "eval").iterdir()) == ["epoch=1", "epoch=2"]


def test_where_nothing_will_be_evaluated_that_is_said_before_training(
    talks: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    judge = evaluation(talks, brevity, num_prompts=2)
    with pytest.warns(UserWarning, match=r"this run evaluates nothing, as there is no validation .*limit_val_batches"):
        run(talks, tiny_model_dir, judge, root=tmp_path / "run", limit_val_batches=0)
    assert not (tmp_path / "run" / "eval").exists()
