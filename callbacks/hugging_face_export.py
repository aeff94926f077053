"""Writes ``final/``, a Hugging Face model directory that plain transformers and vLLM load, and ``adapter/`` of LoRA."""

import functools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from callbacks.model_card import LINEAGE, lineage, model_card
from core.errors import ConfigurationError
from lightning_modules.base import FineTuningModule
from lightning_modules.models.adapter_files import save_adapter
from lightning_modules.models.sharding import assembled

NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
ADAPTER = "adapter"
"""Where the adapter goes, within the run's folder."""
TAKEN = {ADAPTER, "cache", "checkpoints", "csv", "eval", "lightning_logs", "wandb"}
"""Names in a run's folder that are something else's."""


class Part(NamedTuple):
    """What an export may consist of."""

    name: str
    library: str
    weights: Callable[[FineTuningModule], Iterator[tuple[str, Tensor]]]
    """Gives them; of a sharded model every process must take them all."""
    write: Callable[[dict[str, Tensor], FineTuningModule, Path], None]


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
            for target, _ in self._parts(trainer, pl_module):
                check_place(target)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, FineTuningModule) or getattr(trainer, "fast_dev_run", False):
            return
        if trainer.global_step == 0:
            rank_zero_warn(
                "no step was taken, so no model is exported; raise trainer.max_steps, max_epochs or limit_train_batches"
            )
            return
        for target, part in self._parts(trainer, pl_module):
            weights = on_first(trainer, pl_module, part.weights(pl_module))
            if trainer.is_global_zero:
                write_export(trainer, pl_module, target, functools.partial(part.write, weights), library=part.library)
                rank_zero_info(f"exported the {part.name} to {target}")
        trainer.strategy.barrier("export")

    def _parts(self, trainer: Trainer, module: FineTuningModule) -> list[tuple[Path, Part]]:
        """The directories to write, and what each is to hold."""
        root = Path(trainer.default_root_dir)
        whole = [(root / self.directory, MODEL)] if self.merged or module.lora is None else []
        return [*whole, *([(root / ADAPTER, ADAPTER_PART)] if module.lora is not None else [])]


def on_first(trainer: Trainer, module: FineTuningModule, weights: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The weights on the first process; of a sharded model the others have their part in it."""
    if module.sharding is None:
        return dict(weights) if trainer.is_global_zero else {}
    return {name: weight.cpu() for name, weight in weights if trainer.is_global_zero}


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
    trainer: Trainer,
    module: FineTuningModule,
    target: Path,
    write: Callable[[FineTuningModule, Path], None],
    *,
    library: str,
) -> None:
    """Export a model or adapter in full or not at all.

    Args:
        trainer: Of the run.
        module: What was trained.
        target: Where to.
        write: Writes the weights, and what goes with them, into a directory.
        library: That loads it, for the card.

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


def write_model(weights: dict[str, Tensor], module: FineTuningModule, directory: Path) -> None:
    """Save the model so that generation stops where a turn ends."""
    model: PreTrainedModel = module.model
    tokenizer: PreTrainedTokenizerBase = module.tokenizer
    stops = module.stop_token_ids()
    if module.can_generate:
        settings: dict[str, Any] = {"eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id, "do_sample": True}
        model.generation_config = GenerationConfig(**settings)
    model.config.eos_token_id = stops[0]
    model.config.pad_token_id = tokenizer.pad_token_id
    plain = module.lora is None and module.sharding is None
    (model if plain else assembled(model, weights)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_adapter(weights: dict[str, Tensor], module: FineTuningModule, directory: Path) -> None:
    """Save the adapter, with the tokenizer and template that it was trained with."""
    assert module.lora is not None
    save_adapter(module.model, module.lora, directory, base=module.loaded_name, trained=weights)
    module.tokenizer.save_pretrained(directory)


MODEL = Part("model", "transformers", FineTuningModule.exported_weights, write_model)
ADAPTER_PART = Part("adapter", "peft", FineTuningModule.trained_weights, write_adapter)
