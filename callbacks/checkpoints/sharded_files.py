"""The files of a sharded checkpoint: their names, how they get their place, and whether they can be used."""

import json
import pickle
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from typing_extensions import override

PARTIAL = ".partial"
REPLACED = ".replaced"
"""What the one before is called while its place is taken."""
CONTENT = "meta.pt"
"""What is the same on all processes, as plain values; Lightning's name for it."""
INDEX = ".metadata"
"""Which part of which tensor is where; torch's name for it."""
FILES = "files.json"
BLOCK = 1 << 22


def make_empty(directory: Path) -> None:
    """Make a directory in the place of what a kill left there."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()


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


def files_of(index: Metadata) -> set[str]:
    """The names of the files with parts."""
    return {storage.relative_path for storage in index.storage_data.values()}


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
        for name, (size, crc) in listed["here"].items():
            path = directory / name
            if path.name != name or path.stat().st_size != size or checksum(path) != crc:
                return f"{name} in it is damaged"
        whole = files_of(index) | {INDEX, CONTENT} <= {*listed["here"], *listed["elsewhere"]}
    except Exception:  # whatever a hostile or foreign file can raise
        return damaged
    return "" if whole else damaged


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
