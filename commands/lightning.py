"""``fit`` and ``validate``: LightningCLI with the suite's run folder, loggers, checkpoints, export and evaluation."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import datasets
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from typing_extensions import override

from callbacks import HuggingFaceExport, NemotronEvaluation
from callbacks.line_progress import LineProgress
from callbacks.metrics_file import MetricsFile
from callbacks.tracking import WandbTracking, run_name
from datamodules.base import ChatDataModule
from datamodules.errors import ConfigurationError
from lightning_modules.base import FineTuningModule


class Parser(LightningArgumentParser):
    """Says what is wrong in a line or two, without the usage of five hundred options."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        lines = [line for line in message.strip().splitlines() if line.strip()]
        sys.stderr.write("error: " + "\n".join(lines[:8]) + "\n")
        raise SystemExit(2)


class SaveConfig(SaveConfigCallback):
    """Keeps the config of a fit in the run's folder and with every logger."""

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config.as_dict())


class SuiteCLI(LightningCLI):
    """Adds the run's folder, its loggers, checkpoints, export and evaluation."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        skipped = {"model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule"}
        return {"fit": skipped, "validate": skipped}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(HuggingFaceExport, "export")
        parser.add_lightning_class_args(NemotronEvaluation, "evaluation")
        parser.add_class_arguments(WandbTracking, "wandb", skip={"save_dir", "name", "job_type"}, instantiate=False)
        parser.link_arguments("model.init_args.model_name", "data.init_args.model_name")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.filename": "best-{epoch}",
                "checkpoint.save_last": True,
            }
        )

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.ckpt_path not in (None, "last", "best") and not Path(config.ckpt_path).exists():
            raise ConfigurationError(f"--ckpt_path {config.ckpt_path} does not exist; name a checkpoint, or last")
        root = config.trainer.default_root_dir or "outputs/run"
        config.trainer.default_root_dir = root
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(Path(root) / "checkpoints")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self.config[self.subcommand]
        root = config.trainer.default_root_dir
        if config.trainer.logger is None or config.trainer.logger is True:
            name = run_name(self.model.method, self.model.model_name, self.datamodule.dataset_name)
            wandb = WandbTracking(save_dir=root, name=name, job_type=self.model.method, **config.wandb.as_dict())
            file_name = "metrics.jsonl" if self.subcommand == "fit" else "validation.jsonl"
            kwargs["logger"] = [MetricsFile(root, file_name), wandb]
        if not sys.stdout.isatty() and config.trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"] = [LineProgress()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError) as error:  # an unknown strategy, precision or device
            raise ConfigurationError(f"{error}; change the trainer's options") from error

    def before_fit(self) -> None:
        self.model.check_options(self.datamodule)

    def before_validate(self) -> None:
        self.model.check_options(self.datamodule)


def quieten() -> None:
    """Keep to ourselves what libraries say that the user can do nothing about, and bars that are no bars in a log."""
    warnings.filterwarnings("ignore", message=".*treespec.*")  # Lightning and torch 2.13
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    noise = ("litlogger", "TPU", "estimate number")
    told = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    told.addFilter(lambda record: not any(word in record.getMessage() for word in noise))
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def run() -> None:
    """Run ``fit`` or ``validate``, as the command line says."""
    quieten()
    SuiteCLI(
        FineTuningModule,
        ChatDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=42,
        parser_class=Parser,
        parser_kwargs={"allow_abbrev": False},
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
    )
