"""Loading models: from the hub or a directory, every tensor accounted for, in float32 master weights."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from core.errors import ConfigurationError
from core.text import told
from datamodules.chat import check_model_name
from lightning_modules.forward.attention import replace_attention
from lightning_modules.models.adapter_files import base_of, is_adapter, merge_directory

Quantization = Literal["nf4", "int8"]
ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""What a model's own configuration may ask for."""


def load_config(model_name: str, *, option: str = "model.model_name") -> Any:
    """The model's configuration, without its weights.

    Raises:
        ConfigurationError: If there is no such model.
    """
    check_model_name(model_name, option=option)
    model_name = base_of(model_name, option=option)
    if Path(model_name).is_dir():
        check_directory(Path(model_name), option=option)
    try:
        config = AutoConfig.from_pretrained(model_name)
    except Exception as error:  # whatever a foreign file can raise
        raise ConfigurationError(f"no model {model_name!r} ({told(error)}); change {option}") from error
    attention = getattr(config, "_attn_implementation_internal", None)
    if attention not in ATTENTIONS:  # a hub id among them is code to fetch
        raise ConfigurationError(
            f"the configuration of {model_name} asks for the attention {attention!r}, which is none of "
            f"{', '.join(filter(None, ATTENTIONS))}; change {option}"
        )
    return config


def most_tokens(config: Any) -> int | None:
    """How many tokens a model reads at most; None where its configuration does not say."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


def without_weights(model_name: str, *, option: str = "model.model_name") -> Any:
    """The model on the meta device, where tensors have sizes and no content."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(model_name, option=option))


def float32_bytes(model_name: str, *, option: str = "model.model_name") -> int:
    """What all weights take as they are loaded, from the model's configuration."""
    return 4 * int(sum(parameter.numel() for parameter in without_weights(model_name, option=option).parameters()))


def check_directory(directory: Path, *, option: str) -> None:
    """Raise a ConfigurationError where a folder is no model's, or its index names weights that lie elsewhere."""
    if not (directory / "config.json").is_file():
        raise ConfigurationError(f"{directory} holds no config.json, so it is no model directory; change {option}")
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        files = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigurationError(f"{index} is no index of weights ({told(error)}); change {option}") from error
    for file in sorted(map(str, files)):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ConfigurationError(f"{index} names {file!r}, which is no weights' file beside it; change {option}")


def load_causal_lm(
    model_name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    option: str = "model.model_name",
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """A causal language model in float32, with an embedding for every token of the tokenizer.

    Of an adapter's directory it is the base with the adapter in its weights. Where it is quantised, the matrices of its
    body are in few bits and cannot be trained.

    Raises:
        ConfigurationError: If it cannot be had, or a tensor is missing or left over.
    """
    load_config(model_name, option=option)
    base = base_of(model_name, option=option)
    settings = quantized(quantization)
    model = _from_pretrained(AutoModelForCausalLM, base, option=option, new_head=False, **settings)
    resize_embeddings(model, tokenizer)
    if is_adapter(model_name):
        merge_directory(model, model_name, option=option)
    return model


def load_reward_model(
    model_name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    new_head: bool,
    option: str = "model.model_name",
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """A sequence classifier with one score, in float32.

    Args:
        model_name: A sequence classifier, or where ``new_head`` a causal language model.
        tokenizer: The model's own.
        new_head: Whether the score head may start at zero where the weights have none.
        option: The option to name in an error.
        quantization: How to keep the matrices of its body, which then cannot be trained; None for float32.

    Raises:
        ConfigurationError: If it cannot be had, or any tensor but a new score head is missing.
    """
    load_config(model_name, option=option)
    base, adapted = base_of(model_name, option=option), is_adapter(model_name)
    model = _from_pretrained(
        AutoModelForSequenceClassification,
        base,
        option=option,
        new_head=new_head or adapted,
        num_labels=1,
        **quantized(quantization),
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    resize_embeddings(model, tokenizer)
    if adapted:
        merge_directory(model, model_name, option=option)
    return model


def quantized(quantization: Quantization | None) -> dict[str, Any]:
    """What has transformers quantise a model as it loads it; the heads stay as they are.

    NF4 with doubly quantised constants is that of Dettmers et al. 2023, https://arxiv.org/abs/2305.14314; int8 that of
    Dettmers et al. 2022, https://arxiv.org/abs/2208.07339.
    """
    if quantization is None:
        return {}
    kept = {"llm_int8_skip_modules": ["lm_head", "score", "classifier"]}
    if quantization == "int8":
        if not torch.cuda.is_available():
            raise ConfigurationError(
                "model.quantization int8 is for GPUs: on a CPU bitsandbytes loses a layer's scales once it has trained"
                "; take nf4"
            )
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, **kept)}
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if half else torch.float32,
            **kept,
        )
    }


def _from_pretrained(
    model_class: Any, model_name: str, *, option: str, new_head: bool, **settings: Any
) -> PreTrainedModel:
    try:
        with torch.device("cpu"):  # Lightning's default device would reach transformers as a device map
            model, loading = model_class.from_pretrained(
                model_name,
                dtype=torch.float32,
                use_safetensors=True,  # another format may hold code
                trust_remote_code=False,
                output_loading_info=True,
                **settings,
            )
    except Exception as error:  # whatever a foreign file can raise, and packages that are not there
        raise ConfigurationError(f"cannot load the model {model_name!r} ({told(error)}); change {option}") from error
    missing = set(loading["missing_keys"])
    if new_head:
        heads = {key for key in missing if key.startswith(("score.", "classifier."))}
        for name, parameter in model.named_parameters():
            if name in heads:
                torch.nn.init.zeros_(parameter)
        missing -= heads
    unexpected = [] if new_head else list(loading["unexpected_keys"])  # a language-model head gives way to the score
    if missing or unexpected:
        raise ConfigurationError(
            f"the weights of {model_name} do not fit a {type(model).__name__}: missing {sorted(missing)[:3]}, "
            f"left over {sorted(unexpected)[:3]}; change {option}"
        )
    loaded: PreTrainedModel = model
    for module in loaded.modules() if "quantization_config" in settings else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # a layout for inference, whose product has no gradient
    replace_attention(loaded)
    return loaded


def resize_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give tokens beyond the model's vocabulary the mean embedding, so that two loads of a model are equal."""
    embeddings: Any = model.get_input_embeddings()
    old = embeddings.weight.shape[0]
    if len(tokenizer) <= old:
        return
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        if embeddings is not None:
            with torch.no_grad():
                embeddings.weight[old:] = embeddings.weight[:old].mean(0)


def recompute_activations(model: Any, *, adapted: bool) -> None:
    """Have a model make its activations again in the backward pass; ``adapted`` where only an adapter trains."""
    renamed = getattr(model, "activation_checkpointing_enable", None)
    (renamed or model.gradient_checkpointing_enable)()
    if adapted:
        model.enable_input_require_grads()  # or no gradient would enter the first layer


def freeze_unread(model: PreTrainedModel) -> None:
    """Keep the parts of a model that no text goes through, as those that see, as they are: they get no gradient."""
    if model.config.get_text_config() is model.config:
        return
    heads = (model.get_input_embeddings(), model.get_output_embeddings(), getattr(model, "score", None))
    parts: list[Any] = [model.get_decoder(), *(head for head in heads if head is not None)]
    read = {id(parameter) for part in parts for parameter in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in read:
            parameter.requires_grad_(False)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Switch every kind of dropout off, in train mode too."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "attn_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model
