"""A run's folder: who may use it, what is in it, what ``--overwrite true`` removes, which model ``validate`` judges."""

import errno
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from typing_extensions import override

from callbacks.hugging_face_export import ADAPTER, is_export
from commands.parsing import named_values, read_config
from core.errors import ConfigurationError
from core.text import printable
from lightning_modules.models.adapter_files import CONFIG

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
        self.adapter = root / ADAPTER

    def check_links(self) -> None:
        """Refuse to write evaluations through links, which may lead to another run's."""
        for place in (self.root / "eval", *(self.root / "eval").glob("*")):
            if place.is_symlink():
                raise ConfigurationError(f"{place} is a link, and no evaluation is written through one; remove it")

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
        if overwrite and not self._owns(self.checkpoints) and any(self.checkpoints.glob("*.ckpt")):
            raise ConfigurationError(
                f"{self.checkpoints} holds checkpoints and lies outside {self.root}, where nothing is removed: remove "
                "them yourself to start over, or name another checkpoint.dirpath"
            )
        if own or overwrite or (requeued and not resumes):
            return
        finished = (self.final / "config.json").is_file() or (self.adapter / CONFIG).is_file()
        stopped = any(file.exists() for file in self.checkpoints.glob("*.ckpt"))
        if finished or stopped:
            none = " (it has no checkpoint now)" if not stopped else ""
            raise ConfigurationError(
                f"{self.root} holds a {'finished' if finished else 'stopped'} run: go on with --ckpt_path last{none}, "
                "start over with --overwrite true, or name another --trainer.default_root_dir"
            )

    def clear(self) -> None:
        """Remove the model, checkpoints, evaluations and curves of an earlier run; nothing that is not its own.

        A link goes, never what it leads to.
        """
        for export in (self.final, self.adapter):
            if self._owns(export) and is_export(export):
                remove(export)
        for metrics in (self.root / "eval").glob("*/metrics.json"):
            if self._owns(metrics.parent):
                remove(metrics.parent)
        if self._owns(self.checkpoints):
            for checkpoint in self.checkpoints.glob("*.ckpt"):
                remove(checkpoint)
        for name in LOGS:
            (self.root / name).unlink(missing_ok=True)

    def _owns(self, path: Path) -> bool:
        """Whether the path lies in the run's folder, wherever links lead."""
        return path.resolve().is_relative_to(self.root.resolve())


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link and not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


class FolderLock:
    """Keeps a second run of the same command out of a run's folder; a process that ends, however, gives it up.

    A POSIX record lock, as it is not inherited by the workers that a run starts. Where there is none, as on Windows,
    nothing is locked.

    Args:
        root: The run's folder.
        command: ``fit`` or ``validate``; a checkpoint may be judged while training goes on.
    """

    def __init__(self, root: Path, command: str) -> None:
        self.path = root / f".{command}.lock"
        self.command = command

    @rank_zero_only
    def take(self) -> None:
        """Take the lock until the process ends.

        Raises:
            ConfigurationError: If another process has it, saying which.
        """
        try:
            import fcntl
        except ImportError:
            return
        if str(self.path.resolve()) in HELD:  # closing a second descriptor of a file would give up the lock
            return
        descriptor = self._opened()
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(descriptor, 200).decode("utf-8", "replace").strip()
                os.close(descriptor)
                if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                    return
                raise ConfigurationError(
                    f"{self.path.parent} is in use: {printable(holder) or 'another process'} runs {self.command} "
                    "there; wait for it, or name another --trainer.default_root_dir"
                ) from error
            if self.path.exists() and os.path.samestat(os.fstat(descriptor), self.path.stat()):
                break
            os.close(descriptor)  # of a file that its holder has just removed
            descriptor = self._opened()
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        HELD[str(self.path.resolve())] = descriptor

    def _opened(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            return os.open(self.path, flags, 0o666)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write into {self.path.parent} ({error.strerror}); change trainer.default_root_dir"
            ) from error


HELD: dict[str, int] = {}
"""The descriptors of the locks that this process has, by their files."""


def give_up_locks() -> None:
    """Give up every lock that this process has, and remove their files."""
    while HELD:
        path, descriptor = HELD.popitem()
        Path(path).unlink(missing_ok=True)
        os.close(descriptor)


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
