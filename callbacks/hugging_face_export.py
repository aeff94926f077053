"""Writes ``final/``: a Hugging Face model directory that plain transformers and vLLM load."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from callbacks.tracking import short_name
from datamodules.errors import ConfigurationError
from lightning_modules.base import FineTuningModule

CARD = """---
base_model: {base_model}
library_name: transformers
pipeline_tag: {pipeline_tag}
tags: [{method}, pytorch-lightning]
---

# {title}

{base_model} fine-tuned with {method_name} on {dataset}.

| | |
|---|---|
| optimiser steps | {steps} |
| epochs | {epochs} |
| learning rate | {learning_rate} |
| batch size per process | {batch_size} |
| processes | {world_size} |
| longest sequence (tokens) | {max_length} |
{metrics}
The chat template is part of the tokenizer; an assistant turn ends with `{end_token}`.
"""

TAKEN = {"", "..", "cache", "checkpoints", "eval", "wandb"}
"""Names in a run's folder, or that lead out of it, which an export must not replace."""
METHOD_NAMES = {
    "sft": "supervised fine-tuning",
    "reward": "a Bradley-Terry reward model's loss",
    "dpo": "direct preference optimisation",
    "rloo": "REINFORCE leave-one-out",
}


class HuggingFaceExport(Callback):
    """Exports the trained weights, tokenizer, chat template, generation config and model card when training ends.

    Args:
        directory: Where to, within the run's folder.

    Raises:
        ConfigurationError: If it is no plain name, as what is there is replaced.
    """

    def __init__(self, directory: str = "final") -> None:
        if Path(directory).name != directory or directory in TAKEN:
            raise ConfigurationError(f"export.directory must be a new name within the run's folder, got {directory!r}")
        self.directory = directory

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (
            not isinstance(pl_module, FineTuningModule)
            or getattr(trainer, "fast_dev_run", False)
            or trainer.interrupted
        ):
            return
        target = Path(trainer.default_root_dir) / self.directory
        if trainer.is_global_zero:
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            export(pl_module, partial)
            (partial / "README.md").write_text(model_card(trainer, pl_module), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            rank_zero_info(f"exported the model to {target}")
        trainer.strategy.barrier("export")


def export(module: FineTuningModule, directory: Path) -> None:
    """Save the model so that generation stops where a turn ends."""
    model: PreTrainedModel = module.model
    tokenizer: PreTrainedTokenizerBase = module.tokenizer
    stops = module.stop_token_ids()
    if module.can_generate:
        settings: dict[str, Any] = {"eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id, "do_sample": True}
        model.generation_config = GenerationConfig(**settings)
    model.config.eos_token_id = stops[0]
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def model_card(trainer: Trainer, module: FineTuningModule) -> str:
    """What was trained, on what and how, with the validation metrics of the last epoch."""
    data: Any = getattr(trainer, "datamodule", None)
    metrics = {
        name: value.item()
        for name, value in trainer.callback_metrics.items()
        if name.startswith(("val/", "eval/")) and value.numel() == 1
    }
    return CARD.format(
        base_model=module.model_name,
        pipeline_tag="text-generation" if module.can_generate else "text-classification",
        method=module.method,
        title=f"{short_name(module.model_name)} {module.method.upper()}",
        method_name=METHOD_NAMES[module.method],
        dataset=getattr(data, "dataset_name", "an unnamed dataset"),
        steps=trainer.global_step,
        epochs=trainer.current_epoch,
        learning_rate=module.learning_rate,
        batch_size=getattr(data, "batch_size", "unknown"),
        world_size=trainer.world_size,
        max_length=module.longest_sequence(data),
        metrics="".join(f"| {name} | {value:.4g} |\n" for name, value in sorted(metrics.items())),
        end_token=module.tokenizer.convert_ids_to_tokens(module.stop_token_ids()[0]),
    )
