"""Checkpoints that are directories: every process writes its part of each tensor, and reads what it needs.

The parts are torch's distributed checkpoint, of tensors alone. Beside them stands what is the same on all processes,
and a list of all files with their sizes and checksums, which is written last of all.
"""

import json
import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from typing_extensions import override

from core.errors import ConfigurationError, NotWrittenError
from core.files import sync_directory

PARTIAL = ".partial"
REPLACED = ".replaced"
"""What the one before is called while its place is taken."""
CONTENT = "meta.pt"
"""What is the same on all processes, as plain values; Lightning's name for it."""
INDEX = ".metadata"
"""Which part of which tensor is where; torch's name for it."""
FILES = "files.json"
WEIGHTS, GROUPS = "weights", "param_groups"
"""Names of the weights, and the optimisers' options, within what is the same on all processes."""
BLOCK = 1 << 22


def write_shards(tensors: Mapping[str, Any], content: Mapping[str, Any], target: Path) -> None:
    """Save a checkpoint that is there in full or not at all; every process calls this at the same point.

    Args:
        tensors: Nested, of tensors of which each process has a part, or that are the same on all.
        content: Plain values, the same on all.
        target: The directory.

    Raises:
        NotWrittenError: On every process, if any of them cannot write; the one before is untouched.
    """
    partial = target.with_name(target.name + PARTIAL)
    first = dist.get_rank() == 0
    failure = ""
    try:
        failure = told_by_first(lambda: make_empty(partial))
        if not failure:
            try:
                save(dict(tensors), storage_writer=Writer(partial))
            except CheckpointException as error:
                failure = disk_error(error)
        if not failure:
            failure = told_by_first(lambda: finish(partial, target, content))
    finally:
        if failure and first:
            shutil.rmtree(partial, ignore_errors=True)
    if failure:
        raise NotWrittenError(
            f"cannot write the checkpoint {target} ({failure}); the one before it is untouched: "
            "make room there or change checkpoint.dirpath, then go on with --ckpt_path last"
        )


def told_by_first(work: Any) -> str:
    """Have the first process do some work, and say on all of them why the disk did not let it; empty where it did."""
    told = [""]
    if dist.get_rank() == 0:
        try:
            work()
        except OSError as error:
            told = [error.strerror or str(error)]
    dist.broadcast_object_list(told)
    return told[0]


class Writer(FileSystemWriter):
    """Torch's, which tells other processes of a full disk as of a disk and not as of what torch makes of it."""

    @override
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        with as_disk_errors():
            return super().write_data(plan, planner)

    @override
    def finish(self, metadata: Metadata, results: Any) -> None:
        with as_disk_errors():
            super().finish(metadata, results)


@contextmanager
def as_disk_errors() -> Iterator[None]:
    """Raise what a disk said in the place of what was made of it."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror) from error


def disk_error(error: CheckpointException) -> str:
    """What a disk said to the first of the processes that could not write.

    Raises:
        CheckpointException: If it was not a disk.
    """
    for failure, _ in error.failures.values():
        if isinstance(failure, OSError):
            return failure.strerror or str(failure)
    raise error


def make_empty(directory: Path) -> None:
    """Make a directory in the place of what a kill left there."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()


def finish(partial: Path, target: Path, content: Mapping[str, Any]) -> None:
    """Add what is the same on all processes and the list of files, and put the directory in its place."""
    with (partial / CONTENT).open("wb") as file:
        torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())
    listed = {path.name: [path.stat().st_size, checksum(path)] for path in sorted(partial.iterdir())}
    with (partial / FILES).open("w", encoding="utf-8") as text:
        json.dump(listed, text)
        text.flush()
        os.fsync(text.fileno())
    sync_directory(partial)
    with making_way(target):
        if target.is_symlink() or target.is_file():
            target.unlink()
        partial.rename(target)
        sync_directory(target.parent)


@contextmanager
def making_way(target: Path) -> Iterator[None]:
    """Have a directory out of the way meanwhile, where resuming finds it if this is the last that the process does."""
    replaced = target.with_name(target.name + REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.is_dir() and not target.is_symlink():
        target.rename(replaced)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def read_shards(source: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Fill tensors in place with what a checkpoint has of them, on any number of processes.

    Args:
        source: The directory.
        tensors: Nested as they were saved; each process gets its own part.

    Returns:
        What is the same on all processes.

    Raises:
        ConfigurationError: If the checkpoint cannot be used, or is of other tensors.
    """
    if reason := unusable_shards(source):
        raise ConfigurationError(f"the checkpoint {source} cannot be used: {reason}; name another with --ckpt_path")
    try:
        load(tensors, storage_reader=FileSystemReader(source))
    except CheckpointException as error:
        told = next(iter(error.failures.values()))[0]
        raise ConfigurationError(
            f"the checkpoint {source} is of another model ({str(told).splitlines()[0]}); change --ckpt_path or "
            "--model.model_name"
        ) from error
    content: dict[str, Any] = torch.load(source / CONTENT, map_location="cpu", weights_only=True)
    return content


def read_together(source: Path) -> dict[str, Any]:
    """A checkpoint that is usable, as the file of one process would hold it: all tensors whole, on the CPU."""
    metadata = FileSystemReader(source).read_metadata()
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what is meant
        load(tensors, storage_reader=FileSystemReader(source), no_dist=True)
    content: dict[str, Any] = torch.load(source / CONTENT, map_location="cpu", weights_only=True)
    found: dict[tuple[Any, ...], Tensor] = {metadata.planner_data[name]: value for name, value in tensors.items()}
    content["state_dict"] = {path[1]: value for path, value in found.items() if path[0] == "state_dict"}
    content["optimizer_states"] = []
    for number, groups in enumerate(content[GROUPS]):
        names = [name for group in groups for name in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for path, value in found.items():
            if path[:2] == ("optimizers", number):
                state.setdefault(names.index(path[2]), {})[path[3]] = value
        places = iter(range(len(names)))
        numbered = [{**group, "params": [next(places) for _ in group["params"]]} for group in groups]
        content["optimizer_states"].append({"state": state, "param_groups": numbered})
    return content


def unusable_shards(directory: Path) -> str:
    """Why a sharded checkpoint cannot be used; empty where it can.

    Its index is a pickle, which torch reads without a check of its own, as it does what the index calls bytes.
    """
    damaged = "it is not whole, or holds something else than tensors and plain values"
    try:
        with (directory / INDEX).open("rb") as file:
            index = IndexUnpickler(file).load()
        torch.load(directory / CONTENT, map_location="cpu", weights_only=True)
        if not all(isinstance(entry, TensorStorageMetadata) for entry in index.state_dict_metadata.values()):
            return damaged
        listed = json.loads((directory / FILES).read_text("utf-8"))
        for name, (size, crc) in listed.items():
            path = directory / name
            if path.name != name or path.stat().st_size != size or checksum(path) != crc:
                return f"{name} in it is damaged"
        named = {storage.relative_path for storage in index.storage_data.values()} | {INDEX, CONTENT}
    except Exception:  # whatever a hostile or foreign file can raise
        return damaged
    return "" if named <= set(listed) else damaged


class IndexUnpickler(pickle.Unpickler):
    """Builds what the index of a sharded checkpoint consists of, and nothing else."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module.split(".")[0] in ("torch", "pathlib") else None
        is_record = module.startswith("torch.distributed.checkpoint.") and isinstance(found, type)
        is_plain = isinstance(found, torch.dtype) or name in ("Size", "_get_layout", "PosixPath")
        if "." in name or not (is_record or is_plain):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an index")
        return found
