"""What the suite relies on in Lightning beyond its public names: which of it a release has changed, by name."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

ROOT = Path(__file__).parents[1]
RELIED_ON: list[tuple[Any, str, list[str] | None]] = [
    (_TrainingEpochLoop, "_should_accumulate", []),
    (_TrainingEpochLoop, "_should_check_val_fx", ["data_fetcher"]),
    (_TrainingEpochLoop, "_num_ready_batches_reached", []),
    (_FitLoop, "_can_stop_early", None),
    (_LoggerConnector, "on_batch_end", []),
    (_LoggerConnector, "should_update_logs", None),
    (_LoggerConnector, "metrics", None),
    (_CheckpointConnector, "_hpc_resume_path", None),
    (_LoggerConnector, "update_train_step_metrics", []),
    (_SignalConnector, "register_signal_handlers", []),
    (_SignalConnector, "_register_signal", ["signum", "handlers"]),
    (_SignalConnector, "_slurm_sigusr_handler_fn", ["signum", "_"]),
    (ModelCheckpoint, "_save_checkpoint", ["trainer", "filepath"]),
    (ModelCheckpoint, "_save_topk_checkpoint", ["trainer", "monitor_candidates"]),
    (ModelCheckpoint, "_save_last_checkpoint", ["trainer", "monitor_candidates"]),
    (ModelCheckpoint, "_link_checkpoint", ["trainer", "filepath", "linkpath"]),
    (ModelCheckpoint, "_should_remove_checkpoint", ["trainer", "previous", "current"]),
    (LightningCLI, "_parse_ckpt_path", []),
    (LightningCLI, "_set_seed", []),
    (LightningCLI, "_get", ["config", "key", "default"]),
    (LightningCLI, "_prepare_subcommand_kwargs", ["subcommand"]),
]
"""The class, the name, and a method's parameters."""


@pytest.mark.parametrize(("owner", "name", "parameters"), RELIED_ON, ids=[f"{o.__name__}.{n}" for o, n, _ in RELIED_ON])
def test_what_is_relied_on_is_there(owner: Any, name: str, parameters: list[str] | None) -> None:
    where = "callbacks/lightning_internals.py says what is relied on"
    found = inspect.getattr_static(owner, name, None)
    assert found is not None, f"this Lightning has no {owner.__name__}.{name} any more; {where}"
    if parameters is None:
        assert isinstance(found, property), f"{owner.__name__}.{name} is no property any more; {where}"
    else:
        taken = [p for p in inspect.signature(getattr(owner, name)).parameters if p != "self"]
        assert taken == parameters, f"{owner.__name__}.{name} takes {taken} now; {where}"


def test_a_trainer_has_the_parts_that_are_reached() -> None:
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for name in ("_signal_connector", "_logger_connector", "_accelerator_connector", "_checkpoint_connector"):
        assert hasattr(trainer, name), f"this Lightning's Trainer has no {name} any more"
    assert hasattr(trainer._accelerator_connector, "cluster_environment")
    assert hasattr(trainer.fit_loop, "_data_fetcher")
    assert hasattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped")
    loops = trainer.fit_loop.state_dict()
    for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
        assert set(loops[name]["current"]) == {"ready", "started", "processed", "completed"}, name
    assert hasattr(LightningModule(), "_trainer")


def test_no_other_file_names_what_is_lightning_s_own() -> None:
    private = {name for _, name, _ in RELIED_ON if name.startswith("_")}
    private |= {"_signal_connector", "_logger_connector", "_accelerator_connector", "_data_fetcher"}
    overriders = {"lightning_internals.py", "boundary_checkpoint.py", "lightning.py"}
    for package in ("callbacks", "commands", "lightning_modules", "datamodules", "core"):
        for file in (ROOT / package).rglob("*.py"):
            named = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
            allowed = {"_register_signal"} if file.name == "preemption.py" else set()  # of the class that it subclasses
            assert file.name in overriders or not (named & private) - allowed, file
