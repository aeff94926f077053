"""Two processes on the CPU: one set of files, one tracked run, the metrics of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
