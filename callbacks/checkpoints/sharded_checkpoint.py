"""Checkpoints that are directories: every process writes its part of each tensor, and reads what it needs.

The parts are torch's distributed checkpoint, of tensors alone. Beside them stands what is the same on all processes,
and a list of all files with their sizes and checksums, which is written last of all. Where machines have a disk each,
each has such a directory, with the parts of its own processes.
"""

import itertools
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from torch.distributed.tensor import DTensor
from typing_extensions import override

from callbacks.checkpoints.sharded_files import (
    CONTENT,
    FILES,
    INDEX,
    PARTIAL,
    checksum,
    files_of,
    make_empty,
    making_way,
    unusable_shards,
)
from core.errors import ConfigurationError, NotWrittenError
from core.files import sync_directory

WEIGHTS, GROUPS, TENSORS = "weights", "param_groups", "tensors"
"""Names of weights, the optimisers' options and tensors that are whole, within what is the same on all processes."""


def named_tensors(weights: Mapping[str, Tensor], states: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """All tensors of a checkpoint by one name each: weights by their own, and what optimisers keep of each weight."""
    found = {f"weights/{name}": tensor for name, tensor in weights.items()}
    for number, state in enumerate(states):
        for name, kept in state.items():
            found |= {f"optimizer {number}/{name}/{key}": t for key, t in kept.items() if isinstance(t, Tensor)}
    return found


def write_shards(
    tensors: Mapping[str, Tensor], content: Mapping[str, Any], target: Path, *, writes: bool | None = None
) -> None:
    """Save a checkpoint that is there in full or not at all; every process calls this at the same point.

    Args:
        tensors: By name; those that are no DTensors are the same on all processes.
        content: Plain values, the same on all.
        target: The directory.
        writes: Whether this process writes what is the same on all, as one on every disk does; the first of all by
            default.

    Raises:
        NotWrittenError: On every process, if any of them cannot write; the one before is untouched.
    """
    partial = target.with_name(target.name + PARTIAL)
    writes = dist.get_rank() == 0 if writes is None else writes
    parts = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    alike = {name: tensor.cpu() for name, tensor in tensors.items() if name not in parts}
    failure = told_by_any(lambda: make_empty(partial) if writes else None)
    if not failure:
        try:
            index = save(parts, storage_writer=Writer(partial))
        except CheckpointException as error:
            failure = disk_error(error)
    if not failure:
        failure = told_by_any(lambda: finish(partial, target, {**content, TENSORS: alike}, index) if writes else None)
    if failure:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
        raise NotWrittenError(
            f"cannot write the checkpoint {target} ({failure}); the one before it is untouched: "
            "make room there or change checkpoint.dirpath, then go on with --ckpt_path last"
        )


def told_by_any(work: Callable[[], None]) -> str:
    """Have every process do some work, and say on all of them why a disk did not let one; empty where it did."""
    told = ""
    try:
        with as_disk_errors():
            work()
    except OSError as error:
        told = error.strerror or str(error)
    every: list[Any] = [""] * dist.get_world_size()
    dist.all_gather_object(every, told)
    return next(filter(None, every), "")


class Writer(FileSystemWriter):
    """Torch's, which tells other processes of a full disk as of a disk and not as of what torch makes of it."""

    @override
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        with as_disk_errors():
            return super().write_data(plan, planner)

    @override
    def finish(self, metadata: Metadata, results: Any) -> None:
        # Before 2.12 torch writes a copy that has this, and gives the processes the one that lacks it.
        metadata.storage_data = {part.index: part.storage_data for parts in results for part in parts}
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


def finish(partial: Path, target: Path, content: Mapping[str, Any], index: Metadata) -> None:
    """Add what is the same on all processes and the list of files, and put the directory in its place."""
    with (partial / CONTENT).open("wb") as file:
        torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())
    if not (partial / INDEX).exists():  # which the first process has written, on its disk
        with (partial / INDEX).open("wb") as file:
            pickle.dump(index, file)
            file.flush()
            os.fsync(file.fileno())
    here = {path.name: [path.stat().st_size, checksum(path)] for path in sorted(partial.iterdir())}
    elsewhere = sorted(files_of(index) - set(here))
    with (partial / FILES).open("w", encoding="utf-8") as text:
        json.dump({"here": here, "elsewhere": elsewhere}, text)
        text.flush()
        os.fsync(text.fileno())
    sync_directory(partial)
    with making_way(target):
        if target.is_symlink() or target.is_file():
            target.unlink()
        partial.rename(target)
        sync_directory(target.parent)


def read_shards(source: Path, tensors: Mapping[str, Tensor], *, alone: bool = False) -> dict[str, Any]:
    """Fill tensors in place with what a checkpoint has of them, on any number of processes.

    Args:
        source: The directory.
        tensors: By the names that they were saved under; each process gets its own part.
        alone: Whether other processes have nothing to do with it.

    Returns:
        What is the same on all processes.

    Raises:
        ConfigurationError: If the checkpoint cannot be used, or is of other tensors.
    """
    if reason := unusable_shards(source):
        raise ConfigurationError(f"the checkpoint {source} cannot be used: {reason}; name another with --ckpt_path")
    content: dict[str, Any] = torch.load(source / CONTENT, map_location="cpu", weights_only=True)
    alike = content.pop(TENSORS)
    parts = {name: tensor for name, tensor in tensors.items() if name not in alike}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(parts, storage_reader=FileSystemReader(source), no_dist=alone)
        for name in tensors.keys() - parts.keys():
            tensors[name].copy_(alike[name])
    except (CheckpointException, RuntimeError) as error:
        failures = error.failures if isinstance(error, CheckpointException) else {0: (error, None)}
        cause = next(iter(failures.values()))[0]
        if isinstance(cause, FileNotFoundError):
            raise ConfigurationError(
                f"{cause.filename} is on another machine's disk; go on with as many processes as before, or copy "
                f"{source.name} of all machines into one"
            ) from error
        raise ConfigurationError(
            f"the checkpoint {source} is of another model ({str(cause).splitlines()[0]}); change --ckpt_path or "
            "--model.model_name"
        ) from error
    return content


def read_together(source: Path) -> dict[str, Any]:
    """A checkpoint that is usable, as the file of one process would hold it: all tensors whole, on the CPU."""
    alike = torch.load(source / CONTENT, map_location="cpu", weights_only=True)[TENSORS]
    tensors = {name: torch.empty_like(tensor) for name, tensor in alike.items()}
    for name, entry in FileSystemReader(source).read_metadata().state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    content = read_shards(source, tensors, alone=True)
    content["state_dict"] = {n.removeprefix("weights/"): t for n, t in tensors.items() if n.startswith("weights/")}
    content["optimizer_states"] = [
        {"state": state_by_number(tensors, f"optimizer {number}/", groups), "param_groups": numbered(groups)}
        for number, groups in enumerate(content[GROUPS])
    ]
    return content


def state_by_number(tensors: Mapping[str, Tensor], prefix: str, groups: Sequence[Any]) -> dict[int, dict[str, Tensor]]:
    """What an optimiser keeps, by the numbers that it has for weights in the place of their names."""
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for place, tensor in tensors.items():
        if place.startswith(prefix):
            name, key = place.removeprefix(prefix).rsplit("/", 1)
            state.setdefault(numbers[name], {})[key] = tensor
    return state


def numbered(groups: Sequence[Any]) -> list[dict[str, Any]]:
    """An optimiser's groups with numbers for the names of weights."""
    numbers = itertools.count()
    return [{**group, "params": [next(numbers) for _ in group["params"]]} for group in groups]
