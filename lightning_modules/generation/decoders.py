"""How a model completes prompts: its own decode step where the architecture is known, else transformers' forward."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from core.memory import free_bytes
from lightning_modules.generation.family_decoder import FamilyDecoder, compute_dtype
from lightning_modules.generation.transformers_decoder import TransformersDecoder, WholeRowDecoder, steps_as_whole_rows
from lightning_modules.models.adapters import merges
from lightning_modules.models.sharding import plain_class, sharding_of

FAMILY = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose frequencies do not depend on the sequence's length."""


@runtime_checkable
class Decoder(Protocol):
    """Prompts being completed, ``samples_per_prompt`` neighbouring rows each."""

    def start(self) -> Float[Tensor, "batch vocab"]:
        """Read each prompt once, and give its samples the distribution of their first token."""

    def step(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Append a token to each row, and give the distribution of the next one."""

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows alone, in this order."""


def decodes(model: PreTrainedModel) -> bool:
    """Whether the architecture is exactly the one that ``FamilyDecoder`` computes."""
    if type(model) not in FAMILY:
        return False
    config = model.config
    rope = config.rope_parameters
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    windowed = isinstance(model, MistralForCausalLM) and config.sliding_window is not None
    return (
        rope["rope_type"] in FIXED_ROTATIONS
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and set(kinds) == {"full_attention"}
        and not windowed
        and all(merges(linear) for linear in _projections(model))  # no quantisation
        and type(model.lm_head) is nn.Linear
        and all(type(parameter) is nn.Parameter for parameter in model.parameters())  # nothing quantised or sharded
        and {parameter.device for parameter in model.parameters()} == {model.device}
    )


def _projections(model: Any) -> list[Any]:
    """The linear layers of the body."""
    parts = [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]
    return [module for part in parts for name, module in part.named_children() if name.endswith("_proj")]


def decoder(
    model: PreTrainedModel,
    prompt_ids: Sequence[Int[Tensor, " _"]],
    *,
    samples_per_prompt: int,
    max_completion_length: int,
) -> Decoder:
    """The fastest decoder that computes what the model computes."""
    if sharding_of(model) is None and decodes(model) and has_room(model):
        return FamilyDecoder(
            model, prompt_ids, samples_per_prompt=samples_per_prompt, max_completion_length=max_completion_length
        )
    known = plain_class(model) in FAMILY
    kind = TransformersDecoder if known or steps_as_whole_rows(model) else WholeRowDecoder
    return kind(model, prompt_ids, samples_per_prompt=samples_per_prompt)


def has_room(model: PreTrainedModel) -> bool:
    """Whether the GPU has room for the decoder's own weights, where it needs any; a CPU's memory is not looked at."""
    needed, free = copied_bytes(model), free_bytes(model.device)
    if needed <= free:
        return True
    rank_zero_warn(
        f"sampling goes through transformers' forward, which is slower: the decoder's own weights would take "
        f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; a smaller data.batch_size makes room"
    )
    return False


def copied_bytes(model: Any) -> int:
    """What :func:`lightning_modules.generation.projections.projection` makes of the weights: copies, or nothing."""
    dtype = compute_dtype(model)
    linears = [*_projections(model), model.lm_head]
    copied = [layer for layer in linears if hasattr(layer, "lora_A") or layer.weight.dtype != dtype]
    return int(sum(layer.weight.numel() for layer in copied)) * dtype.itemsize
