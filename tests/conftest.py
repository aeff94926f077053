"""Fixtures: the real data where it is at hand, and small models made on the spot."""

import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from cli import main
from lightning_modules.rewards import rate_limit
from tests.command_line import Cli, Result
from tests.evaluation_run import write_rows
from tests.reward_server import RewardServer

torch.set_num_threads(1)  # faster for models this small, and kind to tests beside these
ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes may take a quarter of an hour on a slow machine."""
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with a real tokenizer, real rows and a small pretrained model."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges or chat template: 256 bytes and three special tokens, pad is eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def make_tiny_model(directory: Path, **options: Any) -> None:
    """Fill a directory with a random Qwen2 of some ten thousand parameters and the tiny tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model."""
    directory = tmp_path_factory.mktemp("tiny-model")
    make_tiny_model(directory)
    return directory


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven conversations and seven pairs, in the columns and splits of the real datasets."""
    directory = tmp_path_factory.mktemp("data")
    for split in ("train", "test", "train_prefs", "test_prefs"):
        lines = []
        for i in range(7):
            prompt = {"role": "user", "content": f"q{i}"}
            chosen, rejected = ([prompt, {"role": "assistant", "content": text}] for text in ("yes", "no way"))
            lines.append(json.dumps({"messages": chosen, "chosen": chosen, "rejected": rejected}))
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path, data: Path) -> Any:
    """Writes a config of a method on the small data; nested keys change it."""

    def make(method: str, **changes: Any) -> str:
        options: dict[str, Any] = {"model_name": str(tiny_model_dir)}
        task = {"SFTModule": "conversations", "RLOOModule": "prompts"}.get(method, "preferences")
        if method == "RLOOModule":
            options |= {"reward": "lightning_modules.rewards.rules.brevity", "max_completion_length": 5}
        content: dict[str, Any] = {
            "export": {},
            "trainer": {
                "default_root_dir": str(tmp_path / "run"),
                "accelerator": "cpu",
                "max_epochs": 1,
            },
            "model": {"class_path": f"lightning_modules.{method}", "init_args": options},
            "data": {
                "class_path": "datamodules.UltraFeedbackDataModule",
                "init_args": {"dataset_name": str(data), "task": task, "batch_size": 4, "max_length": 64},
            },
            "evaluation": {
                "reward": "lightning_modules.rewards.rules.brevity",
                "dataset_name": str(data),
                "num_prompts": 4,
                "max_completion_length": 5,
            },
            "checkpoint": {"monitor": "val/score" if method == "RLOOModule" else "val/loss"},
        }
        for section, values in changes.items():
            target = content[section]
            target.get("init_args", target).update(values)
        path = tmp_path / f"{method}.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return make


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """Seven conversations of a turn each, to train on and to be asked about."""
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", 7)
    return tmp_path


@pytest.fixture
def server() -> Iterator[RewardServer]:
    with RewardServer() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def own_rate_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a test sends out of the limits of everything else on this machine."""
    monkeypatch.setattr(rate_limit, "gettempdir", lambda: str(tmp_path))


@pytest.fixture(autouse=True)
def own_wandb_run() -> Iterator[None]:
    """End a test's W&B run, which a later test would otherwise go on with."""
    yield
    if wandb.run is not None:
        wandb.finish()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process, offline and without keys."""
    for name in ("NVIDIA_API_KEY", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's handler holds an earlier test's stream

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["cli.py"])
        capsys.readouterr()
        try:
            code = main(list(arguments))
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return Result(code, *capsys.readouterr())

    return run
