"""Model shapes with random weights and a tokenizer of known counts, and how much arithmetic they need."""

import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'][0] + message['content'] + '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>a' -}}{%- endif -%}"
)
PROMPT_OVERHEAD = 5
"""Tokens of a prompt of one user turn beside its words: two openings of a turn, two roles, one end."""
WORDS = [upper + lower for upper in string.ascii_uppercase for lower in string.ascii_lowercase]
"""What texts are made of, without spaces: each is one token, and no other two letters are."""


class Segment(NamedTuple):
    """Tokens at the positions from ``start`` to ``stop`` of a sequence that are computed once."""

    start: int
    stop: int
    predictions: int
    """How many of its positions go through the output head."""


@dataclass(frozen=True)
class Shape:
    """A Qwen2 with tied embeddings."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    mlp: int

    @property
    def key_value_width(self) -> int:
        """Width of the keys, and of the values, of a position in a layer."""
        return self.hidden // self.heads * self.key_value_heads

    @property
    def body(self) -> int:
        """Weights of the matrices of all layers."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.key_value_width
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def head(self) -> int:
        """Weights of the output head, which are the embeddings'."""
        return self.vocabulary * self.hidden

    def forward_flops(self, segments: Iterable[Segment]) -> float:
        """Additions and multiplications of the matrix products of a forward pass that does nothing in vain.

        Every token goes through the layers once (2 operations a weight), attends to the tokens up to itself (two
        products of the width ``hidden``, 2 operations each) and, where it predicts, goes through the head. A
        backward pass costs twice as much.
        """
        flops = 0.0
        for start, stop, predictions in segments:
            attended = (stop * (stop + 1) - start * (start + 1)) // 2
            flops += 2 * self.body * (stop - start) + 2 * self.head * predictions
            flops += 4 * self.layers * self.hidden * attended
        return flops

    def decode_bytes(self, contexts: Iterable[int], *, rows: int, steps: int, width: int) -> float:
        """What decoding has to read: all weights at each step, and the keys and values of every row's context.

        Args:
            contexts: Tokens of each row's prompt.
            rows: Completions that are decoded together.
            steps: Tokens of each completion.
            width: Bytes of a number.
        """
        read = steps * sum(contexts) + rows * steps * (steps - 1) // 2
        return width * (steps * (self.body + self.head) + read * 2 * self.layers * self.key_value_width)


SHAPES = {
    "tiny": Shape(vocabulary=1_024, hidden=32, layers=2, heads=4, key_value_heads=2, mlp=64),
    "v32k": Shape(vocabulary=32_768, hidden=256, layers=6, heads=8, key_value_heads=2, mlp=1_024),
    "v152k": Shape(vocabulary=151_936, hidden=256, layers=6, heads=8, key_value_heads=2, mlp=1_024),
    "smollm2-135m": Shape(vocabulary=49_152, hidden=576, layers=30, heads=9, key_value_heads=3, mlp=1_536),
    "qwen2.5-0.5b": Shape(vocabulary=151_936, hidden=896, layers=24, heads=14, key_value_heads=2, mlp=4_864),
}


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows the words; tokens that no text has fill it up to the size.

    Byte-level because transformers reads the tokenizer of a Qwen2 directory as such, whatever it was.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL_TOKENS, *alphabet, *WORDS]
    tokens += [f"<{index}>" for index in range(len(tokens), vocabulary)]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[(word[0], word[1]) for word in WORDS]
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    return fast


def save_model(shape: Shape, directory: Path) -> None:
    """Write random weights and the tokenizer as a model directory.

    All embeddings share one strong component whose sign is turned for the special tokens. So the odds of sampling one
    are about exp(-2 sqrt(hidden)), completions run to the length limit on both sides, and neither needs an option for
    it; all other tokens keep their distribution, because a softmax ignores what all logits share.
    """
    tokenizer = word_tokenizer(shape.vocabulary)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            max_position_embeddings=32_768,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[:, 0] = 1.0
        embeddings[: len(SPECIAL_TOKENS), 0] = -1.0
    model.save_pretrained(directory)
