"""Completions of an evaluation: from the cache where they are kept, else sampled, and kept batch by batch."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from callbacks.evaluation.cache import EvaluationCache, cache_key
from callbacks.evaluation.metrics import Side
from core.errors import ConfigurationError
from core.progress import bar
from core.ranks import Ranks
from datamodules.chat import encode_conversation, load_tokenizer, stop_token_ids
from datamodules.chat_template import UnusableTemplateError
from datamodules.messages import Message
from datamodules.rendering import TemplateRefusalError
from lightning_modules.base import FineTuningModule
from lightning_modules.generation.sampler import Samples, sample_completions
from lightning_modules.models.identity import directory_digest, weights_digest
from lightning_modules.models.loading import load_causal_lm, load_config, most_tokens
from lightning_modules.models.reference import make_reference
from lightning_modules.models.sharding import gathered, in_step

REFERENCE = "evaluation.reference_model"
"""The option that names what a policy is compared with."""


class Decoding(NamedTuple):
    """How completions are sampled."""

    max_completion_length: int
    temperature: float
    top_p: float
    seed: int


class Asked(NamedTuple):
    """A prompt as the model gets it."""

    input_ids: list[int]
    seed: int
    key: str
    """Under which its completion is kept."""


class Completer:
    """Completes prompts with one model, under a run's precision.

    Args:
        trainer: The run.
        opened: Gives the model while it is sampled from. Not called where all completions of all processes are kept;
            else every process calls it, whether it lacks any itself or not.
        tokenizer: The model's.
        ranks: The processes of the run.
        digest: Of the model's content.
        title: Of the progress bar.
        decoding: How to sample.
        batch_size: Prompts completed at once.
        cache: Where completions are kept.
    """

    def __init__(
        self,
        trainer: Trainer,
        opened: Callable[[], AbstractContextManager[PreTrainedModel]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        ranks: Ranks[Any],
        digest: str,
        title: str,
        decoding: Decoding,
        batch_size: int,
        cache: EvaluationCache,
    ) -> None:
        self.trainer = trainer
        self.opened = opened
        self.tokenizer = tokenizer
        self.ranks = ranks
        self.digest = digest
        self.title = title
        self.decoding = decoding
        self.batch_size = batch_size
        self.cache = cache

    def __call__(self, prompts: Mapping[int, list[Message]]) -> list[Side]:
        """A completion for each prompt, given by its number in the evaluation.

        Every process is to come here, and raises if one fails.
        """
        asked, sides = self.ranks.own(lambda: self._look_up(prompts))
        missing = {number: one for number, one in asked.items() if number not in sides}
        with bar(self.trainer, self.title, len(prompts)) as told:
            told.update(len(sides))
            if any(self.ranks.gather(lambda: len(missing) > 0)):
                with self.opened() as model:
                    sides |= self.ranks.own(lambda: self._complete(model, missing, told.update))
        return [sides[number] for number in prompts]

    def _look_up(self, prompts: Mapping[int, list[Message]]) -> tuple[dict[int, Asked], dict[int, Side]]:
        arithmetic = f"{self.trainer.precision} {self.trainer.strategy.root_device.type}"
        digest = f"{self.digest} {arithmetic}"
        asked = encode(self.tokenizer, prompts, model_digest=digest, decoding=self.decoding)
        kept = {number: self.cache.completion(one.key) for number, one in asked.items()}
        return asked, {number: Side(*side) for number, side in kept.items() if side is not None}

    def _complete(
        self, model: PreTrainedModel, missing: Mapping[int, Asked], on_completion: Callable[[int], object]
    ) -> dict[int, Side]:
        sides: dict[int, Side] = {}
        numbers = list(missing)
        with in_step(model):
            for start in range(0, len(numbers), self.batch_size):
                batch = {number: missing[number] for number in numbers[start : start + self.batch_size]}
                samples = self._sample(model, list(batch.values()))
                lengths = samples.completion_lengths().tolist()
                for number, text, length in zip(batch, samples.texts(self.tokenizer), lengths, strict=True):
                    self.cache.keep_completion(missing[number].key, text, length)
                    sides[number] = Side(text, length)
                on_completion(len(batch))
        return sides

    def _sample(self, model: PreTrainedModel, batch: Sequence[Asked]) -> Samples:
        with self.trainer.precision_plugin.forward_context():
            return sample_completions(  # type: ignore[no-any-return]
                model,
                [torch.tensor(one.input_ids) for one in batch],
                max_completion_length=self.decoding.max_completion_length,
                stop_token_ids=stop_token_ids(self.tokenizer),
                seeds=[one.seed for one in batch],
                temperature=self.decoding.temperature,
                top_p=self.decoding.top_p,
            )


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[int, list[Message]],
    *,
    model_digest: str,
    decoding: Decoding,
) -> dict[int, Asked]:
    """What is sampled for each prompt, the same whenever model, prompts and decoding are.

    The completion then is too: exactly on the CPU in float32; elsewhere what is sampled anew may depend on the batch
    that it is sampled in.

    Args:
        tokenizer: The model's.
        prompts: By their number in the evaluation, which the seed of a completion depends on.
        model_digest: What tells the model, and the arithmetic that runs it, from others.
        decoding: How to sample.
    """
    stops = stop_token_ids(tokenizer)
    asked = {}
    for number, messages in prompts.items():
        input_ids = encode_conversation(tokenizer, messages, add_generation_prompt=True).input_ids
        seed = random.Random(f"{decoding.seed}-{number}").getrandbits(63)
        asked[number] = Asked(input_ids, seed, cache_key(model_digest, input_ids, stops, seed, list(decoding)))
    return asked


def check_reader(
    model_name: str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[Message]],
    decoding: Decoding,
    *,
    option: str,
) -> None:
    """Try to write the prompts as a model gets them, and see that it can read them with their completions.

    Raises:
        ConfigurationError: If it cannot.
    """
    limit = most_tokens(load_config(model_name, option=option))
    try:
        asked = [encode_conversation(tokenizer, prompt, add_generation_prompt=True).input_ids for prompt in prompts]
    except (TemplateRefusalError, UnusableTemplateError) as error:
        told = f"{model_name} cannot be asked the evaluation's prompts: {error.reason}"
        raise ConfigurationError(f"{told}; change {option}") from error
    longest = max(map(len, asked), default=0) + decoding.max_completion_length
    if limit is not None and longest > limit:
        raise ConfigurationError(
            f"{model_name} reads at most {limit} tokens, the evaluation's prompts with their completions may have "
            f"{longest}; lower evaluation.max_prompt_length or evaluation.max_completion_length, or change {option}"
        )


def is_start(module: FineTuningModule, reference_model: str | None) -> bool:
    """Whether an evaluation's reference is the starting policy; one that is quantised is another than it was named."""
    return reference_model is None or (reference_model == module.model_name and module.quantization is None)


def completers(
    trainer: Trainer, module: FineTuningModule, reference_model: str | None, *, ranks: Ranks[Any], **options: Any
) -> tuple[Completer, Completer]:
    """The policy's, and that of the reference: the named model, or the starting policy.

    Of a sharded run the reference is sharded as the policy is. Where an adapter is all that trains, the starting policy
    is the policy without what the adapter has learned: no second model.

    Args:
        trainer: The run.
        module: With the policy and its tokenizer.
        reference_model: Hub id or directory, with a tokenizer of its own.
        ranks: The processes of the run.
        options: Of Completer that both have.
    """
    starts = is_start(module, reference_model)
    name, tokenizer = module.model_name, module.tokenizer
    if reference_model is not None:
        name, tokenizer = reference_model, load_tokenizer(reference_model, option=REFERENCE)
        starts = starts and tokenizer.chat_template == module.tokenizer.chat_template  # or its tokens may be others
    reference = make_reference(
        None if starts else name,
        adapted=module.lora is not None,
        name=name,
        start=lambda: load_causal_lm(name, tokenizer, option=REFERENCE),
        tokenizer=lambda: tokenizer,
        option=REFERENCE,
    )

    @contextmanager
    def compared() -> Iterator[PreTrainedModel]:
        with ExitStack() as opened:
            opened.callback(reference.free)  # before the judge is asked, who may be a model too
            model = ranks.own(lambda: opened.enter_context(reference.beside(module.model)))
            yield opened.enter_context(gathered(model))

    digest = directory_digest(name)
    if starts and module.quantization is not None:
        digest += f" in {module.quantization}"
    common: dict[str, Any] = {"ranks": ranks, **options}
    own: dict[str, Any] = {"digest": weights_digest(module.model), "title": "policy completions"}
    other: dict[str, Any] = {"digest": digest, "title": "reference completions"}
    return (
        Completer(trainer, lambda: gathered(module.model), module.tokenizer, **own, **common),
        Completer(trainer, compared, tokenizer, **other, **common),
    )
