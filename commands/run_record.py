"""What a run's folder says of the run: its options and the versions it ran with."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from core.errors import ConfigurationError
from core.files import write_whole
from datamodules.base import ChatDataModule
from lightning_modules.models.identity import directory_digest

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
