"""FSDP2 under Lightning: who shares a model's weights, and checkpoints to which every process writes its part."""

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer
from typing_extensions import override

from callbacks.checkpoints.sharded_checkpoint import GROUPS, WEIGHTS, named_tensors, read_shards, write_shards
from core.errors import ConfigurationError
from lightning_modules.base import FineTuningModule
from lightning_modules.models.sharding import Sharding

COMPUTE = {"32-true": None, "bf16-mixed": torch.bfloat16}
"""What weights are gathered in, by ``trainer.precision``; they are kept, and stepped, in float32."""


class ShardedStrategy(ModelParallelStrategy):
    """Fully sharded data parallelism: weights, gradients and optimiser are cut up, the data is as under DDP.

    Args:
        data_parallel_size: Processes that share the weights; ``auto`` for all of them. With fewer, as the GPUs of one
            machine, each such group has a copy, and gradients are summed over the groups (HSDP).
        tensor_parallel_size: Processes that share each product; 1, as nothing here is cut up that way.
        timeout_s: How long a process waits for the others within a collective, in seconds.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        timeout_s: float = 1800.0,
    ) -> None:
        super().__init__(data_parallel_size, tensor_parallel_size, timeout=timedelta(seconds=timeout_s))
        self.writes: bool | None = None
        """Whether this process writes what is the same on all; None for the first one alone."""

    def check_options(self, module: FineTuningModule) -> None:
        """What can be wrong before any process is started.

        Raises:
            ConfigurationError: Naming the option to change.
        """
        if self._tensor_parallel_size != 1:
            raise ConfigurationError(
                f"trainer.strategy.tensor_parallel_size must be 1, got {self._tensor_parallel_size}: layers are "
                "sharded, not their products"
            )
        processes = self.num_nodes * self.num_processes
        size = processes if self._data_parallel_size == "auto" else self._data_parallel_size
        if size < 1 or processes % size:
            raise ConfigurationError(
                f"trainer.strategy.data_parallel_size must divide the {processes} processes, got {size}; change it, "
                "trainer.devices or trainer.num_nodes"
            )
        precision = self.precision_plugin.precision
        if precision not in COMPUTE:
            raise ConfigurationError(
                f"a sharded model is kept in float32, so trainer.precision must be {' or '.join(COMPUTE)}, got "
                f"{precision}"
            )
        if module.quantization is not None:
            raise ConfigurationError("a quantised model cannot be sharded; unset model.quantization, or take ddp")
        if module.compile_model:
            raise ConfigurationError("a sharded model is not compiled; unset model.compile, or take ddp")

    @override
    def setup_environment(self) -> None:
        self.accelerator.setup_device(self.root_device)  # type: ignore[union-attr]  # as ParallelStrategy's own does
        self._setup_distributed()
        size = self.world_size if self._data_parallel_size == "auto" else self._data_parallel_size
        copies = self.world_size // size
        shape, names = ((copies, size), ("copies", "shards")) if copies > 1 else ((size,), ("shards",))
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    @property
    def sharding(self) -> Sharding:
        """How each model of the run is cut up."""
        return Sharding(self.device_mesh, COMPUTE[str(self.precision_plugin.precision)])

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @override
    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop):
            loop.inference_mode = False  # weights gathered in it could not be trained on later

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.model is not None
        return get_optimizer_state_dict(self.model, plain(optimizer))

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a directory: every process's parts of weights and optimiser, and beside them what all have alike."""
        weights, optimizers = checkpoint.pop("state_dict"), checkpoint.pop("optimizer_states", [])
        groups = [state["param_groups"] for state in optimizers]
        content = {**checkpoint, WEIGHTS: sorted(weights), GROUPS: groups}
        tensors = named_tensors(weights, [state["state"] for state in optimizers])
        write_shards(
            tensors, content, Path(filepath), writes=self.is_global_zero if self.writes is None else self.writes
        )

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        module, model = self.lightning_module, self.model
        assert module is not None
        assert model is not None
        optimizers = [plain(optimizer) for optimizer in self.optimizers]
        weights = module.state_dict()
        states: list[Any] = [get_optimizer_state_dict(model, optimizer)["state"] for optimizer in optimizers]
        content = read_shards(Path(checkpoint_path), named_tensors(weights, states))
        module.load_state_dict(weights, strict=module.strict_loading)
        saved = content[GROUPS] if optimizers else []  # a validation has no use for them
        for optimizer, state, groups in zip(optimizers, states, saved, strict=True):
            set_optimizer_state_dict(model, optimizer, optim_state_dict={"state": state, "param_groups": groups})
        return content


def plain(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    """The optimiser without what Lightning puts around it."""
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
