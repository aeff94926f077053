"""Attention over rows laid flat, as an implementation that transformers' models can be switched to."""

import inspect
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_modules.forward.layout import Segments

varlen_attn: Any = None
if find_spec("torch.nn.attention.varlen"):
    from torch.nn.attention.varlen import varlen_attn

NAME = "padding_free_sdpa"
"""Like transformers' own ``sdpa``, except where a forward pass is given ``flat_segments``."""


def replace_attention(model: PreTrainedModel) -> None:
    """Have a model attend by this file, where its attention is transformers' ``sdpa`` and can be replaced.

    With padded rows and caches it goes on as before, and its saved configuration is the same.
    """
    config: Any = model.config.get_text_config()
    if config._attn_implementation == "sdpa" and getattr(model, "_supports_attention_backend", False):
        model.set_attn_implementation(NAME)


def padding_free_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "batch head time width"],
    key: Float[Tensor, "batch key_head key_time width"],
    value: Float[Tensor, "batch key_head key_time value_width"],
    attention_mask: Tensor | None,
    *,
    flat_segments: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a layer calls, by transformers' attention interface.

    Raises:
        NotImplementedError: If rows are laid flat and the layer asks for something that changes its attention.
    """
    if flat_segments is None:
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        output: tuple[Tensor, None] = plain(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
        return output
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if others.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if _varlen_can(query, value, dropout):
        return _varlen(query, key, value, flat_segments, scaling), None
    return _by_segment(query, key, value, flat_segments, scaling, dropout), None


def _by_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, dropout: float
) -> Float[Tensor, "1 time head width"]:
    """One call for each segment: on a CPU faster than any padded call, and nothing is computed twice."""
    queries, keys, values = (tensor.split(segments.lengths, dim=2) for tensor in (query, key, value))
    outputs = []
    for i, (prefix, mask) in enumerate(zip(segments.prefixes, segments.masks, strict=True)):
        k, v = keys[i], values[i]
        if prefix is not None:
            k, v = torch.cat([keys[prefix], k], dim=2), torch.cat([values[prefix], v], dim=2)
        output = scaled_dot_product_attention(
            queries[i],
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=True,
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _varlen_can(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether PyTorch's packed attention takes these: on CUDA, in half precision, from Ampere on."""
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and dropout == 0.0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None
) -> Float[Tensor, "1 time head width"]:
    """One call for all segments. Queries stand as they are; keys are gathered so that each row has its own."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if k.shape[1] != q.shape[1]:
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    if segments.key_index is not None:
        k, v = k.index_select(0, segments.key_index), v.index_select(0, segments.key_index)
    # Both kinds of causal mask end with the row, so a segment behind a prefix sees all of it.
    takes_flag = "is_causal" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if takes_flag else {"window_size": (-1, 0)}
    output: Tensor = varlen_attn(
        q, k, v, *segments.bounds, max(segments.lengths), max(segments.key_lengths), scale=scaling, **causal
    )
    return output.unsqueeze(0)


AttentionInterface.register(NAME, padding_free_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])  # for rows that are not laid flat
