"""What libraries say that the user can do nothing about is kept to ourselves."""

import logging
import sys
import warnings

import datasets
import transformers

from core.text import shown


def without_escapes(record: logging.LogRecord) -> bool:
    """Have a line show what a terminal would act on, as names of models, judges and files may hold anything."""
    record.msg, record.args = shown(record.getMessage()), ()
    return True


class StandardError:
    """Standard error as it is when something is written, as a display puts itself in its place for a while."""

    def write(self, text: str) -> int:
        """Write to it."""
        return sys.stderr.write(text)

    def flush(self) -> None:
        """Flush it."""
        sys.stderr.flush()


NOISE = (
    *("litlogger", "TPU", "Tensor Cores", "CUDA_VISIBLE_DEVICES:", "estimate number", "LOAD REPORT"),
    *("`weights_only` was not set", "distributed_backend="),
)


def is_told(record: logging.LogRecord) -> bool:
    """Whether a line says anything that a user can make use of."""
    return not any(word in record.getMessage() for word in NOISE)


def quieten() -> None:
    """Keep to ourselves what libraries say that the user can do nothing about, and bars that are no bars in a log."""
    warnings.filterwarnings("ignore", message=".*treespec.*")  # Lightning and torch 2.13
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`")  # so it is meant
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")  # ours knows by ExactResume
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # of values that torchmetrics has gathered
    warnings.filterwarnings(
        "ignore", message="The ``compute`` method .* was called before"
    )  # of a process without rows
    warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(StandardError())
                handler.addFilter(is_told)
    told = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    told.addFilter(is_told)
    told.addFilter(without_escapes)
    logging.getLogger("transformers.modeling_utils").addFilter(is_told)  # of missing weights, which are our own errors
    logging.getLogger("lightning.fabric.utilities.distributed").addFilter(lambda record: record.levelno > logging.INFO)
    transformers.utils.logging.disable_progress_bar()  # of weights, which would be drawn into the run's own display
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
