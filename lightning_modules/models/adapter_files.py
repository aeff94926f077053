"""An adapter's options, and its directory: what peft and vLLM load, read and written."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.errors import ConfigurationError

TRAINED = "default"
"""Name of the adapter that is trained."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""How peft's files begin the names of a model's own modules."""


@dataclass
class LoraOptions:
    """The adapter to train; its learning rate is best about ten times that of full fine-tuning.

    Args:
        rank: Of the change of each layer's weights.
        alpha: The change is weighted by alpha / rank.
        dropout: Of what enters the adapter, in SFT alone.
        target_modules: Last names of the layers to adapt; all linear layers but the output head where not given.
    """

    rank: int
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigurationError(f"model.lora.rank must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise ConfigurationError(f"model.lora.alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigurationError(f"model.lora.dropout must be within 0..1, got {self.dropout}")
        if find_spec("peft") is None:
            raise ConfigurationError("model.lora needs the package peft, which is not installed (the extra [lora])")


def save_adapter(model: PreTrainedModel, options: LoraOptions, directory: Path, *, base: str) -> None:
    """Write the adapter as peft and vLLM load it, with what else is trained in full.

    Args:
        model: With the adapter.
        options: Of the adapter.
        directory: Where to.
        base: Hub id or directory of the model that the adapter belongs to.
    """
    from peft import LoraConfig, TaskType

    trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    weights = {PREFIX + name.replace(f".{TRAINED}.", "."): value for name, value in trained.items()}
    in_full = sorted({name.rpartition(".")[0] for name in trained if ".lora_" not in name})
    LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.target_modules or _adapted(model),
        modules_to_save=in_full or None,
        task_type=TaskType.SEQ_CLS if in_full else TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(str(directory))
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def _adapted(model: PreTrainedModel) -> list[str]:
    """Last names of the layers that have the adapter."""
    names = (name for name, module in model.named_modules() if hasattr(module, "lora_A"))
    return sorted({name.rpartition(".")[2] for name in names})


def is_adapter(model_name: str) -> bool:
    """Whether this is the directory of an adapter, not of a model."""
    return (Path(model_name) / CONFIG).is_file() and not (Path(model_name) / "config.json").is_file()


def base_of(model_name: str, *, option: str = "model.model_name") -> str:
    """The model that an adapter's directory belongs to; any other name as it is.

    Raises:
        ConfigurationError: If the directory does not say.
    """
    return (
        str(_read_config(model_name, option=option)["base_model_name_or_path"])
        if is_adapter(model_name)
        else model_name
    )


def merge_directory(model: PreTrainedModel, directory: str, *, option: str) -> None:
    """Put the adapter of a directory into a model's own weights, for good."""
    config = _read_config(directory, option=option)
    options = LoraOptions(int(config["r"]), int(config["lora_alpha"]), target_modules=sorted(config["target_modules"]))
    modules = dict(model.named_modules())
    weights = read_weights(directory, options, options.target_modules or [])
    with torch.no_grad():
        for key, value in weights.items():
            if ".lora_A." in key:
                layer: Any = modules[key.partition(".lora_A.")[0]]
                change = weights[key.replace(".lora_A.", ".lora_B.")].float() @ value.float()
                layer.weight += options.alpha / options.rank * (change.T if isinstance(layer, Conv1D) else change)
            elif ".lora_" not in key:
                model.get_parameter(key).copy_(value)


def _read_config(directory: str, *, option: str) -> dict[str, Any]:
    try:
        content = json.loads((Path(directory) / CONFIG).read_text("utf-8"))
        kept = {name: content[name] for name in ("base_model_name_or_path", "r", "lora_alpha", "target_modules")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigurationError(
            f"{directory} holds no adapter that can be read ({error!r}); change {option}"
        ) from error
    if not isinstance(kept["base_model_name_or_path"], str) or not isinstance(kept["target_modules"], list):
        raise ConfigurationError(f"{directory}/{CONFIG} names no base model or no layers; change {option}")
    if content.get("peft_type") != "LORA" or content.get("use_dora") or content.get("use_rslora"):
        raise ConfigurationError(f"{directory} holds an adapter of another kind than plain LoRA; change {option}")
    return kept


def read_weights(directory: str, options: LoraOptions, targets: Sequence[str]) -> dict[str, Tensor]:
    """By the names of the model's own modules, without the adapter's name."""
    config = _read_config(directory, option="model.model_name")
    asked = (options.rank, options.alpha, sorted(targets))
    there = (config["r"], config["lora_alpha"], sorted(config["target_modules"]))
    if asked != there:
        raise ConfigurationError(
            f"{directory} holds an adapter of rank {there[0]}, alpha {there[1]} for {', '.join(there[2])}, and "
            f"model.lora asks for rank {asked[0]}, alpha {asked[1]} for {', '.join(asked[2])}: make them equal to go "
            "on training it, or name the model that it was merged into (final/) in model.model_name to begin a new one"
        )
    return {key.removeprefix(PREFIX): value for key, value in load_file(Path(directory) / WEIGHTS).items()}
