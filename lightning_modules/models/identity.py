"""What tells a model from another of the same name: a digest of its content.

Of a sharded model every process computes it, at the same point.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from lightning_modules.models.adapter_files import base_of, is_adapter
from lightning_modules.models.adapters import active_state
from lightning_modules.models.parts import whole

CONTENT = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}
BLOCK = 1 << 22
INDIFFERENT = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
"""Entries of a configuration that change no logit."""


def directory_digest(model_name: str) -> str:
    """Of a model directory's weights, configuration, tokenizer and template; of a hub model its commit."""
    directory = Path(model_name)
    if is_adapter(model_name):
        return f"{_files_digest(directory)} of {directory_digest(base_of(model_name))}"
    if not directory.is_dir():
        return f"{model_name}@{getattr(AutoConfig.from_pretrained(model_name), '_commit_hash', None)}"
    return _files_digest(directory)


def _files_digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.suffix in CONTENT and file.is_file():
            digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
            with file.open("rb") as content:
                while block := content.read(BLOCK):
                    digest.update(block)
    return digest.hexdigest()


def weights_digest(model: PreTrainedModel) -> str:
    """Of a model as it is: its configuration, and every parameter's and buffer's name, type, shape and bytes.

    Of its adapters the active one counts; without one it has the digest of the model before it was given any.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in INDIFFERENT}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(active_state(model).items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Of weights alone, whatever they are called and in whatever precision they are kept; tied ones count once."""
    digests = set()
    for tensor in tensors:
        plain = whole(tensor.detach()).cpu()
        plain = (plain.float() if plain.is_floating_point() else plain).contiguous()
        digest = hashlib.sha256(str(tuple(plain.shape)).encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        digests.add(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def saved_tensors(directory: Path) -> Iterator[Tensor]:
    """The tensors of a model directory, one after the other."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118  # it is no dict
                yield content.get_tensor(name)
