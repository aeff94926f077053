"""Linear layers as a decode step wants them: joined where they read the same input, and laid out for few rows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.models.adapters import adapted_layers, merged_weight

Projection = Callable[[Tensor], Tensor]


def projection(layers: Sequence[Any], dtype: torch.dtype) -> Projection:
    """The layers' outputs for one input, side by side, computed in ``dtype``.

    On a CPU the weights are copied into oneDNN's own layout: a product with few rows then costs half as much or less
    (packing costs about four of them), and a row's result is the same in any number of rows. Elsewhere the layers'
    own weights are read, or a copy in ``dtype`` if they have another. An adapter is in a copy of its own. Copies are as
    old as this call: make new ones after a training step.
    """
    device = layers[0].weight.device
    if device.type == "cpu" and packs(dtype):
        weight, bias = _joined(layers, dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        linear = torch.ops.mkldnn._linear_pointwise.default

        def product(rows: Tensor) -> Tensor:
            if len(rows) == 1:  # a single row of a long sum goes another way, with other rounding
                return product(rows.repeat(2, 1))[:1]
            result: Tensor = linear(rows.to(dtype), packed, bias, "none", [], "")
            return result

        return product
    if layers[0].weight.dtype != dtype or adapted_layers(nn.ModuleList(layers)):
        weight, bias = _joined(layers, dtype)
        return lambda rows: nn.functional.linear(rows.to(dtype), weight, bias)
    if len(layers) == 1:
        only: nn.Linear = layers[0]
        return only
    return lambda rows: torch.cat([layer(rows) for layer in layers], dim=-1)


def packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch has the packed product for the dtype, and this CPU the instructions."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def _joined(layers: Sequence[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    weights = [merged_weight(layer).to(dtype) for layer in layers]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]  # the head's may be most of the model: no copy
    if all(layer.bias is None for layer in layers):
        return weight, None
    biases = [
        layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers
    ]
    return weight, torch.cat(biases).to(dtype)
