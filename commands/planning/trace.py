"""What a model's forward and backward pass take, found out by running them on tensors that have sizes and no content.

Two and three of the model's layers are run, and the rest is extrapolated, as layers are alike: seconds become tenths.
"""

import copy
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM
from typing_extensions import override

from datamodules.batches import TokenBatch
from lightning_modules.forward.attention import replace_attention
from lightning_modules.forward.layout import FlatBatch, flatten, model_inputs
from lightning_modules.functional.head import CHUNK_BYTES, head_log_probs
from lightning_modules.models.adapter_files import LoraOptions
from lightning_modules.models.adapters import add_adapter
from lightning_modules.models.loading import recompute_activations
from lightning_modules.models.parts import body_of

FEW, MORE = 2, 3
"""Layers that are run."""
LARGE = 32 * 2**20
"""Bytes from which glibc gives a tensor pages of its own, which go back when it goes; smaller ones share a heap, and
what has been freed there is kept."""


class Size(NamedTuple):
    """Bytes, and how many of them are in tensors that share a heap."""

    all: int
    small: int = 0

    def times(self, factor: float) -> "Size":
        """The size so many times."""
        return Size(round(self.all * factor), round(self.small * factor))


class Traced(NamedTuple):
    """Numbers of weights, and bytes beside weights and optimiser."""

    parameters: Size
    """Numbers, and not bytes, as their precision is another's affair; small where they are in float32."""
    trained: Size
    largest: Size
    """Of the embedding matrix."""
    forward: Size
    """The most that stands at a time in the forward pass, its head included."""
    passing: Size
    """The most that a forward pass takes at a time that leaves nothing."""
    early: Size
    """The most that stands at a time in the first half of the backward pass: what is kept, and what comes."""
    late: Size
    """The same in the second half, where gradients of the weights have taken its place."""

    @property
    def backward(self) -> Size:
        """The most that stands at a time in the backward pass."""
        return largest_of([self.early, self.late])


def added(sizes: Sequence[Size]) -> Size:
    """All of them together."""
    return Size(sum(size.all for size in sizes), sum(size.small for size in sizes))


def largest_of(sizes: Sequence[Size]) -> Size:
    """The most of all bytes, and of those in the heap, each at its own time."""
    return Size(max(size.all for size in sizes), max(size.small for size in sizes))


class Passes(NamedTuple):
    """How a model is run: as its training does."""

    dtype: torch.dtype = torch.float32
    """Of the weights."""
    autocast: torch.dtype | None = None
    """What operations run in, where that is another."""
    checkpointing: bool = False
    """Whether activations are made again in the backward pass."""
    lora: LoraOptions | None = None
    """The adapter, where one is trained."""
    head: Literal["", "known", "unknown", "entropy"] = "unknown"
    """How the output head is read: with its gradients known before (SFT), not (DPO), with entropies (RLOO), or not."""
    chunk_bytes: int = CHUNK_BYTES["cpu"]
    """Of the logits that exist at once."""


class LiveMemory(TorchDispatchMode):
    """Counts the storages that operations have made and that are still there.

    Args:
        model: Whose weights do not count.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = Size(0)
        self.history = [Size(0)]
        """After each operation."""
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in (*model.parameters(), *model.buffers())}

    @override
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.allclose.default:  # is the gradient as it was known to be?
            return True
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.history.append(self.now)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now = added([self.now, sized(storage.nbytes())])
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now = added([self.now, sized(self._sizes.pop(key, 0)).times(-1)])


def sized(count: int) -> Size:
    """The size of one tensor."""
    return Size(count, count if count < LARGE else 0)


def trace(config: Any, batch: TokenBatch, groups: Sequence[int] | None, how: Passes) -> Traced:
    """What the passes of a model take for a batch.

    Args:
        config: Of the model.
        batch: What is run; only its sizes count.
        groups: Rows that share their beginning, as for :func:`lightning_modules.forward.layout.flatten`.
        how: Precision, adapter and the like.
    """
    flat = flatten(batch, groups)
    predicted = int(batch.completion_mask.sum())
    layers = int(config.num_hidden_layers)
    if layers <= MORE:
        return _run(config, flat, predicted, layers, how)
    few, more = (_run(config, flat, predicted, count, how) for count in (FEW, MORE))
    return Traced(
        *(
            Size(*(a + (layers - FEW) * (b - a) // (MORE - FEW) for a, b in zip(less, size, strict=True)))
            for less, size in zip(few, more, strict=True)
        )
    )


def _run(config: Any, flat: FlatBatch, predicted: int, layers: int, how: Passes) -> Traced:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    model = _model(config, how)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _give_sizes(model)
        inputs = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in model_inputs(flat).items()
        }
        token_ids = torch.empty(predicted, dtype=torch.long)
        with torch.autocast("cpu", dtype=how.autocast or torch.bfloat16, enabled=how.autocast is not None):
            with LiveMemory(model) as live:
                loss = _loss(model, inputs, token_ids, how)
                began = len(live.history)
                loss.backward()
            with torch.no_grad(), LiveMemory(model) as passing:
                _loss(model, inputs, token_ids, how)
    half = (began + len(live.history)) // 2
    weights = [(counted(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return Traced(
        parameters=added([size for size, _ in weights]),
        trained=added([size for size, trained in weights if trained]),
        largest=counted(model.get_input_embeddings().weight),
        forward=largest_of(live.history[:began]),
        passing=largest_of(passing.history),
        early=largest_of(live.history[began:half]),
        late=largest_of(live.history[half:]),
    )


def counted(tensor: Tensor) -> Size:
    """How many numbers a tensor has, in float32 in the heap or not."""
    return Size(tensor.numel(), tensor.numel() if 4 * tensor.numel() < LARGE else 0)


def _loss(model: Any, inputs: dict[str, Any], token_ids: Tensor, how: Passes) -> Tensor:
    """The sum of what the head says of the predicted tokens, as the methods read it."""
    states = body_of(model)(**inputs).last_hidden_state[0]
    hidden: Tensor = states.index_select(0, token_ids)
    if not how.head:
        return hidden.sum()
    head, chunk = model.get_output_embeddings(), CHUNK_BYTES["cpu"]
    weights = torch.empty(len(token_ids)) if how.head == "known" else None
    CHUNK_BYTES["cpu"] = how.chunk_bytes
    try:
        entropy = how.head == "entropy"
        said = head_log_probs(hidden, head.weight, head.bias, token_ids, entropy=entropy, weights=weights)
        return said.log_probs.sum()
    finally:
        CHUNK_BYTES["cpu"] = chunk


def _model(config: Any, how: Passes) -> Any:
    """A model without weights."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=how.dtype)
        replace_attention(model)
        if how.lora is not None:
            add_adapter(model, how.lora, start="", seed=0)
        if how.checkpointing:
            recompute_activations(model, adapted=how.lora is not None)
        return model.train()


def _give_sizes(model: torch.nn.Module) -> None:
    """Under a fake mode, put tensors that are said to be on the CPU in the place of those on the meta device."""
    known: dict[int, Tensor] = {}  # what is tied stays so
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = torch.nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
                module._parameters[name] = known.setdefault(id(old), new)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = known.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype))
