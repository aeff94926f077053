"""The files of an evaluation, each there in full or not at all."""

import json
from collections.abc import Sequence
from pathlib import Path

from callbacks.evaluation.metrics import Pair
from callbacks.evaluation.result import EvaluationResult
from core.files import OWN, write_whole


def write(directory: Path, result: EvaluationResult, pairs: Sequence[Pair]) -> None:
    """``metrics.json`` and ``pairs.jsonl``; what has no value is null."""
    lines = [json.dumps(pair.record(), ensure_ascii=False, allow_nan=False) + "\n" for pair in pairs]
    write_whole(directory / "pairs.jsonl", "".join(lines), mode=OWN)
    text = json.dumps(result.record(), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(directory / "metrics.json", text + "\n")
