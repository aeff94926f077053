"""What is measured: the rows of an optimiser step, the same for both sides, and what the step is made of."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from benchmarks.shapes import PROMPT_OVERHEAD, WORDS, Segment, Shape

Message = dict[str, str]
Row = dict[str, list[Message]]

WORKLOADS = ("sft", "dpo", "rloo", "generation")
SUPERVISED_SHARE = 0.6
SPREAD = 0.7
"""Standard deviation of the logarithm of a length, about that of chat datasets."""
MEAN_SFT_LENGTH = 160


@dataclass(frozen=True)
class Workload:
    """An optimiser step, or a call of a sampler.

    Args:
        rows: What the step reads, in the columns of SmolTalk or UltraFeedback.
        unit: What the speed counts.
        units: How many of them a step has.
        flops: Operations of the matrix products that the step cannot do without.
        decode_bytes: What a step of generation has to read from memory, where generating is all it does.
    """

    rows: list[Row]
    unit: str
    units: int
    flops: float
    decode_bytes: float = 0.0

    def write(self, directory: Path) -> None:
        """Write the rows as a local dataset; a fit needs a validation split too, and never reads it here."""
        for split in ("train", "train_prefs", "test", "test_prefs"):
            rows = self.rows if split.startswith("train") else self.rows[:1]
            (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True)
class Size:
    """How large a step is.

    Args:
        tokens: Tokens of an SFT step.
        pairs: Pairs of a DPO step.
        prompts: Prompts of an RLOO step.
        samples: Samples of each prompt.
        length: Tokens of each sample.
        rows: Completions that generation alone writes at once.
        row_length: Tokens of each of those.
        processes: DDP processes that share the step.
    """

    tokens: int = 2_048
    pairs: int = 4
    prompts: int = 4
    samples: int = 4
    length: int = 64
    rows: int = 16
    row_length: int = 128
    processes: int = 1


def make(name: str, shape: Shape, size: Size, *, bytes_per_number: int = 4) -> Workload:
    """The workload of that name: ``sft``, ``dpo``, ``rloo`` or ``generation``."""
    words = _Words()
    if name == "sft":
        return _sft(shape, words, size)
    if name == "dpo":
        return _dpo(shape, words, size)
    if name == "rloo":
        return _rloo(shape, words, size)
    return _generation(shape, words, size, bytes_per_number)


def log_normal_lengths(count: int, *, median: int, seed: int) -> list[int]:
    """Quantiles of a log-normal distribution in random order: the same lengths whatever the machine."""
    normal = NormalDist(math.log(median), SPREAD)
    lengths = [round(math.exp(normal.inv_cdf((index + 0.5) / count))) for index in range(count)]
    random.Random(seed).shuffle(lengths)
    return lengths


def _sft(shape: Shape, words: "_Words", size: Size) -> Workload:
    count = 4 * max(1, round(size.tokens / MEAN_SFT_LENGTH / 4))  # so that two processes, or four batches, share it
    drawn = log_normal_lengths(count, median=128, seed=0)
    lengths = [max(20, round(length * size.tokens / sum(drawn))) for length in drawn]
    rows: list[Row] = []
    segments = []
    for length in lengths:
        completion = round(SUPERVISED_SHARE * length)
        rows.append({"messages": [words.user(length - completion), words.assistant(completion)]})
        segments.append(Segment(0, length, completion))
    return Workload(rows, "tokens", sum(lengths), 3 * shape.forward_flops(segments))


def _dpo(shape: Shape, words: "_Words", size: Size) -> Workload:
    """Tokens are counted for both sequences of a pair; the operations have the prompt once, and no reference."""
    prompts, chosen, rejected = (
        log_normal_lengths(size.pairs, median=median, seed=seed) for seed, median in enumerate((96, 160, 144))
    )
    rows: list[Row] = []
    segments = []
    for prompt, *answers in zip(prompts, chosen, rejected, strict=True):
        user = words.user(prompt)
        rows.append(
            {"chosen": [user, words.assistant(answers[0])], "rejected": [user, words.assistant(answers[1])]},
        )
        segments += [Segment(0, prompt, 0), *(Segment(prompt, prompt + answer, answer) for answer in answers)]
    tokens = 2 * sum(prompts) + sum(chosen) + sum(rejected)
    return Workload(rows, "tokens", tokens, 3 * shape.forward_flops(segments))


def _rloo(shape: Shape, words: "_Words", size: Size) -> Workload:
    """A forward pass to sample, one of the reference, and a forward and a backward pass of the policy."""
    prompts = log_normal_lengths(size.prompts, median=64, seed=0)
    segments = []
    for prompt in prompts:
        samples = [Segment(prompt, prompt + size.length, size.length)] * size.samples
        segments += [Segment(0, prompt, 0), *samples]
    # A prompt row ends with an answer that is cut away, as SmolTalk's conversations do.
    rows: list[Row] = [{"messages": [words.user(prompt), words.assistant(2)]} for prompt in prompts]
    return Workload(rows, "samples", size.prompts * size.samples, 5 * shape.forward_flops(segments))


def _generation(shape: Shape, words: "_Words", size: Size, bytes_per_number: int) -> Workload:
    prompts = log_normal_lengths(size.rows, median=64, seed=0)
    segments = [Segment(0, prompt + size.row_length, size.row_length) for prompt in prompts]
    rows: list[Row] = [{"messages": [words.user(prompt)]} for prompt in prompts]
    return Workload(
        rows,
        "tokens",
        size.rows * size.row_length,
        shape.forward_flops(segments),
        shape.decode_bytes(prompts, rows=size.rows, steps=size.row_length, width=bytes_per_number),
    )


class _Words:
    """Turns of random words that have, rendered, the number of tokens asked for."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def user(self, tokens: int) -> Message:
        """A user turn, which with the opening of the answer has so many tokens."""
        return {"role": "user", "content": self._text(tokens - PROMPT_OVERHEAD)}

    def assistant(self, tokens: int) -> Message:
        """An answer, which with its end has so many tokens."""
        return {"role": "assistant", "content": self._text(tokens - 1)}

    def _text(self, count: int) -> str:
        return "".join(self._random.choices(WORDS, k=count))
