"""Completions of an evaluation: from the cache where they are kept, else sampled, and kept batch by batch."""

import functools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from callbacks.evaluation.cache import EvaluationCache, cache_key
from callbacks.evaluation.metrics import Side
from core.progress import bar
from datamodules.chat import encode_conversation, load_tokenizer, stop_token_ids
from datamodules.messages import Message
from lightning_modules.base import FineTuningModule
from lightning_modules.generation.sampler import Samples, sample_completions
from lightning_modules.models.identity import directory_digest, weights_digest
from lightning_modules.models.loading import load_causal_lm
from lightning_modules.models.sharding import in_step, working_dtype


class Decoding(NamedTuple):
    """How completions are sampled."""

    max_completion_length: int
    temperature: float
    top_p: float
    seed: int


class Completer:
    """Completes prompts with one model, under a run's precision.

    Args:
        trainer: The run.
        models: Opens what gives the model, which is not asked for it where all completions are kept.
        tokenizer: The model's.
        digest: Of the model's content.
        title: Of the progress bar.
        decoding: How to sample.
        batch_size: Prompts completed at once.
        cache: Where completions are kept.
    """

    def __init__(
        self,
        trainer: Trainer,
        models: Callable[[], AbstractContextManager[Callable[[], PreTrainedModel]]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        digest: str,
        title: str,
        decoding: Decoding,
        batch_size: int,
        cache: EvaluationCache,
    ) -> None:
        self.trainer = trainer
        self.models = models
        self.tokenizer = tokenizer
        self.digest = digest
        self.title = title
        self.decoding = decoding
        self.batch_size = batch_size
        self.cache = cache

    def __call__(self, prompts: Mapping[int, list[Message]]) -> list[Side]:
        """A completion for each prompt, given by its number in the evaluation."""
        arithmetic = f"{self.trainer.precision} {self.trainer.strategy.root_device.type}"
        with bar(self.trainer, self.title, len(prompts)) as told, self.models() as model:
            return complete(
                functools.partial(self._sample, model),
                self.tokenizer,
                prompts,
                model_digest=f"{self.digest} {arithmetic}",
                decoding=self.decoding,
                batch_size=self.batch_size,
                cache=self.cache,
                on_completion=told.update,
            )

    def _sample(self, model: Callable[[], PreTrainedModel], prompt_ids: list[Tensor], seeds: list[int]) -> Samples:
        with self.trainer.precision_plugin.forward_context():
            return sample_completions(  # type: ignore[no-any-return]
                model(),
                prompt_ids,
                max_completion_length=self.decoding.max_completion_length,
                stop_token_ids=stop_token_ids(self.tokenizer),
                seeds=seeds,
                temperature=self.decoding.temperature,
                top_p=self.decoding.top_p,
            )


def completers(
    trainer: Trainer, module: FineTuningModule, policy: PreTrainedModel, reference_model: str | None, **options: Any
) -> tuple[Completer, Completer]:
    """The policy's, and that of the reference: the named one, or the starting policy.

    Args:
        trainer: The run.
        module: With the policy and its tokenizer.
        policy: As it is sampled from.
        reference_model: Hub id or directory, with a tokenizer of its own.
        options: Of Completer that both have.
    """
    name, tokenizer = module.model_name, module.tokenizer
    if reference_model is not None:
        name, tokenizer = reference_model, load_tokenizer(reference_model, option="evaluation.reference_model")

    def load_reference() -> PreTrainedModel:
        model = load_causal_lm(name, tokenizer, option="evaluation.reference_model").eval()
        return model.to(device=module.device, dtype=working_dtype(module.model))  # type: ignore[arg-type, no-any-return]

    @contextmanager
    def answering() -> Iterator[Callable[[], PreTrainedModel]]:
        with in_step(policy):
            yield lambda: policy

    own: dict[str, Any] = {"digest": weights_digest(module.model), "title": "policy completions"}
    reference: dict[str, Any] = {"digest": directory_digest(name), "title": "reference completions"}
    return (
        Completer(trainer, answering, module.tokenizer, **own, **options),
        Completer(trainer, lambda: nullcontext(functools.cache(load_reference)), tokenizer, **reference, **options),
    )


def complete(
    sample: Callable[[list[Tensor], list[int]], Samples],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[int, list[Message]],
    *,
    model_digest: str,
    decoding: Decoding,
    batch_size: int,
    cache: EvaluationCache,
    on_completion: Callable[[int], object],
) -> list[Side]:
    """A completion for each prompt, the same whenever model, prompts and decoding are.

    That holds exactly on the CPU in float32; elsewhere what is sampled anew may depend on the batch it is sampled in.

    Args:
        sample: From unpadded prompts and a seed each to samples; not called where all completions are kept.
        tokenizer: The model's.
        prompts: By their number in the evaluation, which the seed of a completion depends on.
        model_digest: What tells the model, and the arithmetic that runs it, from others.
        decoding: How to sample.
        batch_size: Prompts completed at once.
        cache: Where completions are kept.
        on_completion: Called with the number of completions that are there.
    """
    encoded = {
        number: encode_conversation(tokenizer, messages, add_generation_prompt=True).input_ids
        for number, messages in prompts.items()
    }
    seeds = {number: random.Random(f"{decoding.seed}-{number}").getrandbits(63) for number in prompts}
    stops = stop_token_ids(tokenizer)
    keys = {n: cache_key(model_digest, encoded[n], stops, seeds[n], list(decoding)) for n in prompts}
    sides = {n: Side(*kept) for n in prompts if (kept := cache.completion(keys[n])) is not None}
    on_completion(len(sides))
    missing = [number for number in prompts if number not in sides]
    for start in range(0, len(missing), batch_size):
        numbers = missing[start : start + batch_size]
        samples = sample([torch.tensor(encoded[n]) for n in numbers], [seeds[n] for n in numbers])
        lengths = samples.completion_lengths().tolist()
        for number, text, length in zip(numbers, samples.texts(tokenizer), lengths, strict=True):
            cache.keep_completion(keys[number], text, length)
            sides[number] = Side(text, length)
        on_completion(len(numbers))
    return [sides[number] for number in prompts]
