"""Checkpoint files that are whole or absent, and hold plain data alone."""

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from callbacks.checkpoints.sharded_checkpoint import read_together
from callbacks.checkpoints.sharded_files import CONTENT, PARTIAL, making_way, unusable_shards
from core.errors import ConfigurationError, NotWrittenError
from core.files import new_file, sync_directory

RESUMABLE = ("state_dict", "loops", "optimizer_states", "pytorch-lightning_version")
"""What training goes on from; a file of weights alone lacks some of them."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs and renames, so a reader finds the old file or the new one, whatever is killed.

    Loading never runs code: tensors and plain values only, whatever the caller asks for.
    """

    def __init__(self) -> None:
        self.told: NotWrittenError | None = None
        """Why the last checkpoint is not written, where it was to be noted and not raised."""
        self._notes = False

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Have a disk that takes no checkpoint be noted meanwhile, as other processes wait for the one that writes."""
        self.told, self._notes = None, True
        try:
            yield
        finally:
            self._notes = False

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            write_checkpoint(checkpoint, Path(path))
        except NotWrittenError as error:
            if not self._notes:
                raise
            self.told = error

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        if "://" in str(path):
            raise ConfigurationError(f"checkpoints are read from disk alone, got {path}; download it and name the file")
        reason = unusable(Path(path), ())
        if reason:
            raise ConfigurationError(f"the checkpoint {path} cannot be used: {reason}; name another with --ckpt_path")
        if Path(path).is_dir():
            return read_together(Path(path))
        return super().load_checkpoint(path, map_location, weights_only=True)


def write_checkpoint(checkpoint: dict[str, Any], target: Path) -> None:
    """Save a checkpoint that is there in full or not at all.

    Raises:
        NotWrittenError: If the folder cannot be written or the disk is full; the file that was there is as it was.
    """
    partial = target.with_name(target.name + PARTIAL)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # as a kill left it
        with os.fdopen(new_file(partial), "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        with making_way(target):
            os.replace(partial, target)
            sync_directory(target.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        cause = error if isinstance(error, OSError) else error.__context__  # torch wraps a failed write
        if not isinstance(cause, OSError):
            raise
        raise NotWrittenError(
            f"cannot write the checkpoint {target} ({cause.strerror}); the one before it is untouched: "
            "make room there or change checkpoint.dirpath, then go on with --ckpt_path last"
        ) from error


def newest_usable(candidates: list[Path]) -> Path | None:
    """The checkpoint to resume from: the newest that is whole, saying which newer ones are passed over and why.

    Args:
        candidates: Files, or directories of sharded checkpoints.

    Returns:
        None where there is no candidate at all.

    Raises:
        ConfigurationError: If there are candidates and none is usable; links that lead nowhere do not count.
    """
    reason = ""
    there = [path for path in candidates if path.exists()]
    for path in sorted(candidates, key=lambda file: file.lstat().st_mtime_ns, reverse=True):
        if path not in there:
            rank_zero_info(f"passing over {path}: it is a link to a file that is not there")
            continue
        reason = unusable(path, RESUMABLE)
        if not reason:
            return path
        rank_zero_info(f"passing over {path}: {reason}")
    if there:
        raise ConfigurationError(
            f"none of the {len(there)} checkpoints in {there[0].parent} can be resumed from (the last "
            f"tried: {reason}); train anew without --ckpt_path, or name another checkpoint"
        )
    return None


def unusable(path: Path, keys: tuple[str, ...]) -> str:
    """Why a checkpoint cannot be used, empty where it can: every byte's checksum, and what it holds.

    Args:
        path: A file, or the directory of a sharded checkpoint.
        keys: What it must hold.
    """
    if path.is_dir():
        return unusable_shards(path)
    if not zipfile.is_zipfile(path):
        return "it is truncated, or no checkpoint"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a hostile or foreign file can raise
        return "it holds something else than tensors and plain values" if "nsupported" in str(error) else "not readable"
    if broken is not None:
        return f"{broken} in it is damaged"
    missing = [key for key in keys if not isinstance(checkpoint, dict) or key not in checkpoint]
    return f"it has no {missing[0]}, so nothing to resume" if missing else ""


def plain_values(path: Path, key: str) -> dict[str, Any]:
    """What a checkpoint holds under a key, without reading its tensors; empty where it has no such key."""
    return dict(_content(path).get(key) or {})


def saved_step(path: Path) -> int:
    """After which optimiser step a checkpoint was saved."""
    return int(_content(path).get("global_step", 0))


def _content(path: Path) -> dict[str, Any]:
    file = path / CONTENT if path.is_dir() else path
    content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return content
