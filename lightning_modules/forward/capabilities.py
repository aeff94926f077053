"""What a model's forward pass allows, found out once on the model itself, by comparing with its plain forward pass."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from core.errors import is_of_another_process
from datamodules.batches import TokenBatch, pad
from lightning_modules.forward import attention
from lightning_modules.forward.layout import flatten, model_inputs, position_ids
from lightning_modules.generation.modes import evaluating
from lightning_modules.models.parts import body_of
from lightning_modules.models.sharding import plain_class, run


class Capabilities(NamedTuple):
    """What may be done with a model."""

    longest_flat_row: float
    """Rows up to this length may be laid flat: 0 for none, the attention's window where it has one, or infinity."""
    plain_head: bool
    """Whether the logits are the output head of the last hidden states, with nothing done to them."""


_KNOWN: "WeakKeyDictionary[PreTrainedModel, Capabilities]" = WeakKeyDictionary()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def capabilities(model: PreTrainedModel) -> Capabilities:
    """What may be done with a model, as it is when this is first asked: on its device, and in its precision.

    Rows are laid flat only under :func:`lightning_modules.forward.attention.replace_attention`, as loading gives it.
    """
    if model not in _KNOWN:
        with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            _KNOWN[model] = Capabilities(_longest_flat_row(model), _has_plain_head(model))
    return _KNOWN[model]


def _longest_flat_row(model: PreTrainedModel) -> float:
    name = plain_class(model).__name__
    config: Any = model.config.get_text_config()
    if getattr(body_of(model), "_compiled_call_impl", None) is not None:
        rank_zero_info(f"{name}: batches stay padded, as flat ones would be compiled again and again")
        return 0.0
    if config._attn_implementation != attention.NAME:
        rank_zero_info(f"{name}: attention {config._attn_implementation!r} takes no flat rows, so batches stay padded")
        return 0.0
    difference, reason = attempted(lambda: _flat_difference(model), "gives other hidden states")
    if difference > (5e-3 if is_exact(model) else 0.05):  # rounding, where other tokens attended to make more than 0.1
        rank_zero_info(f"{name}: a batch without padding {reason}, so batches stay padded")
        return 0.0
    windows = [getattr(config, option, None) for option in ("sliding_window", "attention_chunk_size")]
    return min((float(window) for window in windows if window), default=math.inf)


def attempted(probe: Callable[[], float], otherwise: str) -> tuple[float, str]:
    """By how much a model's numbers differ where it is used in another way, and what to say if that is too much.

    A model that fails there differs without end. What is not its own doing is raised.
    """
    try:
        difference = probe()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model may do with inputs that it does not know
        if is_of_another_process(error):
            raise
        told = str(error).strip() or type(error).__name__
        return math.inf, f"fails ({told.splitlines()[0]})"
    return (difference if math.isfinite(difference) else math.inf), otherwise


def is_exact(model: PreTrainedModel) -> bool:
    """Whether the model computes in float32, here and now."""
    return model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)


def _probe(model: PreTrainedModel) -> TokenBatch:
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [ids[:4] + ids[5:8], ids[:4] + ids[8:], ids[2:6]]
    batch = pad(rows, [[True] * len(row) for row in rows], pad_token_id=0)
    return batch.to(model.device)


def _flat_difference(model: PreTrainedModel) -> float:
    """By how much hidden states of flat rows differ from those of padded ones, relative to their size."""
    batch = _probe(model)
    body = body_of(model)
    padded: Tensor = run(model, body, **padded_inputs(batch)).last_hidden_state[batch.attention_mask]
    laid_flat = flatten(batch, groups=[0, 0, 1])
    flat: Tensor = run(model, body, **model_inputs(laid_flat)).last_hidden_state[0, laid_flat.flat_index]
    return float(((flat - padded).float().norm(dim=-1) / padded.float().norm(dim=-1)).max())


def padded_inputs(batch: TokenBatch) -> dict[str, Any]:
    """What a model takes of a padded batch."""
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": position_ids(batch.attention_mask),
        "use_cache": False,
    }


def _has_plain_head(model: PreTrainedModel) -> bool:
    """Put large logits of our own in the place of the head's: a plain model hands them on as they are."""
    head: Any = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return False
    batch = _probe(model)
    taken, given = [], []

    def replace(_: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        taken.append(inputs[0])
        given.append(100 * torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output))
        return given[-1]

    handle = head.register_forward_hook(replace)
    try:
        logits = model(**padded_inputs(batch)).logits
    finally:
        handle.remove()
    body = body_of(model)
    hidden = run(model, body, **padded_inputs(batch)).last_hidden_state
    if len(given) == 1 and torch.equal(logits, given[0]) and torch.allclose(taken[0], hidden, rtol=1e-2, atol=1e-2):
        return True
    rank_zero_info(f"{type(model).__name__}: its logits are more than its output head, so they are computed in full")
    return False
