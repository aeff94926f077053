"""Rows from a hub dataset, or from a local directory or file of parquet, JSONL, JSON or CSV."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Value, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetGenerationError

from core.errors import ConfigurationError

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
HELD_OUT_SHARE = 0.05


def load_rows(
    dataset_name: str, split: str, *, columns: Sequence[str], held_out: bool | None, option: str = "data.dataset_name"
) -> Dataset:
    """One split of a dataset, with its columns checked.

    Args:
        dataset_name: A hub id; or a directory with ``<split>.parquet``, ``<split>-*.parquet`` or the same as
            ``.jsonl``, ``.json`` or ``.csv``, at its top or under ``data/``; or one such file, of which 5 % can be
            held out.
        split: The split's name on the hub.
        columns: Columns that must be there.
        held_out: For a single file, whether the held-out rows are wanted, the others, or (None) all.
        option: The option to name in an error.

    Raises:
        ConfigurationError: If the dataset, the split or a column is missing, or a file cannot be read.
    """
    path = Path(dataset_name)
    if path.is_file():
        rows = _read_files([path], option=option)
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


def share(rows: Dataset, size: float, *, held_out: bool, seed: int = 0) -> Dataset:
    """The share of the rows that is held out, chosen at random, or the others."""
    return rows.train_test_split(test_size=size, seed=seed)["test" if held_out else "train"]


def split_names(dataset_name: str, *, option: str = "data.dataset_name") -> list[str]:
    """The splits of a dataset: of the hub, or of a directory by the names of its files; a file has none.

    Raises:
        ConfigurationError: If there is no such dataset.
    """
    path = Path(dataset_name)
    if path.is_file():
        return []
    if path.is_dir():
        files = [file for file in _data_files(path) if file.suffix in FORMATS]
        if not files:
            raise ConfigurationError(f"{path} has no files of {', '.join(FORMATS)}; change {option}")
        return sorted({SHARD.sub("", file.stem) for file in files})
    _check_hub_name(dataset_name, option=option)
    try:
        return [str(name) for name in get_dataset_split_names(dataset_name)]
    except (OSError, ValueError) as error:
        raise _hub_error(dataset_name, error, option=option) from error


SHARD = re.compile(r"-\d+(-of-\d+)?$")
"""What follows a split's name where it is in several files."""


def _data_files(directory: Path) -> list[Path]:
    """Of a directory and of ``data/`` in it."""
    folders = [folder for folder in (directory, directory / "data") if folder.is_dir()]
    return [file for folder in folders for file in sorted(folder.iterdir())]


def _split_files(directory: Path, split: str, *, option: str) -> list[Path]:
    files = [
        file
        for file in _data_files(directory)
        if file.suffix in FORMATS and (file.stem == split or file.stem.startswith(f"{split}-"))
    ]
    if not files:
        present = sorted(file.name for file in directory.rglob("*") if file.suffix in FORMATS)
        raise ConfigurationError(
            f"{directory} has no {split}.parquet or {split}.jsonl, only {present or 'no data files'}; change {option}"
        )
    return files


def _read_files(files: Sequence[Path], *, option: str) -> Dataset:
    file_format = FORMATS.get(files[0].suffix)
    if file_format is None:
        raise ConfigurationError(f"{files[0]} is none of {', '.join(FORMATS)}; change {option}")
    if not any(file.stat().st_size for file in files):
        raise ConfigurationError(f"{files[0]} is empty; change {option}")
    if file_format in ("json", "csv") and (told := next(filter(None, map(_not_text, files)), "")):
        raise ConfigurationError(f"{told}; change {option}")  # what reads the rows would fail later, and name no file
    try:
        table = {"features": _text_columns(files[0]), "keep_default_na": False} if file_format == "csv" else {}
        return load_dataset(file_format, data_files=[str(file) for file in files], split="train", **table)
    except DatasetGenerationError as error:
        for file in files if len(files) > 1 else ():
            _read_files([file], option=option)  # raises for the one that is broken
        raise ConfigurationError(f"{files[0]} cannot be read: {error.__cause__ or error}; change {option}") from error


def _text_columns(file: Path) -> Features:
    """The columns of a table of text, in which neither 007 is a number nor null is nothing."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return Features({name: Value("string") for name in next(csv.reader(lines), [])})


def _not_text(file: Path) -> str:
    """Which line of the file is not in UTF-8, and why; empty where all are."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number} of {file} is not in UTF-8 ({error.reason} at byte {error.start})"
    return ""


def _check_hub_name(dataset_name: str, *, option: str) -> None:
    if dataset_name.startswith((".", "/", "~")) or dataset_name.count("/") > 1:
        raise ConfigurationError(f"{dataset_name} does not exist; change {option}")


def _hub_error(dataset_name: str, error: Exception, *, option: str) -> ConfigurationError:
    first_line = str(error).strip().splitlines()[0]
    return ConfigurationError(f"cannot load {dataset_name!r} ({first_line}); change {option}")


def _read_hub(dataset_name: str, split: str, *, option: str) -> Dataset:
    _check_hub_name(dataset_name, option=option)
    try:
        rows = load_dataset(dataset_name, split=split)
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        raise _hub_error(dataset_name, error, option=option) from error
    if isinstance(rows, DatasetDict):
        raise ConfigurationError(f"{dataset_name} has several splits where {split} was asked for; change {option}")
    return rows
