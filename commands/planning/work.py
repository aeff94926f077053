"""How much a run does: steps, tokens, calls of the judge, disk."""

import math
from typing import Any, NamedTuple

from commands.planning.batch import Largest
from commands.planning.memory import Account
from datamodules.base import ChatDataModule
from datamodules.mixture import MixtureDataModule
from lightning_modules.rewards.http import HTTPReward
from lightning_modules.rewards.preflight import remote_parts
from lightning_modules.rloo import RLOOModule

TRAINERS_EPOCHS = 1_000
"""Lightning's, where neither epochs nor steps are given."""


class Work(NamedTuple):
    """What a run does, in whole numbers."""

    rows: int
    """Of an epoch, those that can be used."""
    epochs: int
    steps: int
    tokens: int
    evaluations: int
    calls: int
    minutes: float
    """That the judge's rate alone takes."""


def work(data: ChatDataModule, module: Any, trainer: Any, evaluation: Any, batch: Largest, processes: int) -> Work:
    """Count from the rows, the batch and the trainer's options.

    Args:
        data: The run's.
        module: The run's.
        trainer: The trainer's options.
        evaluation: The evaluation callback; None where there is none.
        batch: The largest one.
        processes: Of all machines.
    """
    rows = usable_rows(data, batch)
    per_process = math.ceil(rows / processes)
    if data.tokens_per_batch is not None:
        batches = math.ceil(per_process * batch.mean_tokens / data.tokens_per_batch)
    else:
        batches = math.ceil(per_process / data.batch_size)
    limit = trainer.limit_train_batches
    if limit is not None:
        batches = min(batches, int(limit)) if isinstance(limit, int) or limit > 1 else max(1, int(batches * limit))
    per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    epochs = trainer.max_epochs if trainer.max_epochs is not None else TRAINERS_EPOCHS
    steps = per_epoch * epochs if epochs != -1 else 0
    if trainer.max_steps != -1:
        steps = min(steps, trainer.max_steps) if steps else trainer.max_steps
        epochs = math.ceil(steps / per_epoch)
    share = min(1.0, steps / (per_epoch * epochs)) if epochs > 0 else 1.0
    samples = module.samples_per_prompt if isinstance(module, RLOOModule) else 1
    seen = min(rows, batches * processes * (data.batch_size if data.tokens_per_batch is None else rows))
    tokens = round(seen * samples * epochs * share * batch.mean_tokens)
    evaluations, calls, minutes = judging(evaluation, module, epochs)
    return Work(seen, epochs, steps, tokens, evaluations, calls, minutes)


def usable_rows(data: ChatDataModule, batch: Largest) -> int:
    """Rows of an epoch, by the share of the first ones that can be used."""
    sizes = {}
    for name, part in data.datasets().items():
        rows = len(part.load(part.train_split))
        sizes[name] = max(1, round(min(rows, part.max_samples or rows) * batch.usable[name]))
    return sum(data.counts(sizes).values()) if isinstance(data, MixtureDataModule) else sizes[""]


def judging(evaluation: Any, module: Any, epochs: int) -> tuple[int, int, float]:
    """Evaluations, their calls of a judge behind HTTP, and the minutes that its rate takes for them."""
    if evaluation is None or not module.can_generate or not evaluation.num_prompts:
        return 0, 0, 0.0
    evaluations = max(1, math.ceil(epochs / evaluation.every_n_epochs))
    remote: list[HTTPReward] = list(remote_parts(evaluation.reward))
    if not remote:
        return evaluations, 0, 0.0
    calls = evaluation.num_prompts * (evaluations + 1)
    rate = min((source.requests_per_minute for source in remote if source.requests_per_minute), default=0)
    return evaluations, calls, calls / rate if rate else 0.0


def disk_bytes(account: Account) -> dict[str, int]:
    """What a run leaves: the last checkpoint and the best, and the model."""
    module = account.module
    trained = account.trained.all * account.weight_bytes + account.optimiser.all
    model = account.traced.parameters.all * module.base_dtype.itemsize
    return {"checkpoints": 2 * trained, "model": model}
