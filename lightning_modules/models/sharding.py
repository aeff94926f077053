"""FSDP2: each process keeps a part of every weight, and the weights of a layer are gathered while it runs.

Zhao et al. 2023, https://arxiv.org/abs/2304.11277, in torch's second form of it, ``fully_shard``. The layers of a model
are units of their own; what is left, the embeddings, the last norm and the output head, belongs to the model, which
gathers it when its forward pass begins and gives it up when its backward pass has ended. So every pass of a sharded
model begins with a call of the model itself (:func:`run`), and its head may be read from then on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from core.errors import ConfigurationError
from core.memory import free_bytes
from core.turns import in_turn
from lightning_modules.models.adapters import merged_weights
from lightning_modules.models.loading import float32_bytes

WHILE_LOADED = 1.1
"""What a process takes while it loads a model, over the model's float32 weights."""


class Sharding(NamedTuple):
    """How a model is cut up."""

    mesh: DeviceMesh
    """The processes that share a model; where it has two dimensions, rows of them with a copy each."""
    compute: torch.dtype | None
    """What weights are gathered and multiplied in; None for what they are kept in."""


_KNOWN: "WeakKeyDictionary[nn.Module, Sharding]" = WeakKeyDictionary()


def shard(model: PreTrainedModel, sharding: Sharding) -> None:
    """Keep this process's part of a model's weights, and gather the rest layer by layer in its passes.

    Gradients are averaged over all processes, in float32.

    Raises:
        ConfigurationError: If it is not known which of its modules are its layers.
    """
    layers = layers_of(model)
    if not layers:
        raise ConfigurationError(
            f"{type(model).__name__} names none of its modules as layers, so it cannot be sharded; take "
            "--trainer.strategy ddp"
        )
    mesh, compute = sharding
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    score = getattr(model, "score", None)
    if isinstance(score, nn.Linear):
        fully_shard(score, mesh=mesh)  # in float32, as half precision would round the scores
    fully_shard(model, mesh=mesh, mp_policy=precision)
    _KNOWN[model] = sharding


@contextmanager
def turn_to_load(model_name: str, *, option: str = "model.model_name", processes: int = 1) -> Iterator[None]:
    """While a model is loaded, and until it is sharded: as many processes at once as the machine has room for.

    Args:
        model_name: Its hub id or directory.
        option: The option to name in an error.
        processes: How many of the run are on this machine; that they take turns is said where they do.
    """
    needed = WHILE_LOADED * float32_bytes(model_name, option=option)
    waits = f"waiting to load {model_name}: other processes of this machine load what its memory has room for"
    with in_turn(needed, lambda: rank_zero_info(waits)) as count:
        if count < processes:
            each = f"{count} at a time, as it takes {needed / 1e9:.1f} GB of the machine's memory"
            rank_zero_info(f"{processes} processes load {model_name} in turns, {each}")
        yield


def sharding_of(model: nn.Module) -> Sharding | None:
    """How a model is cut up; None where it is whole."""
    return _KNOWN.get(model)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that the model's class names as those that belong together."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def run(model: Any, part: nn.Module, **inputs: Any) -> Any:
    """Run a part of a model, as its body, as the model's forward pass.

    What a sharded model gathers for itself stays gathered until the backward pass, or until its state is next read.
    """
    if not isinstance(model, FSDPModule):
        return part(**inputs)
    model.forward = part.__call__  # type: ignore[attr-defined]  # what torch calls between its hooks
    try:
        return model(**inputs)  # type: ignore[operator]
    finally:
        del model.forward  # type: ignore[attr-defined]


def plain_class(model: nn.Module) -> type[nn.Module]:
    """The class that a model had before it was sharded."""
    return type(model).__mro__[2] if isinstance(model, FSDPModule) else type(model)


def assembled(model: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A model of the same kind with these weights, in their own storage, and the same buffers.

    Args:
        model: Sharded, with an adapter or without.
        weights: By their names in a model that has neither; those that are tied once.
    """
    config = model.config.__class__.from_dict(model.config.to_dict())
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        made: Any = plain_class(model)(config)
    for name, buffer in model.named_buffers():
        owner, _, last = name.rpartition(".")
        made.get_submodule(owner)._buffers[last] = buffer
    made.load_state_dict(weights, assign=True, strict=False)
    made.tie_weights()
    if lacking := [name for name, weight in made.named_parameters() if weight.is_meta]:
        raise RuntimeError(f"{type(made).__name__} has no {lacking[0]} where its weights are put together")
    if model.can_generate():
        made.generation_config = model.generation_config
    whole_model: PreTrainedModel = made.requires_grad_(False)
    return whole_model


@contextmanager
def gathered(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model meanwhile as each process can sample from it at its own pace: itself, or of a sharded one a copy.

    A copy is whole and has the weights of now, an adapter among them, in what they are multiplied in; its memory is
    given back at the end. Every process must come at the same point; within, none waits for another.

    Where a device has no room for a copy the sharded model itself is given, and is sampled from :func:`in_step`.
    """
    sharding = sharding_of(model)
    if sharding is None or not has_room(model, sharding):
        yield model
        return
    with torch.no_grad():
        copy = assembled(model, dict(merged_weights(model, sharding.compute)))
    yield copy.train(model.training)


@contextmanager
def in_step(model: PreTrainedModel) -> Iterator[None]:
    """Where a model is sharded, pass along idly once done, as others may have passes to make; each is to :func:`go_on`.

    Every process must come here; who fails within still passes along.
    """
    try:
        yield
    finally:
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        while sharding_of(model) is not None and go_on(model, here=False):
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)


def has_room(model: PreTrainedModel, sharding: Sharding) -> bool:
    """Whether every process that shares the model has room for all of it."""
    needed = sum(p.numel() * (sharding.compute or p.dtype).itemsize for p in model.parameters())
    if over_shards(model, float(free_bytes(model.device) >= needed), dist.ReduceOp.MIN):
        return True
    rank_zero_warn(
        f"sampling gathers each layer for each token, which is slow: a GPU has no room for the {needed / 1e9:.1f} GB "
        "of a whole copy; a smaller data.batch_size makes room"
    )
    return False


def go_on(model: PreTrainedModel, *, here: bool = True) -> bool:
    """Whether any process that shares the model has another pass to make; all then make one."""
    return over_shards(model, float(here), dist.ReduceOp.MAX) > 0


def over_shards(model: PreTrainedModel, value: float, operation: Any) -> float:
    """The least or greatest of a value over the processes that share the model."""
    sharding = sharding_of(model)
    assert sharding is not None
    found = torch.tensor(value, device=model.device)
    dist.all_reduce(found, operation, group=sharding.mesh.get_group(sharding.mesh.ndim - 1))
    return float(found)
