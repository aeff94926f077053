"""What is left of a split once its rows are encoded: which were dropped and why, and which are held out elsewhere."""

import warnings
from collections import Counter
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info

from core.errors import ConfigurationError
from datamodules.encoding import KEY


class Kept(NamedTuple):
    """The rows that can be used, and how many could not, by the reason."""

    rows: Dataset
    dropped: Counter[str]


def kept(encoded: Dataset, *, title: str, max_length: int) -> Kept:
    """Leave out what was dropped, and say so.

    Args:
        encoded: Rows with the column ``dropped``.
        title: Of the dataset and its split.
        max_length: For the advice, in tokens.

    Raises:
        ConfigurationError: If nothing is left.
    """
    reasons = encoded["dropped"]
    left = [index for index, reason in enumerate(reasons) if not reason]
    dropped = Counter(reason for reason in reasons if reason)
    listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()))
    rows = encoded.select(left)
    ties = sum(rows["tied"]) if "tied" in rows.column_names else 0
    rank_zero_info(
        f"{title}: {len(left):,} of {len(reasons):,} rows kept"
        + (f", {ties:,} of them with tied scores" if ties else "")
        + (f" (dropped: {listed})" if listed else "")
    )
    if not left:
        raise ConfigurationError(
            f"no row of {title} can be used ({listed}); check data.dataset_name and data.max_length ({max_length})"
        )
    if dropped["too long"] > len(reasons) // 2:
        warnings.warn(f"more than half of {title} is longer than data.max_length={max_length}", stacklevel=2)
    return Kept(rows.remove_columns("dropped"), dropped)


def decontaminated(training: Dataset, held_out: Dataset, *, leave_out: bool, title: str) -> Dataset:
    """Count the training rows whose prompt is a held-out one too, and leave them out where that is asked for.

    Args:
        training: Encoded rows.
        held_out: Those of the validation.
        leave_out: Whether to.
        title: Of the dataset.

    Raises:
        ConfigurationError: If nothing would be left.
    """
    shared = np.isin(prompt_keys(training), prompt_keys(held_out))
    count = int(shared.sum())
    if not count:
        return training
    told = f"{title}: {count:,} of {len(training):,} training rows have a held-out prompt"
    if not leave_out:
        rank_zero_info(f"{told}; data.decontaminate leaves them out")
        return training
    rank_zero_info(f"{told} and are left out")
    if count == len(training):
        raise ConfigurationError(f"{told}, and none would be left; unset data.decontaminate, or change the splits")
    return training.select(np.flatnonzero(~shared))


def prompt_keys(rows: Dataset) -> np.ndarray:
    """What tells the prompt of each row apart."""
    keys: np.ndarray = rows.with_format("numpy", columns=[KEY])[:][KEY]
    return keys
