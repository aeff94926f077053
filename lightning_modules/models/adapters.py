"""LoRA: an adapter of low rank is trained beside frozen weights, W x + (alpha / rank) B A x.

Hu et al. 2021, eq. 3, https://arxiv.org/abs/2106.09685. The adapter is peft's, put into the model's own layers, so the
model stays of its class and every forward pass of the suite goes on as before. Nothing is ever merged into the weights
that are trained on: in bfloat16 merging and taking apart again drifts. Merged weights are made elsewhere, from these.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.errors import ConfigurationError
from lightning_modules.models.adapter_files import TRAINED, LoraOptions, check_same, is_adapter, read_weights
from lightning_modules.models.parts import body_of, whole

REFERENCE = "reference"
"""Name of what the trained adapter was at the start, where that was not zero."""
HEADS = ("score.", "classifier.")
"""How the names of a reward model's head begin, which is trained in full."""


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
    weights: dict[str, Tensor] = {}
    if is_adapter(start):
        check_same(start, options, targets)
        weights = read_weights(start)
    for name in reversed(names):  # the last one is active
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(config, model, adapter_name=name)
            except ValueError as error:
                raise ConfigurationError(f"{error}; change model.lora.target_modules") from error
        kept = {_named(key, name): value for key, value in weights.items() if name == TRAINED or ".lora_" in key}
        _copy_into(model, kept, start)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{TRAINED}." in name or name.startswith(HEADS))
    for layer in adapted_layers(model):
        layer._active_adapter = [TRAINED]


def _copy_into(model: PreTrainedModel, weights: dict[str, Tensor], directory: str) -> None:
    own = dict(model.named_parameters())
    try:
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)
    except (KeyError, RuntimeError) as error:
        told = f"the adapter {directory} does not fit its base ({error}); change model.model_name"
        raise ConfigurationError(told) from error


def halve_frozen(model: PreTrainedModel) -> None:
    """Keep the matrices beside an adapter in bfloat16, for use under its autocast, which would cast them at each pass.

    Of weights that were published in bfloat16 nothing is lost.
    """
    for layer in adapted_layers(model):
        if type(layer.base_layer) is nn.Linear:
            layer.base_layer.weight.data = layer.base_layer.weight.data.to(torch.bfloat16)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Last names of all linear layers of the model's body."""
    body = body_of(model)
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
        return whole(layer.weight.detach())
    merged = plain_weight(layer.base_layer)
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = (whole(part[name].weight.detach()).float() for part in (layer.lora_A, layer.lora_B))
            change = layer.scaling[name] * (b @ a)
            merged = merged + (change.T if isinstance(layer.base_layer, Conv1D) else change)
    return merged


def plain_weight(layer: Any) -> Float[Tensor, "out in"]:
    """A layer's weight in float32, from whatever few bits it is kept in."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(layer)
    return whole(weight.detach()).float()


def merges(layer: nn.Module) -> bool:
    """Whether a layer is linear, and :func:`merged_weight` all that its adapter does, where it has one."""
    if type(layer) is nn.Linear:
        return True
    base = getattr(layer, "base_layer", None)
    plain = type(base) is nn.Linear and not getattr(layer, "lora_variant", None)
    return plain and hasattr(layer, "lora_A") and not any(getattr(layer, "lora_bias", {}).values())


def merged_weights(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """A model's weights by the names of a model without an adapter, which is in them; those that are tied once.

    Of a sharded model every process gets each of them whole, one after the other, and must take all.

    Args:
        model: With an adapter or without.
        dtype: What to give them in; what they are in where not given, and float32 where there is an adapter in them.
    """
    state = model.state_dict()  # which has a sharded model put all of itself back into its parts
    single = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    modules = dict(model.named_modules())
    for name, value in state.items():
        owner, _, last = name.partition(".base_layer.")
        if name not in single or ".lora_" in name or last not in ("", "weight", "bias"):  # as what a quantised one has
            continue
        if last == "weight":
            found = merged_weight(modules[owner])
            yield f"{owner}.weight", found if dtype is None else found.to(dtype)
        else:
            kept = dtype is None or not value.is_floating_point()
            yield (f"{owner}.bias" if last else name), whole(value if kept else value.to(dtype))


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


def _named(key: str, adapter: str) -> str:
    """A parameter's name in a model whose adapter has a name."""
    for part in (".lora_A.", ".lora_B."):
        key = key.replace(part, f"{part}{adapter}.")
    return key
