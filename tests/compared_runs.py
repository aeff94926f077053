"""Folders of runs for ``compare``, with evaluations against a reference that scores 0 everywhere."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from callbacks.evaluation.files import write
from callbacks.evaluation.metrics import Pair, Side
from callbacks.logging.metrics_file import MetricsFile
from tests.evaluation_run import result_of

HOSTILE = "</script><img src=x onerror=alert(1)>"


def make_run(
    directory: Path,
    *,
    rewards: list[float],
    method: str = "DPOModule",
    judge: str = "judge",
    folder: str = "final",
    prompts: list[str] | None = None,
    tokens: list[int] | None = None,
    **metrics: Any,
) -> Path:
    """A run's folder with an evaluation of one prompt for each reward."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump({"model": {"class_path": f"lightning_modules.{method}"}}))
    (directory / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": HOSTILE}}))
    prompts = prompts or [f"{HOSTILE} question {i}" for i in range(len(rewards))]
    pairs = [
        Pair.of(
            [{"role": "user", "content": prompt}],
            Side(f"{HOSTILE}{directory.name} {i}", tokens[i] if tokens else 3 + i),
            Side("ref", 3),
            reward,
            0.0,
            prompt_tokens=i,
            source=f"{HOSTILE}{i % 2}",
        )
        for i, (prompt, reward) in enumerate(zip(prompts, rewards, strict=True))
    ]
    result = result_of(pairs, reward_source=judge, reference=HOSTILE)
    result = dataclasses.replace(result, **{"valid": True, **metrics})
    write(directory / "eval" / folder, result, pairs)
    log = MetricsFile(directory)
    for step in (1, 2):
        log.log_metrics({"train/loss": 0.5 / step, f"train/{HOSTILE}": 1.0}, step=step)
    return directory
