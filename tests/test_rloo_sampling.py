"""RLOO's samples in a whole run: the sampler's drift from training, one prefill, no reference without a penalty."""

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from cli import main
from datamodules.batches import PromptBatch
from lightning_modules import RLOOModule, rloo
from lightning_modules.rewards.rules import brevity

pytestmark = pytest.mark.filterwarnings("ignore")


def metrics(monkeypatch: pytest.MonkeyPatch, config: str, tmp_path: Path) -> list[dict[str, Any]]:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("sys.argv", ["cli.py"])
    assert main(["fit", "--config", config]) == 0
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def values(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize(("precision", "most"), [("32-true", 1e-5), ("bf16-mixed", 0.05), ("bf16-true", 0.05)])
def test_the_drift_from_the_training_forward_is_rounding_at_the_precision_of_the_run(
    precision: str, most: float, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a temperature other than 1, which both sides must apply; a large learning rate, so weights do change.

    In bfloat16 some processors' kernels give both sides the same rounding, others do not.
    """
    made = config(
        "RLOOModule",
        model={"temperature": 0.6, "learning_rate": 0.05, "warmup_ratio": 0.0},
        trainer={"precision": precision, "log_every_n_steps": 1},
        evaluation={"num_prompts": 0},
    )
    drifts = values(metrics(monkeypatch, made, tmp_path), "train/sampler_drift")
    assert len(drifts) == 2
    assert all(0 <= drift < most for drift in drifts), drifts


def test_without_a_penalty_no_reference_is_loaded_and_no_kl_logged(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("beta 0 asked for a reference")

    monkeypatch.setattr("lightning_modules.rloo.make_reference", refuse)
    made = config("RLOOModule", model={"beta": 0.0}, trainer={"log_every_n_steps": 1}, evaluation={"num_prompts": 0})
    lines = metrics(monkeypatch, made, tmp_path)
    assert values(lines, "train/reward") == pytest.approx(values(lines, "train/score"))
    assert values(lines, "val/reward") == pytest.approx(values(lines, "val/score"))
    assert len(values(lines, "train/reward")) == 2
    assert not values(lines, "train/kl")
    assert not values(lines, "val/kl")


def test_each_prompt_is_read_once_for_its_samples(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    sample = rloo.sample_completions

    def watched(model: Any, prompt_ids: Any, **options: Any) -> Any:
        samples = sample(model, prompt_ids, **options)
        asked.append((len(prompt_ids), options["samples_per_prompt"], len(samples.finished)))
        return samples

    monkeypatch.setattr("lightning_modules.rloo.sample_completions", watched)
    made = config("RLOOModule", model={"samples_per_prompt": 3}, evaluation={"num_prompts": 0})
    metrics(monkeypatch, made, tmp_path)
    assert {count for _, count, _ in asked} == {1, 3}  # validation, training
    assert all(rows == prompts * count for prompts, count, rows in asked)


def test_every_word_changes_the_samples_seeds(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's seed, the epoch, the batch, the process, and whether it trains; each sample has one of its own."""
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(RLOOModule, "sample", lambda _, batch, seeds: asked.append(tuple(seeds)) or 1 / 0)
    module = RLOOModule(model_name=str(tiny_model_dir), reward=brevity)
    module.configure_model()
    batch = PromptBatch([[{"role": "user", "content": "a"}]] * 2, [torch.tensor([1, 2]), torch.tensor([2, 1])])

    def seeds(*, seed: str = "1", epoch: int = 0, batch_idx: int = 0, rank: int = 0, trains: bool = True) -> None:
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        fake: Any = types.SimpleNamespace(current_epoch=epoch, global_rank=rank)
        module._trainer = fake
        with pytest.raises(ZeroDivisionError):
            (module.training_step if trains else module.validation_step)(batch, batch_idx)

    changes: list[dict[str, Any]] = [{}, {"seed": "2"}, {"epoch": 1}, {"batch_idx": 1}, {"rank": 1}, {"trains": False}]
    for change in changes:
        seeds(**change)
    assert [len(found) for found in asked] == [8] * 5 + [2]
    assert len({seed for found in asked for seed in found}) == 8 * 5 + 2
    seeds()
    assert asked[-1] == asked[0]
