"""``fit`` and ``validate``: LightningCLI with the suite's run folder, loggers, checkpoints, export and evaluation."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from callbacks import HuggingFaceExport, NemotronEvaluation, TrainingHealth
from callbacks.checkpoints.boundary_checkpoint import BoundaryCheckpoint
from callbacks.checkpoints.checkpoint_io import WholeCheckpointIO, plain_values
from callbacks.checkpoints.exact_resume import ExactResume
from callbacks.checkpoints.preemption import Preemption
from callbacks.checkpoints.run_options import KEY, RunOptions, check_same_run, flat, run_options
from callbacks.checkpoints.sharded_strategy import ShardedStrategy
from callbacks.logging.displays import displays
from callbacks.logging.metrics_file import MetricsFile
from callbacks.logging.tracking import WandbTracking, run_name, trackers
from commands.boundaries import check_boundaries, check_numbers, refuse_nulls
from commands.checkpoints import checkpoints, fitting_checkpoint, resolve_checkpoint
from commands.explaining import did_you_mean
from commands.launch import SameContent, check_surroundings, meet
from commands.parsing import ConfigParser, check_arguments, refuse_secrets, restrict
from commands.quiet import quieten
from commands.run_folder import FolderLock, RunFolder, StartOver, give_up_locks, judge_final
from commands.run_record import MemoryRecord, SaveConfig
from core.errors import ConfigurationError
from core.files import check_writable
from datamodules.base import ChatDataModule
from lightning_modules.base import FineTuningModule
from lightning_modules.untrained import EvaluationModule, NoRows


class SuiteCLI(LightningCLI):
    """Adds the run's folder, its loggers, checkpoints, export and evaluation."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        skipped = {"model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}
        return {"fit": skipped, "validate": skipped}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(BoundaryCheckpoint, "checkpoint")
        parser.add_lightning_class_args(HuggingFaceExport, "export")
        parser.add_lightning_class_args(TrainingHealth, "health")
        parser.add_lightning_class_args(NemotronEvaluation, "evaluation")
        parser.add_class_arguments(WandbTracking, "wandb", skip={"save_dir", "name", "job_type"}, instantiate=False)
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Start over in a folder that holds a run; what it made goes."
        )
        parser.add_argument(
            "--launch_timeout_s",
            type=float,
            default=60.0,
            help="How long the processes of a run wait for the last one.",
        )
        parser.link_arguments("model.init_args.model_name", "data.init_args.model_name")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.filename": "best-{epoch}",
                "checkpoint.save_last": True,
                "checkpoint.enable_version_counter": False,
            }
        )

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.add_lightning_class_args(FineTuningModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(ChatDataModule, "data", subclass_mode=True, required=False)

    @override
    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """To evaluate a model takes no method."""
        super().setup_parser(*args, **kwargs)
        validate = self._subcommand_parsers["validate"]
        validate.set_defaults({"model": {"class_path": "lightning_modules.EvaluationModule"}, "verbose": False})

    @override
    def _parse_ckpt_path(self) -> None:
        """A checkpoint never changes the options, nor names a class to build."""

    @override
    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool) and not 0 <= (seed or 0) < 2**32:
            raise ConfigurationError(f"seed_everything must be within 0..{2**32 - 1}, got {seed}")
        super()._set_seed()

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        refuse_secrets(config.as_dict())
        refuse_nulls({"model": config.as_dict()["model"], "data": config.as_dict().get("data")})
        check_numbers(config.trainer.as_dict())
        if self.subcommand == "fit" and config.data is None:
            raise ConfigurationError("fit needs data: name a config (configs/sft.yaml), or a data module with --data")
        root = config.trainer.default_root_dir or "outputs/run"
        config.trainer.default_root_dir = root
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(Path(root) / "checkpoints")
        config.checkpoint.dirpath = expanded(str(config.checkpoint.dirpath))
        check_boundaries(config.trainer.as_dict(), Path(root))
        folder = RunFolder(Path(root), Path(config.checkpoint.dirpath), Path(root) / config.export.directory)
        folder.check_links()
        self.ckpt_path = resolve_checkpoint(config.ckpt_path, folder.root, folder.checkpoints)
        self.starts_over = folder if config.overwrite and not config.trainer.fast_dev_run else None
        config.overwrite = False  # config.yaml must not say so to whoever uses it again
        if self.subcommand == "validate":
            if config.ckpt_path is not None and self.ckpt_path is None:
                raise ConfigurationError(f"--ckpt_path last: {folder.checkpoints} holds no checkpoint to judge")
            judge_final(config, folder, sys.argv[1:])
        elif not config.trainer.fast_dev_run:
            resumes = config.ckpt_path is not None
            folder.check_free(self.ckpt_path, resumes=resumes, overwrite=self.starts_over is not None)
        self.options = run_options(config.as_dict())
        if self.subcommand == "fit" and self.ckpt_path is not None:
            if checkpoints(self.ckpt_path) != [self.ckpt_path]:
                raise ConfigurationError(f"fit goes on from one checkpoint; {self.ckpt_path} names several: pick one")
            check_same_run(plain_values(Path(self.ckpt_path), KEY), self.options, self.ckpt_path)

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse wraps what a class raises
            missing = next((cause for cause in causes(error) if isinstance(cause, ImportError)), None)
            if missing is None:
                raise
            raise ConfigurationError(
                f"{' '.join(str(missing).split())} (a logger or callback of the config needs it)"
            ) from error

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "ckpt_path": self.ckpt_path, "weights_only": True}

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self.config[self.subcommand]
        root = Path(config.trainer.default_root_dir)
        check_writable(root, option="trainer.default_root_dir")
        kwargs["logger"] = self._loggers()
        own: list[Callback] = [SameContent(), ExactResume(self.ckpt_path), Preemption(), RunOptions(self.options)]
        if self.subcommand == "fit":
            own.append(MemoryRecord(self.planned_memory))
        if self.subcommand == "fit" and self.starts_over is not None:
            own.append(StartOver(self.starts_over))
        self.trainer_defaults["callbacks"] = own
        summary, bars = config.trainer.enable_model_summary, config.trainer.enable_progress_bar
        kwargs["enable_model_summary"] = summary or False
        shown = displays(progress=bars is not False, model=self.subcommand == "fit" and summary is None)
        asked = self._get(self.config_init, "trainer")
        kwargs["callbacks"] = [*shown, *listed(asked.callbacks)]  # first, so that an evaluation's headline is last
        plugins = listed(asked.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeCheckpointIO()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, RuntimeError) as error:  # an unknown strategy, precision or device
            if isinstance(error, RuntimeError) and "--ntasks" not in str(error):  # SLURM's, whose kind Lightning wants
                raise
            near = did_you_mean(str(config.trainer.strategy), StrategyRegistry.available_strategies())
            near = near if "strategy" in str(error) else ""
            raise ConfigurationError(f"{error}; change the trainer's options{near}") from error
        if not config.trainer.fast_dev_run:
            FolderLock(root, str(self.subcommand)).take()  # on the first process, which the trainer has found out
        if isinstance(trainer.strategy, ShardedStrategy):
            trainer.strategy.check_options(self.model)
        check_surroundings(trainer)
        meet(trainer, flat(config.as_dict()), self.ckpt_path, patience_s=config.launch_timeout_s)
        return trainer

    def _loggers(self) -> list[Logger]:
        """The run's own record, and W&B where no other loggers are asked for."""
        config = self.config[self.subcommand]
        root = config.trainer.default_root_dir
        record = MetricsFile(root, "metrics.jsonl" if self.subcommand == "fit" else "validation.jsonl")
        asked = self._get(self.config_init, "trainer").logger
        if asked is None or asked is True:
            dataset_name = self.datamodule.dataset_name if self.datamodule else config.evaluation.dataset_name
            name = run_name(self.model.method, self.model.model_name, dataset_name)
            asked = trackers(save_dir=root, name=name, job_type=self.model.method, **config.wandb.as_dict())
        return [record, *listed(asked or None)]

    def option(self, name: str) -> Any:
        """The value of an option by its dotted name."""
        return self.config[self.subcommand][name]

    def evaluation(self) -> Any:
        """The evaluation callback."""
        return self._get(self.config_init, "evaluation")

    def data(self) -> ChatDataModule:
        """The data module.

        Raises:
            ConfigurationError: If none is named.
        """
        if self.datamodule is None:
            raise ConfigurationError(
                "no data is named: name a config (--config configs/sft.yaml), or a module by --data"
            )
        assert isinstance(self.datamodule, ChatDataModule)
        return self.datamodule

    def planned_memory(self) -> tuple[str, int]:
        """The moment at which the run was to take most memory, and the bytes."""
        from commands.planning.memory import peak
        from commands.planning.plan import device_of, planned

        most = peak(planned(self, device_of(self)).moments)
        return most.name, most.total

    def before_fit(self) -> None:
        self.model.check_options(self.datamodule)

    def fit(self, model: FineTuningModule, **options: Any) -> None:
        """Train, from a checkpoint where one is named."""
        with fitting_checkpoint(model, self.ckpt_path):
            self.trainer.fit(model, **options)

    def validate(self, model: FineTuningModule, ckpt_path: str | None = None, **options: Any) -> None:
        """Evaluate the model, or it under each of several checkpoints; without data on the prompts alone."""
        if self.datamodule is None:
            model = EvaluationModule(model.model_name)
            options["dataloaders"] = DataLoader(NoRows())
        model.check_options(self.datamodule)
        paths: list[str | None] = [*checkpoints(ckpt_path)]
        names = Counter(Path(str(path)).stem for path in paths)
        if doubled := [name for name, count in names.items() if count > 1]:
            raise ConfigurationError(
                f"{len(paths)} checkpoints would share eval/{doubled[0]}; name them one by one, each with a "
                "--trainer.default_root_dir of its own"
            )
        evaluation = self.config_init[self.subcommand].evaluation
        reference = evaluation.reference_model if model.can_generate and evaluation.num_prompts else None
        for path in paths or [ckpt_path]:
            under = "" if path is None else f" under {path}"
            rank_zero_info(f"judging {model.model_name}{under}" + (f" against {reference}" if reference else ""))
            with fitting_checkpoint(model, path):
                self.trainer.validate(model, ckpt_path=path, **options)


def listed(given: Any) -> list[Any]:
    """An option that may be one, several or none, as a list."""
    return given if isinstance(given, list) else [] if given is None else [given]


def expanded(path: str) -> str:
    """The path with the user's folder for ``~``; an empty one stays so, and is refused where it is read."""
    return str(Path(path).expanduser()) if path else path


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what caused it, what caused that."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


PARSING: dict[str, Any] = {
    "model_class": FineTuningModule,
    "datamodule_class": ChatDataModule,
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "seed_everything_default": 42,
    "parser_class": ConfigParser,
    "parser_kwargs": {"allow_abbrev": False},
    "auto_configure_optimizers": False,
}
"""How every command that takes the options of ``fit`` reads them."""


def run() -> None:
    """Run ``fit`` or ``validate``, as the command line says."""
    quieten()
    restrict()
    check_arguments(sys.argv[1:])
    try:
        save: dict[str, Any] = {"save_config_callback": SaveConfig, "save_config_kwargs": {"save_to_log_dir": False}}
        SuiteCLI(**PARSING, **save)
    finally:
        give_up_locks()
