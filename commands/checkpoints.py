"""Which checkpoints ``--ckpt_path`` means, tried before any model is loaded."""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from callbacks.checkpoints.checkpoint_io import newest_usable, unusable
from callbacks.checkpoints.sharded_files import REPLACED
from core.errors import ConfigurationError
from lightning_modules.base import FineTuningModule


def resolve_checkpoint(ckpt_path: str | None, root: Path, directory: Path) -> str | None:
    """The checkpoint that ``--ckpt_path`` means, tried before any model is loaded.

    Args:
        ckpt_path: A path, or ``last``: the newest whole checkpoint of the run, None where it has none yet.
        root: The run's folder, where SLURM's requeue leaves its own.
        directory: The folder of the run's checkpoints.

    Raises:
        ConfigurationError: If there is no such checkpoint, or it cannot be used.
    """
    if ckpt_path == "last":
        names = ("*.ckpt", f"*.ckpt{REPLACED}")  # the latter where a kill came while a directory's place was taken
        own = [file for name in names for file in directory.glob(name)]
        found = newest_usable([*own, *root.glob("hpc_ckpt_*.ckpt")])
        if found is None:
            rank_zero_info(f"{directory} holds no checkpoint yet, so a training starts anew")
        return str(found) if found else None
    if ckpt_path == "best":
        known = ", ".join(str(file) for file in sorted(directory.glob("*.ckpt"))) or "none so far"
        raise ConfigurationError(f"--ckpt_path best: name the checkpoint itself (this run has {known})")
    files = checkpoints(ckpt_path)
    if ckpt_path is not None and not files:
        raise ConfigurationError(f"--ckpt_path {ckpt_path} does not exist; name a checkpoint, or last")
    for file in files:
        if reason := unusable(Path(file), ("state_dict",)):
            raise ConfigurationError(f"the checkpoint {file} cannot be used: {reason}; name another with --ckpt_path")
    return ckpt_path


def checkpoints(ckpt_path: str | None) -> list[str]:
    """The checkpoints under a path: a file, a sharded checkpoint, a folder of files, or a pattern, in their order."""
    if ckpt_path is None:
        return []
    path = Path(ckpt_path)
    there = (file for file in path.glob("*.ckpt") if file.exists())  # last.ckpt may be a link that leads nowhere
    inside = sorted(there, key=lambda file: file.stat().st_mtime) if path.is_dir() else []
    return [str(file) for file in inside] or ([str(path)] if path.exists() else sorted(glob.glob(ckpt_path)))


@contextmanager
def fitting_checkpoint(model: FineTuningModule, path: str | None) -> Iterator[None]:
    """Tell weights of another model from our own mistakes."""
    try:
        yield
    except RuntimeError as error:
        if path is None or "loading state_dict" not in str(error):
            raise
        raise ConfigurationError(
            f"the checkpoint {path} is not one of {model.model_name}; change --ckpt_path or --model.model_name"
        ) from error
