"""Tensors that each process has a part of, as sharding makes them (``sharding.py``), beside those that are whole."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """All of a weight or gradient; every process must ask for it at the same point."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part, in the storage that it has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
