"""A run's folder: what is in it already, what ``--overwrite true`` removes, and the model that ``validate`` judges."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from commands.parsing import named_values, read_config
from datamodules.errors import ConfigurationError

LOGS = ("metrics.jsonl", "tables.jsonl", "validation.jsonl")
MODEL_OPTIONS = {"model.model_name", "model.init_args.model_name"}


class RunFolder:
    """Where a run keeps what it makes.

    Args:
        root: ``trainer.default_root_dir``.
        checkpoints: ``checkpoint.dirpath``, elsewhere only if the user says so.
        final: Where the finished model goes.
    """

    def __init__(self, root: Path, checkpoints: Path, final: Path) -> None:
        self.root = root
        self.checkpoints = checkpoints
        self.final = final

    def check_free(self, ckpt_path: str | None, *, resumes: bool, overwrite: bool) -> None:
        """Refuse to train over what an earlier run left.

        Args:
            ckpt_path: The checkpoint to go on from, where one was found.
            resumes: Whether one was asked for.
            overwrite: Whether to start over.

        Raises:
            ConfigurationError: Naming both ways out.
        """
        if overwrite and resumes:
            raise ConfigurationError("--ckpt_path goes on and --overwrite true starts over: name one of the two")
        own = ckpt_path is not None and Path(ckpt_path).resolve().parent in (
            self.checkpoints.resolve(),
            self.root.resolve(),
        )
        requeued = sorted(self.root.glob("hpc_ckpt_*.ckpt"))  # Lightning goes on from SLURM's, whatever is asked for
        if overwrite and requeued:
            raise ConfigurationError(f"{requeued[-1]} of a requeued job would be gone on from; remove it to start over")
        if own or overwrite or (requeued and not resumes):
            return
        finished = (self.final / "config.json").is_file()
        stopped = any(self.checkpoints.glob("*.ckpt"))
        if finished or stopped:
            none = " (it has no checkpoint now)" if not stopped else ""
            raise ConfigurationError(
                f"{self.root} holds a {'finished' if finished else 'stopped'} run: go on with --ckpt_path last{none}, "
                "start over with --overwrite true, or name another --trainer.default_root_dir"
            )

    def clear(self) -> None:
        """Remove the model, checkpoints, evaluations and curves of an earlier run; nothing that is not its own."""
        if (self.final / "config.json").is_file():
            shutil.rmtree(self.final)
        for metrics in (self.root / "eval").glob("*/metrics.json"):
            shutil.rmtree(metrics.parent)
        if self.checkpoints.resolve().is_relative_to(self.root.resolve()):
            for checkpoint in self.checkpoints.glob("*.ckpt"):
                shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
        for name in LOGS:
            (self.root / name).unlink(missing_ok=True)


class StartOver(Callback):
    """Clears the folder once the new run is about to take its first step, so that a mistake before costs nothing.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.folder.clear()
            rank_zero_info(f"starting over in {self.folder.root}")
        trainer.strategy.barrier("start over")


def judge_final(config: Any, folder: RunFolder, arguments: list[str]) -> None:
    """Have ``validate`` judge the run's final model where the command line names no other model or checkpoint.

    The model that training started from becomes the reference, where none is named.

    Args:
        config: Of ``validate``, with its classes not yet built; changed in place.
        folder: The run's.
        arguments: Of the command line.

    Raises:
        ConfigurationError: If there is no final model, or no model is named at all.
    """
    named = named_values(arguments)
    if config.ckpt_path is not None or any(name in MODEL_OPTIONS for name, _ in named):
        return
    options = config.model.init_args
    if config.model.class_path.rpartition(".")[2] == "EvaluationModule":
        contents = [read_config(value) for name, value in named if name in ("config", "c")]
        if not any("model_name" in ((content.get("model") or {}).get("init_args") or {}) for content in contents):
            raise ConfigurationError("validate needs a model: name it with --model.model_name, or a run with --config")
        return
    if not (folder.final / "config.json").is_file():
        raise ConfigurationError(
            f"{folder.final} holds no model, so there is nothing to judge yet: finish the training, or name a model "
            "with --model.model_name or a checkpoint with --ckpt_path"
        )
    started_from = options.model_name
    options.model_name = str(folder.final)
    if config.data is not None:
        config.data.init_args.model_name = options.model_name
    if "reference_model" in options and options.reference_model is None:
        options.reference_model = started_from
    if config.evaluation.reference_model is None:
        config.evaluation.reference_model = started_from
