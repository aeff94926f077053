"""Rows from a hub dataset, or from a local directory or file of parquet or JSONL in the same columns."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from core.errors import ConfigurationError

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
HELD_OUT_SHARE = 0.05


def load_rows(
    dataset_name: str, split: str, *, columns: Sequence[str], held_out: bool | None, option: str = "data.dataset_name"
) -> Dataset:
    """One split of a dataset, with its columns checked.

    Args:
        dataset_name: A hub id; or a directory with ``<split>.parquet``, ``<split>-*.parquet`` or the same as
            ``.jsonl``, at its top or under ``data/``; or one such file, of which 5 % can be held out.
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
            rows = rows.train_test_split(test_size=HELD_OUT_SHARE, seed=0)["test" if held_out else "train"]
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


def _split_files(directory: Path, split: str, *, option: str) -> list[Path]:
    files = [
        file
        for folder in (directory, directory / "data")
        for file in sorted(folder.iterdir() if folder.is_dir() else ())
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
        raise ConfigurationError(f"{files[0]} is neither .parquet nor .jsonl; change {option}")
    if not any(file.stat().st_size for file in files):
        raise ConfigurationError(f"{files[0]} is empty; change {option}")
    if file_format == "json" and (told := next(filter(None, map(_not_text, files)), "")):
        raise ConfigurationError(f"{told}; change {option}")  # what reads the rows would fail later, and name no file
    try:
        return load_dataset(file_format, data_files=[str(file) for file in files], split="train")
    except DatasetGenerationError as error:
        for file in files if len(files) > 1 else ():
            _read_files([file], option=option)  # raises for the one that is broken
        raise ConfigurationError(f"{files[0]} cannot be read: {error.__cause__ or error}; change {option}") from error


def _not_text(file: Path) -> str:
    """Which line of the file is not in UTF-8, and why; empty where all are."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number} of {file} is not in UTF-8 ({error.reason} at byte {error.start})"
    return ""


def _read_hub(dataset_name: str, split: str, *, option: str) -> Dataset:
    if dataset_name.startswith((".", "/", "~")) or dataset_name.count("/") > 1:
        raise ConfigurationError(f"{dataset_name} does not exist; change {option}")
    try:
        rows = load_dataset(dataset_name, split=split)
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        first_line = str(error).strip().splitlines()[0]
        raise ConfigurationError(f"cannot load {dataset_name!r} ({first_line}); change {option}") from error
    if isinstance(rows, DatasetDict):
        raise ConfigurationError(f"{dataset_name} has several splits where {split} was asked for; change {option}")
    return rows
