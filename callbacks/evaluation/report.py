"""What an evaluation tells: lines for people, and a table for loggers."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from callbacks.evaluation.evaluate import Evaluation
from callbacks.evaluation.files import write
from callbacks.evaluation.metrics import Pair, cannot_tell
from callbacks.evaluation.result import EvaluationResult
from callbacks.logging.metrics_file import MetricsFile
from core.errors import ConfigurationError


def keep(trainer: Trainer, found: Evaluation, directory: Path) -> None:
    """Write the files of an evaluation, and log its pairs.

    Raises:
        ConfigurationError: If the files cannot be written outside a training; within one that is a warning.
    """
    try:
        write(directory, found.result, found.pairs)
    except OSError as error:
        told = f"{directory} has no files of this evaluation ({error.strerror}); make room there"
        if trainer.state.fn != "fit":
            raise ConfigurationError(told) from error
        rank_zero_warn(told)  # an epoch without its files must not end a training
    log_pairs(trainer.loggers, found.pairs)


def report(result: EvaluationResult, reasons: Sequence[str], directory: Path | None = None) -> None:
    """Print the headline, and what is wrong with it.

    Args:
        result: Of the evaluation.
        reasons: Why scores are missing, where some are.
        directory: With the files, to be named too.
    """
    low, high = result.win_rate_ci
    rank_zero_info(
        f"evaluation on {result.prompts} prompts: win rate {shown(result.win_rate)} "
        f"[{shown(low)}, {shown(high)}], {result.wins} wins, {result.ties} ties, "
        f"{result.losses} losses, {result.failed} failed; "
        f"reward {shown(result.average_reward)} against {shown(result.average_reference_reward)}, "
        f"length ratio {shown(result.length_ratio)}"
    )
    if unsure := cannot_tell(result):
        rank_zero_info(unsure)
    if not result.valid:
        rank_zero_warn(
            f"the evaluation is not valid: {result.failed} of {result.prompts} pairs have no score "
            f"({'; '.join(reasons) or 'the reward source gave none'}); what is scored is kept, so another one goes on "
            "from there"
        )
    if directory is not None:
        rank_zero_info(f"every figure is in {directory / 'metrics.json'}, every answer in {directory / 'pairs.jsonl'}")


def log_pairs(loggers: Sequence[Logger], pairs: Sequence[Pair]) -> None:
    """The pairs as a table, for the loggers that take one."""
    columns = list(Pair.__annotations__)
    rows = [[json.dumps(value) if isinstance(value, list) else value for value in pair] for pair in pairs]
    for logger in loggers:
        if hasattr(logger, "log_table") and not isinstance(logger, MetricsFile):
            logger.log_table("eval/pairs", columns=columns, data=rows)


def shown(value: float) -> str:
    """A number for people; a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:.3f}"
