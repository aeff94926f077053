"""SIGTERM, SIGUSR1 and Ctrl-C: saved at a step boundary, exit code 143 or 130, resumed where it ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from callbacks.checkpoints.boundary_checkpoint import BoundaryCheckpoint
from callbacks.checkpoints.checkpoint_io import WholeCheckpointIO
from callbacks.checkpoints.preemption import Preempted, Preemption
from core.errors import ConfigurationError
from tests.kills import SHARDED

ROOT = Path(__file__).parents[1]
SLOW = pytest.mark.slow


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "cli.py", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.05)


def logged_steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [line["step"] for line in lines if "train/loss" in line]


def child_of(pid: int) -> int:
    """The process that Lightning started for the other rank."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_text() for child in children}
    return next(child for child, command in commands.items() if "cli.py" in command)


@pytest.mark.parametrize(
    ("strategy", "signalled", "signum"),
    [
        pytest.param("auto", 0, signal.SIGTERM, marks=SLOW),
        ("auto", 0, signal.SIGINT),
        pytest.param("ddp", 0, signal.SIGTERM, marks=SLOW),
        pytest.param("ddp", 1, signal.SIGUSR1, marks=SLOW),
        pytest.param(SHARDED, 1, signal.SIGTERM, marks=SLOW),
    ],
)
def test_a_signal_to_any_rank_saves_and_ends_with_its_code(
    strategy: Any, signalled: int, signum: signal.Signals, config: Any, tmp_path: Path
) -> None:
    """Accumulating over two batches: the step saved is a whole one, and every step is logged once in the two runs."""
    trainer = {"max_epochs": 400, "accumulate_grad_batches": 2, "log_every_n_steps": 1, "limit_val_batches": 0}
    trainer |= {"devices": 1 if strategy == "auto" else 2, "strategy": strategy}
    path = config("SFTModule", trainer=trainer, evaluation={"num_prompts": 0}, checkpoint={"monitor": None})
    run = tmp_path / "run"
    process = start("fit", "--config", path)
    wait_for(lambda: len(logged_steps(run)) > 3, process)
    os.kill(process.pid if signalled == 0 else child_of(process.pid), signum)
    asked = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == (130 if signum == signal.SIGINT else 143), output[-3000:]
    assert time.monotonic() - asked < 30  # 10 s where nothing else keeps the cores busy
    assert ("interrupted: saved" if signum == signal.SIGINT else "asked to end: saved") in output
    assert "go on with --ckpt_path last" in output
    assert "Traceback" not in output
    last = run / "checkpoints" / "last.ckpt"
    saved = torch.load(last / "meta.pt" if strategy == SHARDED else last, weights_only=True)
    batches = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert batches["ready"] == batches["processed"]
    assert not (run / "final").exists()
    before = logged_steps(run)
    more = ["--ckpt_path", "last", "--trainer.max_epochs", "-1", "--trainer.max_steps", str(saved["global_step"] + 3)]
    again = start("fit", "--config", path, *more)
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output[-3000:]
    assert before == list(range(saved["global_step"]))
    assert logged_steps(run) == list(range(saved["global_step"] + 3))


class Recorder(LightningModule):
    """Writes down which batches it trains on and when it validates, and may send itself signals there."""

    def __init__(self, ask_at: tuple[str, int, int] | None = None, *signals: signal.Signals) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.ask_at = ask_at
        self.signals = signals or (signal.SIGTERM,)
        self.events: list[tuple[str, int, int]] = []

    def _record(self, kind: str, batch_idx: int) -> None:
        event = (kind, self.trainer.global_step, batch_idx)
        if event == self.ask_at:
            for signum in self.signals:
                os.kill(os.getpid(), signum)
        self.events.append(event)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self._record("train", batch_idx)
        return self.layer(batch[0]).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self._record("validate", batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    module: Recorder,
    directory: Path,
    ckpt_path: str | None = None,
    trainer_options: dict[str, Any] | None = None,
    **saving: Any,
) -> None:
    rows = torch.utils.data.TensorDataset(torch.ones(8, 1))
    options = {
        "accumulate_grad_batches": 2,
        "val_check_interval": 5,  # within a window: it is moved to its start
        **(trainer_options or {}),
    }
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[Preemption(), BoundaryCheckpoint(directory, **{"monitor": None, "save_top_k": 0, **saving})],
        plugins=[WholeCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    loaders = [torch.utils.data.DataLoader(rows), torch.utils.data.DataLoader(rows)]
    trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 8])
def test_a_signal_in_a_step_ends_at_that_step_s_boundary(step: int, tmp_path: Path) -> None:
    """Before a validation that is due, after the accumulation; resumed, no batch and no validation is lost or twice."""
    whole, first, second = Recorder(), Recorder(("train", step - 1, (2 * step - 2) % 8)), Recorder()
    fit(whole, tmp_path / "whole")
    assert next(event for event in whole.events if event[0] == "validate") == ("validate", 2, 0)
    with pytest.raises(Preempted) as exit_:
        fit(first, tmp_path / "run")
    assert exit_.value.code == 143
    assert first.events[-1] == ("train", step - 1, (2 * step - 1) % 8)
    fit(second, tmp_path / "run", str(tmp_path / "run" / "last.ckpt"))
    assert first.events + second.events == whole.events


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("times", [1, 2])
def test_one_ctrl_c_saves_at_the_step_s_boundary_and_a_second_ends_at_once(times: int, tmp_path: Path) -> None:
    """Asked in the first batch of a window of two: once, both are taken and saved; twice, neither, and nothing is."""
    module = Recorder(("train", 2, 4), *[signal.SIGINT] * times)
    with pytest.raises(Preempted) as exit_:
        fit(module, tmp_path)
    assert exit_.value.code == 130
    assert module.events[-1] == (("train", 2, 5) if times == 1 else ("validate", 2, 7))
    assert (tmp_path / "last.ckpt").is_file() == (times == 1)


@pytest.mark.filterwarnings("ignore")
def test_a_ctrl_c_that_a_shell_has_ignored_is_ignored(tmp_path: Path) -> None:
    """As in a job in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        module = Recorder(("train", 2, 4), signal.SIGINT)
        fit(module, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert module.events[-1] == ("validate", 8, 7)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("minutes", "saves"), [(0.0005, 8), (0.0001, 8), (10.0, 0), (None, 0)])
def test_last_ckpt_is_saved_by_the_clock_at_step_boundaries(
    minutes: float | None, saves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step takes longer than 30 ms here and each batch than 6, so each step is due; the file says where it is."""
    found: list[tuple[int, int]] = []
    save = WholeCheckpointIO.save_checkpoint

    def watched(self: Any, checkpoint: dict[str, Any], path: Any, **options: Any) -> None:
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        found.append((checkpoint["global_step"], progress["ready"]))
        save(self, checkpoint, path, **options)

    class Slow(Recorder):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(WholeCheckpointIO, "save_checkpoint", watched)
    fit(Slow(), tmp_path, last_every_minutes=minutes)
    assert found == [(step, (2 * step - 1) % 8 + 1) for step in range(1, 9)][:saves]
    with pytest.raises(ConfigurationError, match=r"checkpoint.last_every_minutes must be positive, got 0"):
        BoundaryCheckpoint(tmp_path, last_every_minutes=0.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_signal_in_a_validation_leaves_it_at_once_and_makes_up_for_it(step: int, tmp_path: Path) -> None:
    whole, first, second = Recorder(), Recorder(("validate", step, 3)), Recorder()
    fit(whole, tmp_path / "whole")
    with pytest.raises(Preempted):
        fit(first, tmp_path / "run")
    assert first.events[-1] == ("validate", step, 2)
    fit(second, tmp_path / "run", str(tmp_path / "run" / "last.ckpt"))
    assert first.events[:-3] + second.events == whole.events


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "window", "steps"),
    [({"every_n_train_steps": 1}, 2, [1, 2, 3, 4, 5, 6, 7, 8]), ({}, 4, [1, 2, 3, 4])],
)
def test_saves_fall_on_a_window_s_end_and_none_that_is_due_is_dropped(
    options: dict[str, Any], window: int, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a validation within a window, whose save waits for the window's end."""
    found: list[tuple[int, int]] = []
    save = WholeCheckpointIO.save_checkpoint

    def watched(self: Any, checkpoint: dict[str, Any], path: Any, **more: Any) -> None:
        ready = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]
        found.append((checkpoint["global_step"], ready % window))
        save(self, checkpoint, path, **more)

    monkeypatch.setattr(WholeCheckpointIO, "save_checkpoint", watched)
    trainer: dict[str, Any] = {"accumulate_grad_batches": window}
    if window == 4:
        trainer["val_check_interval"] = 3  # after batches 3 and 6 of 8, within windows of four
    fit(Recorder(), tmp_path, trainer_options=trainer, save_top_k=-1, filename="{step}", **options)
    assert sorted({step for step, _ in found}) == steps
    assert {place for _, place in found} == {0}
