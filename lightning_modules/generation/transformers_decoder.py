"""Decoding by transformers' own forward, of any causal language model: by its cache where that works, else without."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from lightning_modules.forward.capabilities import attempted, is_exact
from lightning_modules.forward.completions import position_ids
from lightning_modules.models.sharding import go_on, plain_class, sharding_of

TOLERANCE, HALF_TOLERANCE = 5e-3, 0.1
"""By how much logits may differ by rounding, relative to their size; without its state a model's differ by about 1."""
_KNOWN: "WeakKeyDictionary[PreTrainedModel, bool]" = WeakKeyDictionary()


class TransformersDecoder:
    """Any causal language model of transformers, with a cache that grows and prompts that are padded on the left."""

    def __init__(
        self, model: PreTrainedModel, prompt_ids: Sequence[Int[Tensor, " _"]], *, samples_per_prompt: int
    ) -> None:
        self.model = model
        self.prompt_ids = prompt_ids
        self.samples_per_prompt = samples_per_prompt
        self.cache = DynamicCache(config=model.config)

    def start(self) -> Float[Tensor, "batch vocab"]:
        """Read each prompt once, and give its samples the distribution of their first token."""
        ids, self.attention_mask = left_padded(self.prompt_ids, pad_token_id=0)
        ids, self.attention_mask = ids.to(self.model.device), self.attention_mask.to(self.model.device)
        self.positions = position_ids(self.attention_mask)
        logits = self._forward(ids)
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(self.samples_per_prompt)
        if self.samples_per_prompt > 1:
            self.keep(rows)
        return logits[rows]

    def step(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Append a token to each row, and give the distribution of the next one."""
        self.attention_mask = torch.nn.functional.pad(self.attention_mask, (0, 1), value=True)
        self.positions = self.positions[:, -1:] + 1
        return self._forward(tokens.unsqueeze(1))

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows alone, in this order."""
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]  # the one of its methods that every kind of layer has
        self.attention_mask, self.positions = self.attention_mask[rows], self.positions[rows]

    def _forward(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch vocab"]:
        logits = forward(
            self.model,
            input_ids=ids,
            attention_mask=self.attention_mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            logits_to_keep=1,
            use_cache=True,
        )
        return logits[:, -1]


class WholeRowDecoder:
    """Reads each row anew for every token: slow, and right for any model.

    No state is kept, and padding stands behind a row, where a token that looks back alone does not see it.
    """

    def __init__(
        self, model: PreTrainedModel, prompt_ids: Sequence[Int[Tensor, " _"]], *, samples_per_prompt: int
    ) -> None:
        self.model = model
        self.samples_per_prompt = samples_per_prompt
        self.rows = [prompt.to(model.device) for prompt in prompt_ids]

    def start(self) -> Float[Tensor, "batch vocab"]:
        """Read each prompt once, and give its samples the distribution of their first token."""
        logits = self._read()
        self.rows = [row for row in self.rows for _ in range(self.samples_per_prompt)]
        return logits.repeat_interleave(self.samples_per_prompt, dim=0)

    def step(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Append a token to each row, and give the distribution of the next one."""
        self.rows = [torch.cat([row, token.view(1)]) for row, token in zip(self.rows, tokens, strict=True)]
        return self._read()

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows alone, in this order."""
        self.rows = [self.rows[number] for number in rows.tolist()]

    def _read(self) -> Float[Tensor, "batch vocab"]:
        ends = torch.tensor([len(row) - 1 for row in self.rows], device=self.model.device)
        ids = pad_sequence(self.rows, batch_first=True)
        mask = torch.arange(ids.shape[1], device=ids.device) <= ends.unsqueeze(1)
        places, place = ends.unique(return_inverse=True)
        logits = forward(self.model, input_ids=ids, attention_mask=mask.long(), use_cache=False, logits_to_keep=places)
        of_all = logits.shape[1] > len(places)  # as RWKV gives them
        return logits[torch.arange(len(ids), device=ids.device), ends if of_all else place]


def forward(model: Any, **inputs: Any) -> Float[Tensor, "batch time vocab"]:
    """Logits of a forward pass; of a model that is sharded all who share it make it together."""
    if sharding_of(model) is not None:
        go_on(model)
    logits: Tensor = model(**inputs).logits
    return logits


def steps_as_whole_rows(model: PreTrainedModel) -> bool:
    """Whether a model gives with the cache, a token at a time, what it gives for whole rows; found out once on itself.

    Some keep their state elsewhere and are silent about a cache that they do not know, and recurrent ones may take
    padding for text: their samples would be of a model that has forgotten what it has read.
    """
    if model not in _KNOWN:
        difference, reason = attempted(lambda: _difference(model), "gives other logits")
        _KNOWN[model] = difference <= (TOLERANCE if is_exact(model) else HALF_TOLERANCE)
        if not _KNOWN[model]:
            rank_zero_info(
                f"{plain_class(model).__name__}: a token at a time with transformers' cache {reason}, so sampling "
                "reads whole rows for each token, which is slow"
            )
    return _KNOWN[model]


def _difference(model: PreTrainedModel) -> float:
    """By how much logits differ, relative to their size, in most of some rows and steps.

    In most, as a token that rounding sends to another expert makes much of one.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (16,), generator=generator)
    tokens = torch.randint(vocabulary, (3, 4), generator=generator).to(model.device)
    prompts = [ids[:3], ids[3:9]]
    both = [kind(model, prompts, samples_per_prompt=2) for kind in (TransformersDecoder, WholeRowDecoder)]
    logits = [[decoder.start() for decoder in both]]
    logits.append([decoder.step(tokens[0]) for decoder in both])
    for decoder in both:
        decoder.keep(torch.tensor([2, 1, 0], device=model.device))
    logits += [[decoder.step(drawn[:3]) for decoder in both] for drawn in tokens[1:]]
    differences = []
    for stepped, whole in logits:
        sizes = (whole - whole.mean(-1, keepdim=True)).float().norm(dim=-1)
        differences.append((stepped - whole).float().norm(dim=-1) / sizes)
    return float(torch.cat(differences).median())


def left_padded(
    prompt_ids: Sequence[Int[Tensor, " _"]], *, pad_token_id: int
) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """The prompts side by side with their ends aligned, and where they stand."""
    width = max(map(len, prompt_ids))
    ids = torch.full((len(prompt_ids), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros(len(prompt_ids), width, dtype=torch.bool)
    for row, prompt in enumerate(prompt_ids):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = True
    return ids, mask
