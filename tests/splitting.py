"""The gradients of a run's optimiser steps, under one way of splitting its rows into batches, ranks and layouts.

python -m tests.splitting FOLDER --ranks 2 [--sharded] [--losses]

Weights stay as they are, so that steps compare, but with ``--losses``. Samples of RLOO depend on their prompt alone.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from cli import main as cli_main
from datamodules.batches import TokenBatch
from datamodules.messages import Message
from lightning_modules.generation.rollouts import seeds_of
from lightning_modules.generation.sampler import Samples, sample_completions
from lightning_modules.models.loading import load_reward_model
from lightning_modules.models.parts import whole
from lightning_modules.optimiser_step import OptimiserStep
from tests.conftest import make_tiny_model
from tests.forked import ended, start
from tests.kills import METHODS, SHARDED, talk

ROWS = 8
BREVITY = "lightning_modules.rewards.rules.brevity"


def make_material(directory: Path, *, rows: int = ROWS) -> None:
    """Rows of unequal lengths, a policy, and a reference that differs from it."""
    make_tiny_model(directory / "model")
    make_tiny_model(directory / "reference", rms_norm_eps=0.1)
    for split in ("train_prefs", "test_prefs"):
        lines = []
        for i in range(rows):
            prompt = f"question {i} " + "and so on " * (i % 3)
            chosen, rejected = "yes " * (1 + i % 4), "no" * (1 + (5 * i) % 7)
            lines.append({"prompt": prompt, "chosen": talk(prompt, chosen), "rejected": talk(prompt, rejected)})
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def command(
    material: Path,
    run: Path,
    method: str,
    *,
    ranks: int = 1,
    accumulate: int = 1,
    sharded: bool = False,
    moves: bool = False,
    **data: Any,
) -> list[str]:
    """A fit of one epoch, or of ten where the weights are to move.

    Args:
        material: Of :func:`make_material`.
        run: The run's folder.
        method: The module's name.
        ranks: Processes.
        accumulate: Batches of an optimiser step.
        sharded: Whether the ranks share one model, and not only its gradients.
        moves: Whether to learn anything.
        data: Options of the data module.
    """
    model: dict[str, Any] = {"model_name": str(material / "model"), "learning_rate": 1e-3 if moves else 1e-30}
    if method == "RLOOModule":
        model |= {"reward": BREVITY, "max_completion_length": 6, "samples_per_prompt": 3}
    if method in ("RLOOModule", "DPOModule"):
        model |= {"reference_model": str(material / "reference"), "beta": 0.5}
    task = {"SFTModule": "conversations", "RLOOModule": "prompts"}.get(method, "preferences")
    content = {
        "export": {},
        "trainer": {
            "default_root_dir": str(run),
            "accelerator": "cpu",
            "devices": ranks,
            **({"strategy": SHARDED if sharded else "ddp"} if ranks > 1 or sharded else {}),
            "max_epochs": 10 if moves else 1,
            "gradient_clip_val": 0.1 if moves else None,
            "limit_val_batches": 0,
            "accumulate_grad_batches": accumulate,
            "enable_model_summary": False,
            "enable_progress_bar": False,
        },
        "model": {"class_path": f"lightning_modules.{method}", "init_args": model},
        "data": {
            "class_path": "datamodules.UltraFeedbackDataModule",
            "init_args": {"dataset_name": str(material), "task": task, "max_length": 128, **data},
        },
        "evaluation": {"num_prompts": 0},
        "checkpoint": {"monitor": None, "save_last": False, "save_top_k": 0},
    }
    file = run.parent / f"{run.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content))
    return ["fit", "--config", str(file)]


def some_scores(prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
    """Whole numbers that completions decide; none for a prompt, and for some samples of others."""
    scores = [sum(map(ord, text)) % 7 for text in completions]
    unscored = [
        "question 3" in prompt[-1]["content"] or score == 6 for prompt, score in zip(prompts, scores, strict=True)
    ]
    return [math.nan if missing else float(score) for missing, score in zip(unscored, scores, strict=True)]


def sampled(
    model: PreTrainedModel,
    prompt_ids: Sequence[Tensor],
    *,
    seeds: Sequence[int],
    samples_per_prompt: int,
    **options: Any,
) -> Samples:
    """Samples as they are for a prompt, whichever batch and process it is in."""
    own = [seed for ids in prompt_ids for seed in seeds_of(ids.tolist(), count=samples_per_prompt)]
    samples: Samples = sample_completions(
        model, prompt_ids, seeds=own, samples_per_prompt=samples_per_prompt, **options
    )
    return samples


def with_head(*args: Any, **options: Any) -> PreTrainedModel:
    """A reward model whose head is not zero, as it is at first, so that the body has a gradient."""
    model = load_reward_model(*args, **options)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr, arg-type]
    return model


def left_padded(
    sequences: Sequence[Sequence[int]], completion_masks: Sequence[Sequence[bool]], *, pad_token_id: int
) -> TokenBatch:
    """What ``datamodules.batches.pad`` makes, padded on the other side."""
    width = max(map(len, sequences))
    shape = len(sequences), width
    batch = TokenBatch(torch.full(shape, pad_token_id), *torch.zeros(2, *shape, dtype=torch.bool))
    for row, (ids, mask) in enumerate(zip(sequences, completion_masks, strict=True)):
        first = width - len(ids)
        batch.input_ids[row, first:] = torch.tensor(ids)
        batch.attention_mask[row, first:] = True
        batch.completion_mask[row, first : first + len(mask)] = torch.tensor(mask)
    return batch


@contextmanager
def comparable() -> Iterator[None]:
    """Let nothing but a row decide what is done with it."""
    with (
        mock.patch("lightning_modules.rloo.sample_completions", sampled),
        mock.patch("lightning_modules.reward.load_reward_model", with_head),
        mock.patch(BREVITY, some_scores),
    ):
        yield


def gradients(arguments: Sequence[str]) -> list[Tensor]:
    """The gradient of each optimiser step of a command, as one vector."""
    found: list[Tensor] = []

    def keep(optimizer: Optimizer, *_: Any) -> None:
        parts = [whole(p.grad).flatten() for group in optimizer.param_groups for p in group["params"]]
        found.append(torch.cat(parts).clone())

    handle = register_optimizer_step_post_hook(keep)
    try:
        with comparable():
            assert cli_main(list(arguments)) == 0
    finally:
        handle.remove()
    return found


def losses(arguments: Sequence[str]) -> list[Tensor]:
    """The loss of each optimiser step of a command: the mean over all that is in it, on all ranks."""
    found: list[Tensor] = []
    original = OptimiserStep.finish

    def finish(step: OptimiserStep, *parameters: Any, over_ranks: Callable[[Tensor], Tensor], **options: Any) -> Any:
        count, total = over_ranks(step.count_and_loss.clone()).unbind()
        found.append(total / count)
        return original(step, *parameters, over_ranks=over_ranks, **options)

    with comparable(), mock.patch.object(OptimiserStep, "finish", finish):
        assert cli_main(list(arguments)) == 0
    return found


def main() -> int:
    """Save the gradients, or losses, of every method on several ranks, four rows in all to a batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the material; what is found of METHOD goes to METHOD.pt there")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sharded", action="store_true", help="have the ranks share the weights too")
    parser.add_argument("--losses", action="store_true", help="save the losses of ten steps that learn")
    options = parser.parse_args()
    look = losses if options.losses else gradients
    for method in METHODS:
        run = options.folder / f"{method}-{'shards' if options.sharded else 'ranks'}"
        split = {"ranks": options.ranks, "sharded": options.sharded, "batch_size": ROWS // options.ranks // 2}
        arguments = command(options.folder, run, method, accumulate=2, moves=options.losses, **split)

        def save(method: str = method, arguments: Sequence[str] = tuple(arguments)) -> int:
            found = look(arguments)
            if torch.distributed.get_rank() == 0:
                torch.save(found, options.folder / f"{method}.pt")
            return 0

        codes = ended(start(save, ranks=options.ranks, log=options.folder / "log.txt"))
        if any(code != 0 for code in codes):
            print((options.folder / "log.txt").read_text()[-3000:])
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
