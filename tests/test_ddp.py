"""Two processes on the CPU: one set of files, one tracked run, the metrics of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_modules.models.reference_cache import read_table

ROOT = Path(__file__).parents[1]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    environment.pop("NVIDIA_API_KEY", None)
    return subprocess.run(
        [sys.executable, "cli.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("SFTModule", marks=SLOW),
        pytest.param("RewardModule", marks=SLOW),
        pytest.param("DPOModule", marks=SLOW),
        "RLOOModule",
    ],
)
def test_two_processes_train_and_evaluate_as_one_run(method: str, config: Any, tmp_path: Path) -> None:
    overlay = ["--config", "configs/trainer/ddp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    budget = {"tokens_per_batch": 128} if method == "DPOModule" else {}
    result = launch("fit", "--config", config(method, data=budget), *overlay)
    assert result.returncode == 0, result.stderr[-3000:]
    run = tmp_path / "run"
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    assert (run / "final" / "model.safetensors").is_file()
    if method == "DPOModule":
        (cache,) = (tmp_path / "cache").glob("reference-*.jsonl")
        assert len(read_table(cache)) == 7  # each process has asked about its own pairs
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("val/loss" in line or "val/score" in line for line in logged) == 1
    if method != "RewardModule":
        metrics = json.loads((run / "eval" / "epoch=0" / "metrics.json").read_text())
        pairs = (run / "eval" / "epoch=0" / "pairs.jsonl").read_text().splitlines()
        assert metrics["prompts"] == len(pairs) == 4
        assert [json.loads(pair)["prompt"][-1]["content"] for pair in pairs] == ["q0", "q1", "q2", "q3"]


@pytest.mark.slow
def test_two_processes_end_with_the_weights_and_losses_of_one(config: Any, tmp_path: Path) -> None:
    """Three rows a process in a step, or six; clipped, and over two epochs with orders of their own."""
    weights, losses = [], []
    for devices, batch_size in (("1", 6), ("2", 3)):
        root = tmp_path / devices
        made = config(
            "SFTModule",
            trainer={
                "default_root_dir": str(root),
                "devices": devices,
                "gradient_clip_val": 0.05,
                "max_epochs": 2,
                "log_every_n_steps": 1,
            },
            model={"learning_rate": 1e-3},
            data={"max_samples": 6, "batch_size": batch_size},
            evaluation={"num_prompts": 0},
        )
        result = launch("fit", "--config", made)
        assert result.returncode == 0, result.stderr[-3000:]
        weights.append(load_file(root / "final" / "model.safetensors"))
        lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
        losses.append([line[name] for line in lines for name in ("train/loss", "val/loss") if name in line])
    assert len(losses[0]) == 4
    assert losses[1][1::2] == pytest.approx(losses[0][1::2], rel=1e-3), "of the validations"
    for name, one in weights[0].items():
        torch.testing.assert_close(weights[1][name], one, atol=2e-4, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_validation_on_two_processes_has_no_duplicates(config: Any, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Seven rows do not divide by two; the losses agree with one process all the same."""
    losses = []
    for devices in ("1", "2"):
        root = tmp_path / devices
        made = config(
            "SFTModule",
            trainer={"default_root_dir": str(root), "devices": devices},
            evaluation={"num_prompts": 0},
        )
        result = launch("validate", "--config", made, "--model.model_name", str(tiny_model_dir))
        assert result.returncode == 0, result.stderr[-3000:]
        losses += [json.loads(line)["val/loss"] for line in (root / "validation.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
