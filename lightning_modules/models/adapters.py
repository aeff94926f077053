"""LoRA: an adapter of low rank is trained beside frozen weights, W x + (alpha / rank) B A x.

Hu et al. 2021, eq. 3, https://arxiv.org/abs/2106.09685. The adapter is peft's, put into the model's own layers, so the
model stays of its class and every forward pass of the suite goes on as before. Nothing is ever merged into the weights
that are trained on: in bfloat16 merging and taking apart again drifts. Merged weights are made elsewhere, from these.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.errors import ConfigurationError

TRAINED, REFERENCE = "default", "reference"
"""Names of the adapter that is trained, and of the one that it was at the start where that is not zero."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEADS = ("score.", "classifier.")
"""How the names of a reward model's head begin, which is trained in full."""
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


def add_adapter(model: PreTrainedModel, options: LoraOptions, *, start: str, seed: int) -> None:
    """Freeze a model and give it an adapter to train: a new one that changes nothing yet, or the one of a directory.

    Args:
        model: Is changed.
        options: Of the adapter.
        start: The directory of an adapter to go on training, or any other model's name for a new one. Of the former
            the model keeps a frozen copy, for :func:`at_start`.
        seed: Of the new one.

    Raises:
        ConfigurationError: If a layer to adapt is not there, or the directory's adapter is another than asked for.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = options.target_modules or linear_layers(model)
    config = LoraConfig(r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=targets)
    names = [TRAINED, REFERENCE] if is_adapter(start) else [TRAINED]
    weights = _read_weights(start, options, targets) if is_adapter(start) else {}
    for name in reversed(names):  # the last one is active
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(config, model, adapter_name=name)
            except ValueError as error:
                raise ConfigurationError(f"{error}; change model.lora.target_modules") from error
        own = dict(model.named_parameters())
        with torch.no_grad():
            for key, value in weights.items():
                if name == TRAINED or ".lora_" in key:
                    own[_named(key, name)].copy_(value)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{TRAINED}." in name or name.startswith(HEADS))
    for layer in adapted_layers(model):
        layer._active_adapter = [TRAINED]


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Last names of all linear layers of the model's body."""
    body: Any = model.base_model
    kinds = (nn.Linear, Conv1D)
    return sorted({name.rpartition(".")[2] for name, module in body.named_modules() if isinstance(module, kinds)})


def adapted_layers(model: nn.Module) -> list[Any]:
    """The layers with an adapter; none where the model has none."""
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]


@contextmanager
def at_start(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model as it was before training, for passes without gradient: without its adapter, or with the first one."""
    layers = adapted_layers(model)
    for layer in layers:
        layer._active_adapter = [REFERENCE]  # where there is none a layer passes over it
    try:
        yield model
    finally:
        for layer in layers:
            layer._active_adapter = [TRAINED]


def merged_weight(layer: Any) -> Float[Tensor, "out in"]:
    """A linear layer's weight with its active adapter in it; in float32 storage of its own where there is one."""
    if not hasattr(layer, "lora_A"):
        weight: Tensor = layer.weight.detach()
        return weight
    merged = plain_weight(layer.base_layer)
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = (part[name].weight.detach().float() for part in (layer.lora_A, layer.lora_B))
            change = layer.scaling[name] * (b @ a)
            merged = merged + (change.T if isinstance(layer.base_layer, Conv1D) else change)
    return merged


def plain_weight(layer: Any) -> Float[Tensor, "out in"]:
    """A layer's weight in float32, from whatever few bits it is kept in."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(layer)
    return weight.detach().float()


def merges(layer: nn.Module) -> bool:
    """Whether a layer is linear, and :func:`merged_weight` all that its adapter does, where it has one."""
    if type(layer) is nn.Linear:
        return True
    base = getattr(layer, "base_layer", None)
    plain = type(base) is nn.Linear and not getattr(layer, "lora_variant", None)
    return plain and hasattr(layer, "lora_A") and not any(getattr(layer, "lora_bias", {}).values())


def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's weights by the names of a model without an adapter, which is in them."""
    if not adapted_layers(model):
        return dict(model.state_dict())
    modules = dict(model.named_modules())
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        owner, _, last = name.partition(".base_layer.")
        if not last and ".lora_" not in name:
            state[name] = value
        elif last in ("weight", "bias"):  # and not what a quantised weight is told by
            state[f"{owner}.{last}"] = merged_weight(modules[owner]) if last == "weight" else value
    return state


def active_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Everything that a model's output depends on now, its adapter apart: of a model without one, all its weights."""
    layers = adapted_layers(model)
    active = {name for layer in layers for name in layer.active_adapters}
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        adapter = name.split(".")[-2] if ".lora_" in name else None
        if adapter is None or adapter in active:
            state[name.replace(".base_layer.", ".").replace(f".{adapter}.", ".")] = value
    return state


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
        target_modules=options.target_modules or linear_layers_of(model),
        modules_to_save=in_full or None,
        task_type=TaskType.SEQ_CLS if in_full else TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(str(directory))
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def linear_layers_of(model: PreTrainedModel) -> list[str]:
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
    weights = _read_weights(directory, options, options.target_modules or [])
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


def _read_weights(directory: str, options: LoraOptions, targets: Sequence[str]) -> dict[str, Tensor]:
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


def _named(key: str, adapter: str) -> str:
    """A parameter's name in a model whose adapter has a name."""
    for part in (".lora_A.", ".lora_B."):
        key = key.replace(part, f"{part}{adapter}.")
    return key
