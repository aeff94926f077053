"""Rows from a hub dataset, or from a local directory or file of parquet, JSONL, JSON, CSV or Arrow."""

import bz2
import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Value, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetGenerationError

from core.errors import ConfigurationError

FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}
COMPRESSED: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
HELD_OUT_SHARE = 0.05


def load_rows(
    dataset_name: str, split: str, *, columns: Sequence[str], held_out: bool | None, option: str = "data.dataset_name"
) -> Dataset:
    """One split of a dataset, with its columns checked.

    Args:
        dataset_name: A hub id, with ``:`` and the subset's name where the dataset has several; or a directory with
            ``<split>.parquet``, ``<split>-*.parquet`` or the same of another of ``FORMATS``, plain or compressed, at
            its top or under ``data/``; or one such file, of which 5 % can be held out. A dataset that was saved with
            ``save_to_disk`` is like a file, several like a directory.
        split: The split's name on the hub.
        columns: Columns that must be there.
        held_out: For a single file, whether the held-out rows are wanted, the others, or (None) all.
        option: The option to name in an error.

    Raises:
        ConfigurationError: If the dataset, the split or a column is missing, or a file cannot be read.
    """
    path = Path(dataset_name)
    if path.is_file() or _saved_files(path):
        rows = _read_files(_saved_files(path) or [path], option=option)
        if held_out is not None and len(rows) > 1:
            rows = share(rows, HELD_OUT_SHARE, held_out=held_out)
    elif path.is_dir():
        rows = _read_files(_split_files(path, split, option=option), option=option)
    else:
        rows = _read_hub(dataset_name, split, option=option)
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ConfigurationError(
            f"{dataset_name} lacks the columns {missing}, it has {rows.column_names}; choose another {option}"
        )
    if len(rows) == 0:
        raise ConfigurationError(f"{dataset_name} has no rows in {split}; choose another {option}")
    return rows


def renamed(rows: Dataset, columns: Mapping[str, str]) -> Dataset:
    """The rows with columns by other names, ``{ours: theirs}``; a column that had one of ours before gives way."""
    taken = [name for name in columns if name in rows.column_names and name not in columns.values()]
    return rows.remove_columns(taken).rename_columns({theirs: ours for ours, theirs in columns.items()})


def share(rows: Dataset, size: float, *, held_out: bool, seed: int = 0) -> Dataset:
    """The share of the rows that is held out, chosen at random, or the others."""
    return rows.train_test_split(test_size=size, seed=seed)["test" if held_out else "train"]


def split_names(dataset_name: str, *, option: str = "data.dataset_name") -> list[str]:
    """The splits of a dataset: of the hub, or of a directory by the names of its files; a single one has none.

    Raises:
        ConfigurationError: If there is no such dataset.
    """
    path = Path(dataset_name)
    if path.is_file() or _saved_files(path):
        return []
    if path.is_dir():
        saved = [folder.name for folder in path.iterdir() if _saved_files(folder)]
        files = [file for file in _data_files(path) if plain_name(file).suffix in FORMATS]
        if not (saved or files):
            raise ConfigurationError(f"{path} has no files of {', '.join(FORMATS)}; change {option}")
        return sorted(saved) or sorted({SHARD.sub("", plain_name(file).stem) for file in files})
    try:
        return [str(name) for name in get_dataset_split_names(*_hub_name(dataset_name, option=option))]
    except (OSError, ValueError) as error:
        raise _hub_error(dataset_name, error, option=option) from error


SHARD = re.compile(r"-\d+(-of-\d+)?$")
"""What follows a split's name where it is in several files."""


def _data_files(directory: Path) -> list[Path]:
    """Of a directory and of ``data/`` in it."""
    folders = [folder for folder in (directory, directory / "data") if folder.is_dir()]
    return [file for folder in folders for file in sorted(folder.iterdir())]


def plain_name(file: Path) -> Path:
    """A file's name without what says that it is compressed."""
    return Path(file.stem if file.suffix in COMPRESSED else file.name)


def _saved_files(directory: Path) -> list[Path]:
    """The files of a dataset that was saved with ``save_to_disk``; of any other directory none."""
    state = directory / "state.json"
    try:
        files = json.loads(state.read_text("utf-8"))["_data_files"] if state.is_file() else []
        return [directory / Path(file["filename"]).name for file in files]
    except (ValueError, KeyError, TypeError):  # another's state.json
        return []


def _split_files(directory: Path, split: str, *, option: str) -> list[Path]:
    files = _saved_files(directory / split)
    for file in _data_files(directory):
        name = plain_name(file)
        if name.suffix in FORMATS and (name.stem == split or name.stem.startswith(f"{split}-")):
            files.append(file)
    if not files:
        present = sorted(file.name for file in directory.rglob("*") if plain_name(file).suffix in FORMATS)
        raise ConfigurationError(
            f"{directory} has no {split}.parquet or {split}.jsonl, only {present or 'no data files'}; change {option}"
        )
    return files


def _read_files(files: Sequence[Path], *, option: str) -> Dataset:
    suffix = plain_name(files[0]).suffix
    file_format = FORMATS.get(suffix)
    if file_format is None:
        known = f"{', '.join(FORMATS)}, plain or with {', '.join(COMPRESSED)}"
        raise ConfigurationError(f"{files[0]} is none of {known}; change {option}")
    try:
        if not any(file.stat().st_size for file in files):
            raise ConfigurationError(f"{files[0]} is empty; change {option}")
        # What reads the rows would fail later, and name no file.
        if file_format in ("json", "csv") and (told := next(filter(None, map(_not_text, files)), "")):
            raise ConfigurationError(f"{told}; change {option}")
        table: dict[str, Any] = {}
        if file_format == "csv":
            separator = "\t" if suffix == ".tsv" else ","
            columns = _text_columns(files[0], separator)
            table = {"features": columns, "keep_default_na": False, "sep": separator}
        return load_dataset(file_format, data_files=[str(file) for file in files], split="train", **table)
    except (DatasetGenerationError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        for file in files if len(files) > 1 else ():
            _read_files([file], option=option)  # raises for the one that is broken
        raise ConfigurationError(f"{files[0]} cannot be read: {error.__cause__ or error}; change {option}") from error


def _opened(file: Path, mode: str, **how: Any) -> Any:
    """The file, decompressed where it is compressed."""
    return COMPRESSED.get(file.suffix, open)(file, mode, **how)


def _text_columns(file: Path, separator: str) -> Features:
    """The columns of a table of text, in which neither 007 is a number nor null is nothing."""
    with _opened(file, "rt", encoding="utf-8-sig", newline="") as lines:
        return Features({name: Value("string") for name in next(csv.reader(lines, delimiter=separator), [])})


def _not_text(file: Path) -> str:
    """Which line of the file is not in UTF-8, and why; empty where all are."""
    with _opened(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number} of {file} is not in UTF-8 ({error.reason} at byte {error.start})"
    return ""


def _hub_name(dataset_name: str, *, option: str) -> tuple[str, str | None]:
    """The hub id, and the subset where one is named."""
    if dataset_name.startswith((".", "/", "~")) or dataset_name.count("/") > 1:
        raise ConfigurationError(f"{dataset_name} does not exist; change {option}")
    name, _, subset = dataset_name.partition(":")
    return name, subset or None


def _hub_error(dataset_name: str, error: Exception, *, option: str) -> ConfigurationError:
    if subsets := re.search(r"(?s)available configs: (\[.*?\])", str(error)):
        name = dataset_name.partition(":")[0]
        return ConfigurationError(f"{name} has the subsets {subsets[1]}; name one in {option}: {name}:SUBSET")
    first_line = str(error).strip().splitlines()[0]
    return ConfigurationError(f"cannot load {dataset_name!r} ({first_line}); change {option}")


def _read_hub(dataset_name: str, split: str, *, option: str) -> Dataset:
    try:
        rows = load_dataset(*_hub_name(dataset_name, option=option), split=split)
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        raise _hub_error(dataset_name, error, option=option) from error
    if isinstance(rows, DatasetDict):
        raise ConfigurationError(f"{dataset_name} has several splits where {split} was asked for; change {option}")
    return rows
