"""What of a module is different where an adapter is all that trains: what is loaded, and what a checkpoint holds."""

import functools
import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from core.errors import ConfigurationError
from lightning_modules.models.adapter_files import LoraOptions, base_of
from lightning_modules.models.adapters import add_adapter, halve_frozen, merged_weights
from lightning_modules.models.identity import tensors_digest
from lightning_modules.models.loading import Quantization, freeze_unread, load_config
from lightning_modules.models.parts import whole


class AdaptedModule(LightningModule):
    """A module with a ``model`` whose weights are all trained, or frozen beside an adapter."""

    model_name: str
    model: PreTrainedModel
    lora: LoraOptions | None = None
    quantization: Quantization | None = None

    def use_adapter(self, lora: LoraOptions | None, quantization: Quantization | None) -> None:
        """Train an adapter, where options of one are given, beside weights that may be quantised.

        Raises:
            ConfigurationError: If the weights are to be quantised and trained, or what does it is not installed.
        """
        if quantization is not None and lora is None:
            raise ConfigurationError("model.quantization keeps weights that cannot be trained; set model.lora.rank too")
        if quantization is not None and find_spec("bitsandbytes") is None:
            raise ConfigurationError("model.quantization needs the package bitsandbytes (the extra [quantized])")
        self.lora = lora
        self.quantization = quantization
        self.strict_loading = lora is None  # a checkpoint then has what is trained alone

    @property
    def loaded_name(self) -> str:
        """The model whose weights are loaded: of an adapter that goes on training, the base."""
        return self.model_name if self.lora is None else base_of(self.model_name)

    def prepared(self, model: PreTrainedModel) -> PreTrainedModel:
        """A loaded model in training mode, with the adapter where one is to be trained."""
        if self.lora is not None:
            add_adapter(model, self.lora, start=self.model_name, seed=int(global_seed()))
            if getattr(self._trainer, "precision", None) == "bf16-mixed" and self.base_dtype == torch.bfloat16:
                halve_frozen(model)
        freeze_unread(model)
        model.train()
        return model

    @override
    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """What a checkpoint holds: all weights, or what is trained where that is an adapter."""
        state: dict[str, Any] = super().state_dict(*args, **options)
        if self.lora is None:
            return state
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in state.items() if name in trained}

    def exported_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights as ``final/`` holds them: an adapter is merged in float32, then all have the base's own dtype.

        Those that are tied once. Of a sharded model every process gets them, and must take all.
        """
        for name, value in merged_weights(self.model):
            cast = self.lora is not None and value.is_floating_point()
            yield name, value.to(self.base_dtype) if cast else value

    def trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that train, by their names in the model; of a sharded model as above."""
        self.model.state_dict()  # puts a sharded model back into its parts
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, whole(parameter.detach())

    @property
    def base_dtype(self) -> torch.dtype:
        """What the model's own files are in."""
        dtype = getattr(load_config(self.loaded_name), "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.lora is not None:
            checkpoint["base"] = self.base_digest

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse an adapter of other weights, or of another shape."""
        if self.lora is None:
            return
        if checkpoint.get("base") != self.base_digest:
            raise ConfigurationError(
                f"the checkpoint's adapter belongs to other weights than those of {self.model_name}; name the model "
                "that the run began with in model.model_name"
            )
        saved = checkpoint.get("state_dict") or checkpoint["weights"]  # of a sharded one the names alone are here
        if differing := set(self.state_dict()) ^ set(saved):
            raise ConfigurationError(f"the checkpoint's adapter is another: only one of the two has {min(differing)}")

    @functools.cached_property
    def base_digest(self) -> str:
        """Of all that is frozen: what the adapter is trained beside, and what it was at the start."""
        return tensors_digest(p for p in self.model.parameters() if not p.requires_grad)


def global_seed() -> str:
    """The run's seed, which Lightning hands to every process in this variable."""
    return os.environ.get("PL_GLOBAL_SEED", "0")
