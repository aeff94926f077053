"""Makes the demo's material: a tokenizer, a small untrained Qwen2, and two datasets in the columns of the real ones.

python -m demo.material outputs/demo/material
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from demo.tasks import Exercise, draw_exercise, wrong_answer

EXERCISES = 14_000
PAIRS = 6_000
HELD_OUT = 400
TWO_TURN_SHARE = 0.15
MISTAKEN_SHARE = 0.3
"""Of the answers that SFT learns from: conversations are imperfect, and preferences tell what is right."""
VOCABULARY = 1_024


def make(directory: Path) -> None:
    """Write ``model/``, ``smoltalk/`` and ``ultrafeedback/``; always the same for the same versions."""
    disable_progress_bars()
    logging.disable_progress_bar()
    rng = random.Random(20)
    held_out = _exercises(rng, HELD_OUT, set())
    seen = {exercise.prompt for exercise in held_out}
    training = _exercises(rng, EXERCISES, seen)
    paired = _exercises(rng, PAIRS, seen)

    conversations = list(_conversations(training, rng, MISTAKEN_SHARE))
    _write(directory / "smoltalk" / "data", "train", conversations)
    _write(directory / "smoltalk" / "data", "test", list(_conversations(held_out, rng, 0.0)))
    _write(directory / "ultrafeedback" / "data", "train_prefs", [_pair(exercise, rng) for exercise in paired])
    _write(directory / "ultrafeedback" / "data", "test_prefs", [_pair(exercise, rng) for exercise in held_out])

    tokenizer = _tokenizer(message["content"] for row in conversations for message in row["messages"])
    tokenizer.save_pretrained(directory / "model")
    model = _model(tokenizer)
    model.save_pretrained(directory / "model")
    print(
        f"material in {directory}: {len(conversations):,} conversations, {PAIRS:,} preference pairs, "
        f"{HELD_OUT} held-out prompts, "
        f"a vocabulary of {len(tokenizer):,} and a model of {model.num_parameters():,} parameters"
    )


def _exercises(rng: random.Random, count: int, excluded: set[str]) -> list[Exercise]:
    """Exercises whose prompts are not excluded; one of a small kind may come up more than once."""
    exercises: list[Exercise] = []
    while len(exercises) < count:
        exercise = draw_exercise(rng)
        if exercise.prompt not in excluded:
            exercises.append(exercise)
    return exercises


def _conversations(exercises: list[Exercise], rng: random.Random, mistaken_share: float) -> Iterator[dict[str, Any]]:
    waiting = list(exercises)
    while waiting:
        turns = 2 if len(waiting) > 1 and rng.random() < TWO_TURN_SHARE else 1
        messages = []
        for _ in range(turns):
            exercise = waiting.pop()
            messages.append({"role": "user", "content": exercise.prompt})
            mistaken = rng.random() < mistaken_share
            answer = wrong_answer(exercise, rng) if mistaken else exercise.answer
            messages.append({"role": "assistant", "content": answer})
        yield {"messages": messages, "source": exercise.kind}


def _pair(exercise: Exercise, rng: random.Random) -> dict[str, Any]:
    prompt = {"role": "user", "content": exercise.prompt}
    chosen = [prompt, {"role": "assistant", "content": exercise.answer}]
    rejected = [prompt, {"role": "assistant", "content": wrong_answer(exercise, rng)}]
    return {
        "prompt": exercise.prompt,
        "prompt_id": exercise.kind,
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": 9.0,
        "score_rejected": 3.0,
    }


def _write(directory: Path, split: str, rows: list[dict[str, Any]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(directory / f"{split}-00000-of-00001.parquet")


def _tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits and no chat template, as a base model's is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "user\n", "assistant\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=512
    )


def _model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
