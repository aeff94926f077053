"""Writes ``final/``, a Hugging Face model directory that plain transformers and vLLM load, and ``adapter/`` of LoRA."""

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from callbacks.model_card import LINEAGE, lineage, model_card
from core.errors import ConfigurationError
from lightning_modules.base import FineTuningModule
from lightning_modules.models.adapter_files import save_adapter

NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
ADAPTER = "adapter"
"""Where the adapter goes, within the run's folder."""
TAKEN = {ADAPTER, "cache", "checkpoints", "csv", "eval", "lightning_logs", "wandb"}
"""Names in a run's folder that are something else's."""


class HuggingFaceExport(Callback):
    """Exports the trained weights, tokenizer, chat template, generation config and model card when training ends.

    An earlier export in its place is removed once the new one is whole; anything else that is there is never touched.

    A run that trains an adapter writes it to ``adapter/``, and to the directory the model that it is merged into.

    Args:
        directory: Where to, a plain name within the run's folder.
        merged: Whether a run with an adapter writes that model too.

    Raises:
        ConfigurationError: If it is no plain name or another part of the run's.
    """

    def __init__(self, directory: str = "final", merged: bool = True) -> None:
        plain = NAME.fullmatch(directory) and not directory.endswith((".", ".partial", ".old"))
        if not plain or directory.lower() in TAKEN:
            raise ConfigurationError(
                f"export.directory must be a new name within the run's folder, got {directory!r}; it may have letters, "
                "digits, dots, - and _"
            )
        self.directory = directory
        self.merged = merged

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, FineTuningModule) and not getattr(trainer, "fast_dev_run", False):
            for directory, _ in self._parts(pl_module):
                check_place(Path(trainer.default_root_dir) / directory)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, FineTuningModule) or getattr(trainer, "fast_dev_run", False):
            return
        if trainer.global_step == 0:
            rank_zero_warn(
                "no step was taken, so no model is exported; raise trainer.max_steps, max_epochs or limit_train_batches"
            )
            return
        if trainer.is_global_zero:
            for directory, write in self._parts(pl_module):
                target = Path(trainer.default_root_dir) / directory
                write_export(trainer, pl_module, target, write)
                rank_zero_info(f"exported the {'model' if write is export else 'adapter'} to {target}")
        trainer.strategy.barrier("export")

    def _parts(self, module: FineTuningModule) -> list[tuple[str, Callable[[FineTuningModule, Path], None]]]:
        """The directories to write, and what writes each."""
        whole = [(self.directory, export)] if self.merged or module.lora is None else []
        return [*whole, *([(ADAPTER, export_adapter)] if module.lora is not None else [])]


def check_place(target: Path) -> None:
    """Raise a ConfigurationError where an export could not go there, or would replace what is no export."""
    for place in (target, *beside(target)):
        if place.is_symlink():
            raise ConfigurationError(f"{place} is a link, and an export replaces no link; remove it")
        if place.exists() and not is_export(place):
            raise ConfigurationError(
                f"{place} is no model that a run exported, so it is not replaced; move it away, or name another "
                "--export.directory"
            )


def is_export(directory: Path) -> bool:
    """Whether an export made the directory: it holds the lineage that each one begins with, or nothing."""
    return directory.is_dir() and ((directory / LINEAGE).is_file() or not any(directory.iterdir()))


def beside(target: Path) -> tuple[Path, Path]:
    """Where an export is made, and where the earlier one waits until it is whole."""
    return target.with_name(f"{target.name}.partial"), target.with_name(f"{target.name}.old")


def write_export(
    trainer: Trainer, module: FineTuningModule, target: Path, write: Callable[[FineTuningModule, Path], None]
) -> None:
    """Export a model or adapter in full or not at all.

    Raises:
        ConfigurationError: If the place is taken by something else or the disk is full; what was there stays.
    """
    check_place(target)
    partial, old = beside(target)
    shutil.rmtree(partial, ignore_errors=True)  # as a kill left it
    try:
        history = lineage(trainer, module)
        partial.mkdir(parents=True)
        (partial / LINEAGE).write_text(yaml.safe_dump(history, sort_keys=False), encoding="utf-8")
        write(module, partial)
        library = "peft" if write is export_adapter else "transformers"
        (partial / "README.md").write_text(model_card(trainer, module, history, library=library), encoding="utf-8")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        told = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"cannot export the model to {target} ({told}); the checkpoints have its weights: make room there, then "
            "run the same with --ckpt_path last"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


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
    (model if module.lora is None else merged_model(module)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def merged_model(module: FineTuningModule) -> PreTrainedModel:
    """The model with its adapter in its weights, beside the one that trains, which stays as it is."""
    config = copy.deepcopy(module.model.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        merged = type(module.model)(config)
    merged.load_state_dict(module.exported_state(), assign=True)
    merged.tie_weights()
    if module.can_generate:
        merged.generation_config = module.model.generation_config
    return merged


def export_adapter(module: FineTuningModule, directory: Path) -> None:
    """Save the adapter, with the tokenizer and template that it was trained with."""
    assert module.lora is not None
    save_adapter(module.model, module.lora, directory, base=module.loaded_name)
    module.tokenizer.save_pretrained(directory)
