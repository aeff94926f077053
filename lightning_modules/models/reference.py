"""What a policy is compared with while it trains: a frozen model, or the policy itself as it was."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_modules.models.adapters import at_start
from lightning_modules.models.loading import load_causal_lm, without_dropout
from lightning_modules.models.sharding import shard, sharding_of, turn_to_load


@runtime_checkable
class Reference(Protocol):
    """A model that does not train, no submodule of who has it: in no checkpoint and no optimiser."""

    def beside(self, policy: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """The reference meanwhile, on the policy's device and in its dtype; for passes without gradient."""

    def free(self) -> None:
        """Let go of its memory until it is asked for again."""


class FrozenReference(Reference):
    """A model of its own, sharded as the policy is.

    Args:
        load: Gives the model when it is first asked for, and again after it was freed.
        name: Its hub id or directory.
        option: The option that names it.
    """

    def __init__(self, load: Callable[[], PreTrainedModel], name: str, *, option: str = "model.model_name") -> None:
        self._load = load
        self._name = name
        self._option = option
        self._model: Any = None

    @override
    @contextmanager
    def beside(self, policy: PreTrainedModel) -> Iterator[PreTrainedModel]:
        with torch.inference_mode(False):  # in a validation its weights would become inference tensors for good
            sharding = sharding_of(policy)
            if self._model is None:
                with turn_to_load(self._name, option=self._option) if sharding else nullcontext():
                    self._model = without_dropout(self._load()).eval().requires_grad_(False)
                    if sharding is not None:
                        shard(self._model, sharding)
            if sharding is None:
                self._model.to(device=policy.device, dtype=policy.dtype)
        yield self._model

    @override
    def free(self) -> None:
        self._model = None


class PolicyAtStart(Reference):
    """The policy without what its adapter has learned: no second model, at any time."""

    @override
    @contextmanager
    def beside(self, policy: PreTrainedModel) -> Iterator[PreTrainedModel]:
        with at_start(policy):
            yield policy

    @override
    def free(self) -> None:
        pass


def make_reference(
    reference_model: str | None,
    *,
    adapted: bool,
    name: str,
    start: Callable[[], PreTrainedModel],
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    option: str = "model.reference_model",
) -> Reference:
    """The named reference, or the starting policy: itself, where an adapter is all that trains.

    Args:
        reference_model: Hub id or directory; None for the starting policy.
        adapted: Whether the policy has an adapter.
        name: Hub id or directory of the starting policy.
        start: Gives the policy as it was loaded.
        tokenizer: Gives the named reference's.
        option: The option that names it.
    """
    if reference_model is not None:
        return FrozenReference(
            lambda: load_causal_lm(reference_model, tokenizer(), option=option), reference_model, option=option
        )
    return PolicyAtStart() if adapted else FrozenReference(start, name)
