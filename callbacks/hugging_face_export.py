"""Writes ``final/``: a Hugging Face model directory that plain transformers and vLLM load."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from callbacks.model_card import LINEAGE, lineage, model_card
from datamodules.errors import ConfigurationError
from lightning_modules.base import FineTuningModule

TAKEN = {"", "..", "cache", "checkpoints", "eval", "wandb"}
"""Names in a run's folder, or that lead out of it, which an export must not replace."""


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
        if trainer.global_step == 0:
            rank_zero_warn(
                "no step was taken, so no model is exported; raise trainer.max_steps, max_epochs or limit_train_batches"
            )
            return
        target = Path(trainer.default_root_dir) / self.directory
        if trainer.is_global_zero:
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            export(pl_module, partial)
            history = lineage(trainer, pl_module)
            (partial / LINEAGE).write_text(yaml.safe_dump(history, sort_keys=False), encoding="utf-8")
            (partial / "README.md").write_text(model_card(trainer, pl_module, history), encoding="utf-8")
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
