"""An adapter's options, and its directory: what peft and vLLM load, read and written."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.errors import ConfigurationError

TRAINED = "default"
"""Name of the adapter that is trained."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OTHER_KINDS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "lora_bias")
"""What makes an adapter another function than W x + (alpha / rank) B A x."""
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


def save_adapter(
    model: PreTrainedModel, options: LoraOptions, directory: Path, *, base: str, trained: Mapping[str, Tensor]
) -> None:
    """Write the adapter as peft and vLLM load it, with what else is trained in full.

    Args:
        model: With the adapter.
        options: Of the adapter.
        directory: Where to.
        base: Hub id or directory of the model that the adapter belongs to.
        trained: The weights that train, whole, by their names in the model.
    """
    from peft import LoraConfig, TaskType

    weights = {PREFIX + name.replace(f".{TRAINED}.", "."): value.cpu().contiguous() for name, value in trained.items()}
    in_full = sorted({name.rpartition(".")[0] for name in trained if ".lora_" not in name})
    targets = options.target_modules or _adapted(model)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        modules_to_save=in_full or None,
        task_type=TaskType.SEQ_CLS if in_full else TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.target_modules = sorted(targets)  # which it makes a set of, and that has another order each time
    config.save_pretrained(str(directory))
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
    """Put the adapter of a directory into a model's own weights, for good.

    Raises:
        ConfigurationError: If it cannot be read or does not fit the model.
    """
    config = _read_config(directory, option=option)
    weights = read_weights(directory, option=option)
    modules = dict(model.named_modules())
    try:
        with torch.no_grad():
            for key, value in weights.items():
                if ".lora_A." in key:
                    layer: Any = modules[key.partition(".lora_A.")[0]]
                    change = weights[key.replace(".lora_A.", ".lora_B.")].float() @ value.float()
                    scaling = config["lora_alpha"] / config["r"]
                    layer.weight += scaling * (change.T if isinstance(layer, Conv1D) else change)
                elif ".lora_" not in key:
                    model.get_parameter(key).copy_(value)
    except (KeyError, AttributeError, RuntimeError) as error:
        raise ConfigurationError(f"the adapter {directory} does not fit its base ({error}); change {option}") from error


def check_same(directory: str, options: LoraOptions, targets: Sequence[str]) -> None:
    """Raise a ConfigurationError where a directory's adapter is another than the options ask for."""
    config = _read_config(directory, option="model.model_name")
    asked = (options.rank, options.alpha, sorted(targets))
    there = (config["r"], config["lora_alpha"], sorted(config["target_modules"]))
    if asked != there:
        raise ConfigurationError(
            f"{directory} holds an adapter of rank {there[0]}, alpha {there[1]} for {', '.join(there[2])}, and "
            f"model.lora asks for rank {asked[0]}, alpha {asked[1]} for {', '.join(asked[2])}: make them equal to go "
            "on training it, or name the model that it was merged into (final/) in model.model_name to begin a new one"
        )


def read_weights(directory: str, *, option: str = "model.model_name") -> dict[str, Tensor]:
    """By the names of the model's own modules, without the adapter's name."""
    try:
        found = load_file(Path(directory) / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{directory}/{WEIGHTS} cannot be read ({error}); change {option}") from error
    return {key.removeprefix(PREFIX): value for key, value in found.items()}


def _read_config(directory: str, *, option: str) -> dict[str, Any]:
    try:
        content = json.loads((Path(directory) / CONFIG).read_text("utf-8"))
        kept = {name: content[name] for name in ("base_model_name_or_path", "r", "lora_alpha", "target_modules")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigurationError(
            f"{directory} holds no adapter that can be read ({error!r}); change {option}"
        ) from error
    layers, numbers = kept["target_modules"], (kept["r"], kept["lora_alpha"])
    whole = isinstance(layers, list) and all(isinstance(name, str) for name in layers)
    if not whole or not isinstance(kept["base_model_name_or_path"], str) or not all(_is_positive(n) for n in numbers):
        raise ConfigurationError(f"{directory}/{CONFIG} names no base model, layers, rank or alpha; change {option}")
    unknown = [name for name in OTHER_KINDS if content.get(name) not in (None, False, {}, "none")]
    if content.get("peft_type") != "LORA" or unknown:
        told = f" ({', '.join(unknown)})" if unknown else ""
        raise ConfigurationError(f"{directory} holds an adapter of another kind than plain LoRA{told}; change {option}")
    return kept


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
