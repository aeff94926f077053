"""What a run's folder says of the run: its options and the versions it ran with."""

import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from core.errors import ConfigurationError
from core.files import write_whole
from core.memory import PeakMemory
from core.text import told
from datamodules.base import ChatDataModule
from lightning_modules.models.identity import directory_digest

SHORTEST_S = 60.0
"""A run of less is not planned again for the record: that takes some seconds."""
PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "wandb")


class SaveConfig(SaveConfigCallback):
    """Keeps the config of a fit, and the versions it ran with, in the run's folder and with every logger."""

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        kept = (Path(trainer.default_root_dir) / "config.yaml").exists()
        if not trainer.fast_dev_run and (stage == "fit" or not trainer.strategy.broadcast(kept)):
            super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        folder = Path(trainer.default_root_dir)  # and not a logger's, as which loggers there are is the user's affair
        found = json.dumps(environment(trainer, pl_module.model_name), indent=2) + "\n"
        try:
            write_whole(folder / "config.yaml", self.parser.dump(self.config, skip_none=False))
            write_whole(folder / "environment.json", found)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write into {folder} ({error.strerror}); make room there, or change trainer.default_root_dir"
            ) from error
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config.as_dict())


class MemoryRecord(Callback):
    """After a run that took its time, adds to ``environment.json`` what memory was planned, and what it took.

    Args:
        planned: Says at which moment it was to take most, and how much.
    """

    def __init__(self, planned: Callable[[], tuple[str, int]]) -> None:
        self.planned = planned
        self.began = time.monotonic()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.memory = PeakMemory(trainer.strategy.root_device.type)
        self.began = time.monotonic()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or time.monotonic() - self.began < SHORTEST_S:
            return
        measured = self.memory.bytes()
        file = Path(trainer.default_root_dir) / "environment.json"
        try:
            moment, planned = self.planned()
            found = {"planned": planned, "measured": measured, "moment": moment}
            write_whole(file, json.dumps(json.loads(file.read_text()) | {"memory": found}, indent=2) + "\n")
        except Exception as error:  # the run is done, whatever a foreign model or a full disk has against this
            rank_zero_warn(f"{file} does not say what memory was planned and taken ({told(error)})")


def environment(trainer: Trainer, model_name: str) -> dict[str, Any]:
    """What a run's figures depend on beside its options: versions, hardware, arithmetic, the content of its inputs."""
    device = trainer.strategy.root_device
    data: Any = getattr(trainer, "datamodule", None)
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "cuda": torch.version.cuda if on_gpu else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": trainer.world_size,
        "precision": trainer.precision,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "model": directory_digest(model_name),
        "data": data.digests() if isinstance(data, ChatDataModule) else {},
    }
