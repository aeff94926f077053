"""The optimiser, the mean over everything in one of its steps, and whether the step is sound."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from core.errors import ConfigurationError
from lightning_modules.models.parts import local, whole

MOST_UNMOVED = 0.5
"""Beyond this share of weights that steps cannot move a run learns next to nothing, and nothing else would say so."""


class OptimiserStep:
    """What an optimiser step has come to so far: the sum of its losses, and the number that their mean is over."""

    def __init__(self) -> None:
        self.count_and_loss = torch.zeros(2)

    def add(self, losses: Float[Tensor, "..."], count: Float[Tensor, ""] | Tensor | int) -> None:
        """Add a micro-batch."""
        device = losses.device
        count_and_loss = torch.stack([torch.as_tensor(count, device=device).float(), losses.detach().float().sum()])
        self.count_and_loss = self.count_and_loss.to(device) + count_and_loss

    def finish(
        self, parameters: Iterable[Parameter], *, over_ranks: Callable[[Tensor], Tensor], averaged: int, scaled: bool
    ) -> tuple[Float[Tensor, ""], str]:
        """Make the gradients those of the mean, or none where the step is not sound, and begin the next step.

        An optimiser passes over what has no gradient, so a step that is not sound changes no weight and no moment.

        Args:
            parameters: Of the module, with their gradients.
            over_ranks: Sums a tensor over the ranks.
            averaged: What the gradients are divided by already: Lightning divides by the batches of the step, the
                strategy by the ranks.
            scaled: Whether a gradient scaler looks for infinite gradients, and expects some.

        Returns:
            The norm of the gradients, over all of them, and why the step is not sound; empty where it is. Both are
            the same on every rank.
        """
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        total, loss = over_ranks(self.count_and_loss.clone()).unbind()
        self.count_and_loss = torch.zeros_like(self.count_and_loss)
        factor = averaged / total if total > 0 else torch.zeros_like(total)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        for gradient in gradients:
            part = local(gradient)
            part.mul_(factor.to(part))
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        flaw = _flaw(total, loss, norm, scaled=scaled)
        for parameter in trained if flaw else ():
            parameter.grad = None
        return norm, flaw


def _flaw(total: Float[Tensor, ""], loss: Float[Tensor, ""], norm: Float[Tensor, ""], *, scaled: bool) -> str:
    """Why a step is not sound."""
    if not loss.isfinite():
        return f"its loss is {loss.item()}"
    if not norm.isfinite() and not scaled:
        return f"the norm of its gradient is {norm.item()}"
    if total == 0:
        return "nothing in it can be learned from, as nothing was scored"
    return ""


def unmoved(parameters: Sequence[Parameter], step: float) -> float:
    """The share of the numbers in half precision among the parameters that a step leaves as they are, up and down."""
    half = [local(parameter.detach()) for parameter in parameters if parameter.dtype.itemsize < 4]
    count = sum(part.numel() for part in half)
    stuck = sum(int(((part + step == part) & (part - step == part)).sum()) for part in half)
    return stuck / count if count else 0.0


def make_optimizer(
    trained: Sequence[Parameter],
    other: Callable[[Iterable[Any]], Optimizer] | None,
    *,
    learning_rate: float,
    weight_decay: float,
    scaled: bool,
) -> Optimizer:
    """AdamW, or another; matrices have the weight decay, biases and norms none.

    Args:
        trained: What to train.
        other: Makes another from groups of parameters.
        learning_rate: Of all groups.
        weight_decay: Of the matrices.
        scaled: Whether gradients come from a gradient scaler.

    Raises:
        ConfigurationError: If the other one does not take them, or AdamW's steps are less than most of them can take.
    """
    if other is None and (share := unmoved(trained, learning_rate)) > MOST_UNMOVED:
        raise ConfigurationError(
            f"{share:.0%} of the weights would stay where they are: in half precision a step of model.learning_rate "
            f"{learning_rate:g} is rounded away. Set trainer.precision bf16-mixed, which keeps them in float32, or "
            "name a model.optimizer that rounds at random or keeps copies of its own"
        )
    matrices, others = ([p for p in trained if (p.ndim >= 2) is decayed] for decayed in (True, False))
    groups = [
        {"params": parameters, "weight_decay": decay, "lr": learning_rate}
        for parameters, decay in ((matrices, weight_decay), (others, 0.0))
        if parameters
    ]
    # A fused step under a gradient scaler unscales by itself, after clipping would have been due.
    fused = all(p.device.type in ("cuda", "cpu") for p in trained) and not scaled
    try:
        return AdamW(groups, fused=fused) if other is None else other(groups)
    except (TypeError, ValueError) as error:  # Muon takes matrices alone
        raise ConfigurationError(f"model.optimizer does not take what is trained here: {error}") from error
