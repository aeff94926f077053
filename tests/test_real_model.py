"""The real 260K-parameter model through the command line: every method runs, and RLOO raises a plain rule's reward."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli import main

pytestmark = pytest.mark.filterwarnings("ignore")


def fit(monkeypatch: pytest.MonkeyPatch, config: str, *arguments: str) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("sys.argv", ["cli.py"])
    assert main(["fit", "--config", config, *arguments]) == 0


@pytest.mark.parametrize("method", ["SFTModule", "DPOModule"])
def test_a_real_model_trains_and_stops_at_the_end_of_its_turn(
    method: str, real_data: Path, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on one short answer until it knows it, plain transformers gives that answer and stops."""
    made = config(
        method,
        model={"model_name": str(real_data / "stories260k"), "learning_rate": 0.003, "warmup_ratio": 0.0},
        trainer={"max_epochs": 30 if method == "SFTModule" else 1},
        evaluation={"num_prompts": 0},
    )
    fit(monkeypatch, made)
    final = tmp_path / "run" / "final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = AutoModelForCausalLM.from_pretrained(final)
    assert tokenizer.chat_template
    assert model.generation_config.eos_token_id[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    if method == "SFTModule":
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "q3"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(ids) == "yes<|im_end|>"


@pytest.mark.slow
def test_rloo_raises_a_rule_reward_clearly_within_a_few_dozen_steps(
    real_data: Path, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule counts how often a story says "the"; the score at least doubles in 40 steps."""
    reward = {"class_path": "lightning_modules.rewards.rules.Mentions", "init_args": {"word": "the"}}
    made = config(
        "RLOOModule",
        model={
            "model_name": str(real_data / "stories260k"),
            "reward": reward,
            "learning_rate": 0.002,
            "schedule": "constant_with_warmup",
            "samples_per_prompt": 8,
            "max_completion_length": 24,
            "beta": 0.01,
        },
        trainer={
            "max_steps": 40,
            "max_epochs": -1,
            "log_every_n_steps": 1,
            "limit_val_batches": 0,
            "gradient_clip_val": 1.0,
        },
        evaluation={"num_prompts": 0},
        checkpoint={"monitor": None},
    )
    fit(monkeypatch, made)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = torch.tensor([line["train/score"] for line in lines if "train/score" in line])
    assert len(scores) == 40
    assert scores[-10:].mean() > 2 * scores[:10].mean()
    assert scores[-10:].mean() > scores[:10].mean() + 0.05
