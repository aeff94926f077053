"""The model card of an export, and the lineage that a later stage's card goes on from."""

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.lightning_internals import epochs_begun
from callbacks.logging.tracking import short_name
from callbacks.nemotron_evaluation import NemotronEvaluation
from core.errors import ConfigurationError
from core.plain import loaded_file
from core.text import printable, told
from lightning_modules.base import FineTuningModule

LINEAGE = "lineage.yaml"
"""Beside the weights: the model at the root, and what each stage was. It is no part of the model's content."""
CARD = """---
{front_matter}---

# {title}

{origin}

| stage | method | data | optimiser steps | learning rate | evaluation |
|---|---|---|---|---|---|
{stages}

The last stage in detail:

| | |
|---|---|
| epochs | {epochs} |
| batch size per process | {batch_size} |
| processes | {world_size} |
| longest sequence (tokens) | {max_length} |
{adapter}{metrics}
The chat template is part of the tokenizer; an assistant turn ends with `{end_token}`.
"""


def lineage(trainer: Trainer, module: FineTuningModule) -> dict[str, Any]:
    """The root's hub id (None of a local model) and name, and the stages so far, this one last."""
    found = earlier_lineage(Path(module.model_name))
    if found is None:
        hub_id = None if Path(module.model_name).is_dir() else module.model_name
        found = {"base_model": hub_id, "base_name": printable(short_name(module.model_name)), "stages": []}
    data: Any = getattr(trainer, "datamodule", None)
    stage = {
        "method": module.method,
        "method_name": module.method_name or module.method.upper(),
        "dataset": shown_dataset(getattr(data, "dataset_name", None)),
        "steps": trainer.global_step,
        "learning_rate": module.learning_rate,
        "evaluation": headline(trainer),
    }
    return {**found, "stages": [*found["stages"], stage]}


def earlier_lineage(directory: Path) -> dict[str, Any] | None:
    """The lineage that an export of this suite left in a model directory; None where there is none that can be used."""
    file = directory / LINEAGE
    if not file.is_file():
        return None
    try:
        found = loaded_file(file)
        stages = [
            {
                **{name: printable(str(stage[name])) for name in ("method", "method_name", "dataset", "evaluation")},
                "steps": int(stage["steps"]),
                "learning_rate": float(stage["learning_rate"]),
            }
            for stage in found["stages"]
        ]
        base = found["base_model"]
        name = printable(str(found["base_name"]))
    except (ConfigurationError, KeyError, TypeError, ValueError, OverflowError) as error:
        rank_zero_warn(f"{file} is no lineage ({told(error)}), so the model card begins with {directory}")
        return None
    return {"base_model": None if base is None else printable(str(base)), "base_name": name, "stages": stages}


def shown_dataset(name: str | None) -> str:
    """A hub id as it is, of a local path what says something."""
    if name is None:
        return "an unnamed dataset"
    parts = name.split(" + ")  # of a mixture
    return printable(" + ".join(f"{short_name(part)} (local)" if Path(part).exists() else part for part in parts))


def hub_datasets(stages: list[dict[str, Any]]) -> list[str]:
    """The hub's datasets that the stages were trained on, without the names of subsets."""
    named = [name for stage in stages for name in stage["dataset"].split(" + ")]
    return list(dict.fromkeys(name.partition(":")[0] for name in named if "/" in name))


def headline(trainer: Trainer) -> str:
    """The win rate of the model as it is exported, in words; empty where it was not evaluated."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    evaluation = next((callback for callback in callbacks if isinstance(callback, NemotronEvaluation)), None)
    result = evaluation.result_at(trainer.global_step) if evaluation is not None else None
    if result is None or not result.valid:
        return ""
    rate, low, high = (100 * value for value in (result.win_rate, *result.win_rate_ci))
    return (
        f"wins {rate:.1f} % [{low:.1f}, {high:.1f}] of {result.prompts} prompts against "
        f"{printable(short_name(result.reference))}, judged by {printable(short_name(result.reward_source))}"
    )


def model_card(
    trainer: Trainer, module: FineTuningModule, history: dict[str, Any], *, library: str = "transformers"
) -> str:
    """What was trained, from what, on what and how, with the validation metrics of the last epoch."""
    data: Any = getattr(trainer, "datamodule", None)
    metrics = {
        name: value.item()
        for name, value in trainer.callback_metrics.items()
        if name.startswith(("val/", "eval/")) and value.numel() == 1 and value.isfinite()
    }
    stages, base = history["stages"], history["base_model"]
    datasets = hub_datasets(stages)
    front_matter = {
        **({"base_model": base} if base else {}),
        **({"datasets": datasets} if datasets else {}),
        "library_name": library,
        "pipeline_tag": "text-generation" if module.can_generate else "text-classification",
        "tags": [*dict.fromkeys(stage["method"] for stage in stages), "pytorch-lightning"],
    }
    return CARD.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False),
        title=f"{history['base_name']}: {', '.join(stage['method'].upper() for stage in stages)}",
        origin=f"{base or history['base_name'] + ' (a local model)'}, fine-tuned in {len(stages)} "
        f"{'stage' if len(stages) == 1 else 'stages'}.",
        stages="\n".join(
            f"| {number} | {stage['method_name']} | {stage['dataset']} | {stage['steps']} | "
            f"{stage['learning_rate']:g} | {stage['evaluation'] or '-'} |"
            for number, stage in enumerate(stages, start=1)
        ),
        epochs=epochs_begun(trainer),
        batch_size=getattr(data, "batch_size", "unknown"),
        world_size=trainer.world_size,
        max_length=module.longest_sequence(data),
        adapter=adapter_told(module),
        metrics="".join(f"| {name} | {value:.4g} |\n" for name, value in sorted(metrics.items())),
        end_token=module.tokenizer.convert_ids_to_tokens(module.stop_token_ids()[0]),
    )


def adapter_told(module: FineTuningModule) -> str:
    """The row about the adapter; nothing where all weights were trained."""
    if module.lora is None:
        return ""
    kept = f", beside weights in {module.quantization}" if module.quantization else ""
    return f"| adapter | LoRA of rank {module.lora.rank}, alpha {module.lora.alpha}{kept} |\n"
