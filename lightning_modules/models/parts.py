"""Parts of a model: its body, and what each process has of a tensor that sharding cut up (``sharding.py``)."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def body_of(model: PreTrainedModel) -> Any:
    """The model without its head; where its class gives it a name that it has not, as Llama 4's, by the usual one."""
    return model.base_model if model.base_model is not model else model.model


def whole(tensor: Tensor) -> Tensor:
    """All of a weight or gradient; every process must ask for it at the same point."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part, in the storage that it has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
