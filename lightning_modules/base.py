"""What the methods share: options, loading, the optimiser, and the mean over everything in an optimiser step."""

import functools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from core.errors import ConfigurationError
from datamodules.base import ChatDataModule
from datamodules.chat import load_tokenizer, stop_token_ids
from datamodules.formats import Task
from lightning_modules.adapted import AdaptedModule, global_seed
from lightning_modules.models.adapter_files import LoraOptions
from lightning_modules.models.loading import (
    Quantization,
    load_causal_lm,
    load_config,
    most_tokens,
    recompute_activations,
)
from lightning_modules.models.parts import body_of
from lightning_modules.models.sharding import Sharding, shard, turn_to_load
from lightning_modules.optimiser_step import OptimiserStep, make_optimizer

Schedule = Literal["linear", "cosine", "constant_with_warmup"]
SHOWN = ("loss", "accuracy", "score")
"""Metrics that the progress bar shows."""


class FineTuningModule(AdaptedModule):
    """Base of the methods; a method adds its options, its ``training_step`` and its ``validation_step``.

    Args:
        model_name: Hub id or directory of the model to start from.
        learning_rate: Peak learning rate.
        weight_decay: Of matrices; biases and norms have none.
        schedule: How the learning rate falls after the warm-up.
        warmup_ratio: Share of all steps over which the learning rate rises from 0.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third slower.
        compile: Run the model through ``torch.compile``.
        lora: Train an adapter beside the frozen weights, which takes much less memory; not given for all weights.
        quantization: Keep the frozen weights in 4 bits (``nf4``) or 8 (``int8``), under ``lora`` (bitsandbytes).
        optimizer: Class and options of another than AdamW, by its import path (``torch.optim``, ``bitsandbytes.optim``,
            ``torchao.optim``); the learning rate and the weight decay are those above.
    """

    method: ClassVar[str]
    """Its short name, in run names and metrics of the tracking."""
    method_name: ClassVar[str] = ""
    """How it is called in full, for the model card; the short name in capitals where not given."""
    task: ClassVar[Task]
    """What a batch must hold."""
    can_generate: ClassVar[bool] = True
    reference_model: str | None = None

    def __init__(
        self,
        model_name: str = "Qwen/Qwen2.5-0.5B",
        learning_rate: float = 1e-5,
        weight_decay: float = 0.0,
        schedule: Schedule = "cosine",
        warmup_ratio: float = 0.1,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        lora: LoraOptions | None = None,
        quantization: Quantization | None = None,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
    ) -> None:
        super().__init__()
        require(learning_rate > 0, "model.learning_rate must be positive", learning_rate)
        require(weight_decay >= 0, "model.weight_decay must not be negative", weight_decay)
        require(0 <= warmup_ratio <= 1, "model.warmup_ratio must be within 0..1", warmup_ratio)
        self.model_name = model_name
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.warmup_ratio = warmup_ratio
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_model = compile
        self.optimizer = optimizer
        self.use_adapter(lora, quantization)
        self._step = OptimiserStep()
        self._part: str | None = None  # of the data that is being validated
        self._counts = True  # whether it counts here, and not on another process
        self.step_flaw = ""
        """Why the last optimiser step was skipped; empty where it was sound."""

    def check_options(self, data: LightningDataModule | None) -> None:
        """Whatever can be wrong before any row is read or weight loaded.

        Raises:
            ConfigurationError: Naming the option to change.
        """
        task = getattr(data, "task", self.task)
        if task != self.task:
            raise ConfigurationError(
                f"{type(self).__name__} trains on {self.task}, the data module yields {task}; "
                f"set data.task to {self.task}, or take a dataset that has them"
            )
        limit = most_tokens(load_config(self.model_name))
        longest = self.longest_sequence(data)
        if limit is not None and longest > limit:
            raise ConfigurationError(
                f"{self.model_name} reads at most {limit} tokens, sequences may have {longest}; "
                "lower data.max_length (or model.max_completion_length)"
            )
        if self.reference_model is not None:
            load_config(self.reference_model, option="model.reference_model")

    def longest_sequence(self, data: LightningDataModule | None) -> int:
        """The most tokens a sequence of this run may have."""
        return int(getattr(data, "max_length", 0))

    @override
    def setup(self, stage: str) -> None:
        self.check_options(getattr(self.trainer, "datamodule", None))

    @override
    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        self.tokenizer = self.load_tokenizer()
        sharding, processes = self.sharding, getattr(self._trainer, "num_devices", 1)
        with turn_to_load(self.loaded_name, processes=processes) if sharding else nullcontext():
            self.model = self.load_model()
            if self.gradient_checkpointing:
                recompute_activations(self.model, adapted=self.lora is not None)
            if self.compile_model:
                body_of(self.model).compile()  # what every forward pass goes through
            if sharding is not None:
                shard(self.model, sharding)
        # Constant buffers (rotary frequencies): broadcasting them each forward would make ranks with a batch more wait.
        buffers = [name for name, _ in self.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, buffers)

        names = list(self.validation_metrics())
        parts = getattr(getattr(self._trainer, "datamodule", None), "part_names", ())
        names += [f"{part}/{name}" for part in parts for name in names]
        self.val_metrics = torch.nn.ModuleDict({name: MeanMetric() for name in names})

    @property
    def sharding(self) -> Sharding | None:
        """How the strategy has the model cut up; None where it is whole on every process."""
        return getattr(getattr(self._trainer, "strategy", None), "sharding", None)

    def validation_metrics(self) -> Sequence[str]:
        """Names of what a validation takes the mean of, logged under ``val/``."""
        return ()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with the chat template that the data names where it names one."""
        data = getattr(self._trainer, "datamodule", None)
        return load_tokenizer(self.model_name, chat_template=getattr(data, "chat_template", None))

    def load_model(self) -> PreTrainedModel:
        """The model to train."""
        return self.prepared(load_causal_lm(self.loaded_name, self.tokenizer, quantization=self.quantization))

    def stop_token_ids(self) -> list[int]:
        """The tokens that end a completion: the template's end of turn, and the model's end of text."""
        return stop_token_ids(self.tokenizer)

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        from transformers import get_scheduler  # and with it peft, where that is installed

        optimizer = make_optimizer(
            [parameter for parameter in self.parameters() if parameter.requires_grad],
            self.optimizer,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            scaled=self._gradient_scaler() is not None,
        )
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = get_scheduler(
            self.schedule,
            optimizer,
            num_warmup_steps=round(self.warmup_ratio * steps),
            num_training_steps=steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def sum_for_step(self, losses: Tensor, count: Tensor | int) -> Tensor:
        """Sum the losses, to be divided by the count of the whole optimiser step once it is known.

        The mean is over all micro-batches and ranks together, so splitting a batch changes nothing.

        Args:
            losses: One per token, pair or prompt.
            count: How many units they make up; a prompt without a scored sample, say, may be no unit.
        """
        self._step.add(losses, count)
        return losses.sum()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set every stream of random numbers by where in the run this batch is, so that none needs to be kept.

        What a validation or an evaluation draws then changes no step, and a run that is resumed draws what it would
        have drawn.
        """
        words = global_seed(), self.current_epoch, batch_idx, self.global_rank
        seed = random.Random("-".join(map(str, words))).getrandbits(32)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self._grad_norm, self.step_flaw = self._step.finish(
            self.parameters(),
            over_ranks=functools.partial(self.trainer.strategy.reduce, reduce_op="sum"),
            averaged=self.trainer.accumulate_grad_batches * self.trainer.world_size,
            scaled=self._gradient_scaler() is not None,
        )
        self.log("train/grad_norm", self._grad_norm, batch_size=1)

    @override
    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # or they would stand beside the next forward pass's activations, and a validation's

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        by_norm = gradient_clip_algorithm in (None, "norm")
        if gradient_clip_val and by_norm and self._gradient_scaler() is None:
            # Lightning refuses this for a fused optimiser under bf16-mixed, where nothing needs unscaling.
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, self._grad_norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _gradient_scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    @override
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        data = getattr(self.trainer, "datamodule", None)
        own = data if isinstance(data, ChatDataModule) else None
        self._part = own.validation_part(batch_idx) if own else None
        self._counts = own is None or batch_idx < own.counted_batches

    def update_val(self, metrics: Mapping[str, Tensor]) -> None:
        """Add values to the means of this validation and of the part at hand; another process's rows do not count."""
        if not self._counts:
            return
        for name, values in metrics.items():
            for mean in (name, f"{self._part}/{name}"):
                if mean in self.val_metrics and values.numel():
                    self.val_metrics[mean].update(values)  # type: ignore[operator]

    @override
    def on_validation_epoch_end(self) -> None:
        for name, metric in self.val_metrics.items():
            self.log(f"val/{name}", metric.compute(), prog_bar=name in SHOWN)  # type: ignore[operator]
            metric.reset()  # type: ignore[operator]

    @property
    def is_first_step(self) -> bool:
        """Whether no weight has changed and no step been taken, this one included."""
        return self.trainer.training and self.trainer.global_step == 0 and self.trainer.fit_loop.batch_idx == 0

    def log_step(self, metrics: dict[str, Any], *, batch_size: int) -> None:
        """Log training metrics of this step."""
        for name, value in metrics.items():
            self.log(f"train/{name}", value, prog_bar=name in SHOWN, batch_size=batch_size)


def require(condition: bool, rule: str, value: object) -> None:
    """Raise a ConfigurationError that states the rule and the value unless the condition holds."""
    if not condition:
        raise ConfigurationError(f"{rule}, got {value}")
