"""Steps that are not sound are skipped, counted and at last end the run; signs that RLOO goes wrong are told once."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks import TrainingHealth
from callbacks.training_health import SIGNS, WINDOW
from core.errors import ConfigurationError
from lightning_modules import rloo, sft
from lightning_modules.forward.completions import completion_losses
from lightning_modules.generation.rollouts import score_samples
from lightning_modules.optimiser_step import OptimiserStep
from tests.command_line import Cli, assert_refused


def spoil(monkeypatch: pytest.MonkeyPatch, at: set[int], how: Callable[[Tensor], Tensor]) -> None:
    """Have the losses of some of SFT's steps be what they must not be."""
    calls = iter(range(1000))

    def losses(*args: Any) -> Tensor:
        found = completion_losses(*args)
        return how(found) if next(calls) in at else found

    monkeypatch.setattr(sft, "completion_losses", losses)


def not_a_number(losses: Tensor) -> Tensor:
    return losses * math.nan


def steep(losses: Tensor) -> Tensor:
    """The same losses, with a gradient that is no number."""
    return losses + (losses - losses).sqrt()


def logged(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture
def steps(config: Any) -> Callable[..., str]:
    """A config of seven steps, a row each, with a checkpoint of each."""

    def make(method: str = "SFTModule", **model: Any) -> str:
        return str(
            config(
                method,
                trainer={"log_every_n_steps": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0},
                model=model,
                data={"batch_size": 1},
                evaluation={"num_prompts": 0},
                checkpoint={"monitor": None, "every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"},
            )
        )

    return make


def weights_after(run: Path, step: int) -> dict[str, Tensor]:
    saved = torch.load(run / "checkpoints" / f"step={step}.ckpt", weights_only=True)
    return {name: value for name, value in saved["state_dict"].items() if name.startswith("model.")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", [not_a_number, steep])
def test_a_step_that_is_not_sound_changes_no_weight_and_is_counted(
    how: Callable[[Tensor], Tensor], cli: Cli, steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {2, 4, 5}, how)
    assert cli("fit", "--config", steps(learning_rate=1e-2)).returncode == 0
    run = tmp_path / "run"
    unchanged = [step for step in range(2, 8) if same(weights_after(run, step - 1), weights_after(run, step))]
    assert unchanged == [3, 5, 6]
    assert logged(run, "train/skipped_steps") == [1, 1, 2, 3, 3]
    norms = logged(run, "train/grad_norm")
    assert [norm is None for norm in norms] == [False, False, True, False, True, True, False]
    assert all(value.isfinite().all() for value in weights_after(run, 7).values())


@pytest.mark.filterwarnings("ignore")
def test_three_in_a_row_end_the_run_and_keep_the_checkpoint_before(
    cli: Cli, steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {0, 2, 3, 4}, not_a_number)
    result = cli("fit", "--config", steps(learning_rate=1e-2))
    assert_refused(result, "step 5 was skipped: its loss is nan; that is 3 in a row")
    run = tmp_path / "run"
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert all(value.isfinite().all() for value in weights_after(run, 4).values())
    monkeypatch.undo()
    assert cli("fit", "--config", steps(learning_rate=1e-2), "--ckpt_path", "last").returncode == 0


@pytest.mark.filterwarnings("ignore")
def test_null_goes_on_whatever_comes(cli: Cli, steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, set(range(6)), not_a_number)
    assert cli("fit", "--config", steps(), "--health.max_bad_steps", "null").returncode == 0
    assert logged(tmp_path / "run", "train/skipped_steps")[-1] == 6


@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_not_finite_are_in_no_checkpoint(cli: Cli, steps: Any, tmp_path: Path) -> None:
    result = cli("fit", "--config", steps(learning_rate=3e38, schedule="constant_with_warmup", warmup_ratio=0.0))
    assert_refused(result, "the weights are not finite, so no checkpoint is written")
    for file in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
        saved = torch.load(file, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in saved.values())


def test_large_weights_in_half_precision_are_finite() -> None:
    """Their sum is more than float16 can hold."""
    module = torch.nn.Linear(1000, 200, dtype=torch.float16)
    torch.nn.init.ones_(module.weight)
    wrapped = LightningModule()
    wrapped.layer = module
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    TrainingHealth().on_save_checkpoint(trainer, wrapped, {})
    for wrong in (torch.inf, -torch.inf, torch.nan):
        torch.nn.init.zeros_(module.bias)
        module.bias.data[7] = wrong
        with pytest.raises(ConfigurationError, match="the weights are not finite"):
            TrainingHealth().on_save_checkpoint(trainer, wrapped, {})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["policy", "reference", "scores"])
def test_log_probs_that_are_none_are_no_unscored_samples(
    place: str, cli: Cli, steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of RLOO, from its third batch on: what is told is what is wrong."""
    batches = iter(range(1000))
    sick = False

    def scores(*args: Any) -> Tensor:
        nonlocal sick
        sick = next(batches) >= 2
        return score_samples(*args) * (math.nan if sick and place == "scores" else 1.0)

    by_prompt, log_ratios = rloo.RLOOModule.by_prompt, rloo.RLOOModule.log_ratios

    def spoilt(original: Any, where: str) -> Any:
        return lambda *args, **options: original(*args, **options) * (math.nan if sick and place == where else 1.0)

    monkeypatch.setattr(rloo, "score_samples", scores)
    monkeypatch.setattr(rloo.RLOOModule, "by_prompt", spoilt(by_prompt, "policy"))
    monkeypatch.setattr(rloo.RLOOModule, "log_ratios", spoilt(log_ratios, "reference"))
    result = cli("fit", "--config", steps("RLOOModule", learning_rate=1e-2))
    told = "nothing in it can be learned from" if place == "scores" else "its loss is nan"
    assert_refused(result, f"step 5 was skipped: {told}")
    assert same(weights_after(tmp_path / "run", 2), weights_after(tmp_path / "run", 4))


@pytest.mark.parametrize(
    ("loss_elsewhere", "flaw"), [(1.0, ""), (math.nan, "its loss is nan"), (math.inf, "its loss is inf")]
)
def test_a_loss_that_is_no_number_on_another_rank_alone_skips_the_step_here_too(
    loss_elsewhere: float, flaw: str
) -> None:
    step, weight = OptimiserStep(), torch.nn.Parameter(torch.ones(2))
    step.add(torch.ones(3), 3)
    weight.grad = torch.tensor([3.0, 4.0])
    elsewhere = torch.tensor([1.0, loss_elsewhere])
    norm, found = step.finish([weight], over_ranks=elsewhere.add, averaged=2, scaled=False)
    assert found == flaw
    assert norm.item() == pytest.approx(5.0 * 2 / 4)
    assert (weight.grad is None) == bool(flaw)
    assert step.count_and_loss.tolist() == [0, 0]


def test_a_gradient_scaler_is_left_its_infinite_gradients() -> None:
    step, weight = OptimiserStep(), torch.nn.Parameter(torch.ones(2))
    step.add(torch.ones(1), 1)
    weight.grad = torch.tensor([math.inf, 1.0])
    assert step.finish([weight], over_ranks=torch.clone, averaged=1, scaled=True)[1] == ""
    assert weight.grad is not None


SICK = {"max_alike": 1.0, "max_truncated": 0.95, "max_kl": 52.0, "min_entropy": 0.01, "max_sampler_drift": 0.21}


def watch(health: TrainingHealth, option: str, values: list[float]) -> None:
    for value in values:
        health._check_signs({SIGNS[option].metric: torch.tensor(value)})


@pytest.mark.parametrize("option", SIGNS)
def test_each_sign_is_told_once_with_what_to_try(option: str, recwarn: pytest.WarningsRecorder) -> None:
    health, sick = TrainingHealth(), SICK[option]
    well = 10.0 if option == "min_entropy" else 0.0
    watch(health, option, [well] * WINDOW + [sick] * (WINDOW - 1))
    assert not recwarn.list, "not before the mean is beyond"
    watch(health, option, [sick] * 30)
    (told,) = [str(warning.message) for warning in recwarn.list]
    assert SIGNS[option].remedy in told
    assert f"health.{option}" in told


def test_a_short_run_of_sick_steps_is_no_sign(recwarn: pytest.WarningsRecorder) -> None:
    watch(TrainingHealth(), "max_kl", [1000.0] * (WINDOW - 1))
    assert not recwarn.list


def test_a_sign_ends_the_run_where_it_is_asked_to() -> None:
    with pytest.raises(ConfigurationError, match=r"60\.0 nats a completion .* health\.max_kl"):
        watch(TrainingHealth(stop=True), "max_kl", [60.0] * WINDOW)
    watch(TrainingHealth(stop=True, max_kl=None), "max_kl", [60.0] * WINDOW)


def test_a_resumed_run_counts_on(recwarn: pytest.WarningsRecorder) -> None:
    first, second = TrainingHealth(), TrainingHealth()
    watch(first, "max_kl", [60.0] * (WINDOW - 1))
    watch(first, "max_alike", [1.0] * WINDOW)
    assert len(recwarn.list) == 1
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    watch(second, "max_alike", [1.0] * WINDOW)
    assert len(recwarn.list) == 1, "what was told is not told again"
    watch(second, "max_kl", [60.0])
    assert len(recwarn.list) == 2


@pytest.mark.parametrize(("option", "value"), [("max_bad_steps", 0), ("max_kl", -1.0)])
def test_a_bound_without_sense_is_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"health.{option} must"):
        TrainingHealth(**{option: value})
