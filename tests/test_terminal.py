"""What a person sees who runs a command in a terminal."""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.logging.displays import described
from callbacks.logging.line_progress import LineProgress, figures
from callbacks.logging.terminal_progress import TerminalProgress
from commands.quiet import quieten
from core.progress import Display, bar
from core.terminal import fitted
from datamodules.batches import PromptBatch
from lightning_modules import RLOOModule, SFTModule
from lightning_modules.models.adapter_files import LoraOptions
from lightning_modules.rewards.rules import brevity

ROOT = Path(__file__).parents[1]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def in_a_terminal(*arguments: str, columns: int) -> tuple[int, list[str]]:
    """A command's exit code and the lines that it leaves, as far as they can be told without an emulator."""
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TERM": "xterm",
    }
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    command = [sys.executable, "cli.py", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=its, stdout=its, stderr=its)
    os.close(its)
    output = b""
    while True:
        try:
            part = os.read(mine, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        output += part
    os.close(mine)
    text = ESCAPES.sub("", output.decode("utf-8", "replace"))
    return process.wait(), [line.rpartition("\r")[2].rstrip() for line in text.replace("\r\n", "\n").split("\n")]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "columns"), [("SFTModule", 120), ("RLOOModule", 80)])
def test_a_fit_leaves_its_lines_whole_and_no_bar(method: str, columns: int, config: Any, tmp_path: Path) -> None:
    code, lines = in_a_terminal("fit", "--config", config(method, trainer={"max_epochs": 2}), columns=columns)
    text = "\n".join(lines)
    assert code == 0, text
    assert lines[0] == "loading ..."
    whole = " ".join(text.split())
    headline = (
        r"evaluation on 4 prompts: win rate [\d.]+ \[[\d., ]+\], \d wins, \d ties, \d losses, 0 failed; reward -[\d.]+ "
    )
    assert len(re.findall(headline + r"against -[\d.]+, length ratio [\d.]+", whole)) == 2
    assert sum(line.startswith("epoch 2 of 2  step 4/4") for line in lines) == 1
    evaluated = next(at for at, line in enumerate(lines) if line.startswith("evaluation on"))
    assert any(line.startswith("epoch 1 of 2  step 2/4") for line in lines[:evaluated]), "the headline is the last"
    assert "Qwen2ForCausalLM of 8,896 parameters, all of them trained" in text
    assert f"exported the model to {tmp_path / 'run' / 'final'}" in whole.replace(" /", "/").replace("/tmp", " /tmp")
    for noise in (
        "v_num",
        "log_every_n_steps",
        "treespec",
        "Loading weights",
        "Writing model shards",
        "0/1",
        "it/s",
        "FLOPs",
        "train mode",
    ):
        assert noise not in text, noise


@pytest.mark.slow
def test_a_validation_of_prompts_alone_ends_with_its_headline_and_where_the_files_are(
    tiny_model_dir: Path, talks: Path, tmp_path: Path
) -> None:
    """It has no rows, so nobody knows how many batches there are."""
    options = {"model.model_name": tiny_model_dir, "evaluation.reference_model": tiny_model_dir}
    options |= {"evaluation.dataset_name": talks, "evaluation.split": "test", "evaluation.num_prompts": 4}
    options |= {"evaluation.reward": "lightning_modules.rewards.rules.brevity", "evaluation.max_completion_length": 5}
    options |= {"trainer.default_root_dir": tmp_path / "run", "trainer.accelerator": "cpu"}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    code, lines = in_a_terminal("validate", *arguments, columns=100)
    text = " ".join(" ".join(lines).split())
    assert code == 0, "\n".join(lines)
    assert "evaluation on 4 prompts: win rate 0.500" in text
    assert "every answer in" in text.partition("evaluation on 4 prompts")[2]
    assert "0.50000" not in text


def trainer_with(display: Any) -> Trainer:
    own = {"callbacks": [display]} if display else {"enable_progress_bar": False}
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **own)


def test_work_beside_training_is_shown_where_training_is(capsys: pytest.CaptureFixture[str]) -> None:
    for display in (TerminalProgress(), LineProgress(every_s=0.0), None):
        with bar(trainer_with(display), "asking the judge", 4) as told:
            told.update(1)
            told.update(2)
    printed = capsys.readouterr().out
    assert "asking the judge  1/4\nasking the judge  3/4\n" in printed
    silent = TerminalProgress()
    trainer = trainer_with(silent)
    silent.disable()
    with bar(trainer, "asking the judge", 4) as told:
        told.update(1)
    assert "asking" not in capsys.readouterr().out


def test_what_is_left_is_told_by_the_pace_of_the_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not by what came before them, as asking the reference."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(Trainer, "estimated_stepping_batches", 100)
    display, trainer = LineProgress(every_s=10.0), trainer_with(None)
    trainer.state.fn = TrainerFn.FITTING
    display.on_train_start(trainer, LightningModule())
    for step, now in enumerate((50.0, 55.0, 60.0), start=1):  # noqa: B007  # read by the clock
        trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = step
        trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
        display.on_train_batch_end(trainer, LightningModule(), None, None, step - 1)
    lines = capsys.readouterr().out.splitlines()
    assert not lines[0].endswith("left")
    assert lines[-1].endswith("485 s left")


def test_lines_for_a_terminal_break_between_words_and_those_for_a_file_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/path/that/is/longer-than/the/terminal/is-wide.yaml"
    line = f"  sft: yes, better than the reference; see {path} for more"
    shown = fitted(f"{line}\nshort", is_terminal=True)
    *first, last = shown.split("\n")
    assert last == "short"
    assert all(len(part) <= 40 or part.strip() == path for part in first)
    assert "\n".join(first).replace("\n    ", " ") == line
    assert fitted(line, is_terminal=False) == line


def test_work_is_shown_once_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    display = TerminalProgress()
    with bar(trainer_with(display), "sampling", 4, after_s=1.0) as told:
        (task,) = display.start().tasks
        told.update(1)
        assert not task.visible
        now = 11.5
        told.update(1)
        assert task.visible
        assert task.completed == 2


class Told(Display):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    @contextmanager
    def bar(self, title: str, total: int, *, after_s: float = 0.0) -> Iterator[Any]:
        assert (title, total) == ("sampling", 5)
        assert after_s > 0
        self.update = self.counts.append
        yield self


def test_sampling_in_training_tells_each_token(tiny_model_dir: Path) -> None:
    module = RLOOModule(model_name=str(tiny_model_dir), reward=brevity, max_completion_length=5)
    module.configure_model()
    display = Told()
    module.trainer = trainer_with(display)
    batch = PromptBatch([[{"role": "user", "content": "a"}]] * 2, [torch.tensor([1, 2]), torch.tensor([2, 1])])
    longest = module.sample(batch, [1, 2]).completion_lengths().max()
    assert display.counts == [1] * int(longest)


def test_a_model_is_described_by_what_of_it_is_trained(tiny_model_dir: Path) -> None:
    whole = SFTModule(model_name=str(tiny_model_dir))
    beside = SFTModule(model_name=str(tiny_model_dir), lora=LoraOptions(rank=2))
    for module in (whole, beside):
        module.configure_model()
    count = sum(parameter.numel() for parameter in whole.parameters())
    added = sum(parameter.numel() for name, parameter in beside.named_parameters() if "lora" in name)
    assert described(whole.model) == f"Qwen2ForCausalLM of {count:,} parameters, all of them trained"
    share = f"{added:,} ({added / (count + added):.2%})"
    assert described(beside.model) == f"Qwen2ForCausalLM of {count + added:,} parameters, {share} of them trained"


def test_figures_are_short_and_without_the_number_of_a_run() -> None:
    assert figures({"v_num": "doto", "train/loss": 0.123456, "val/loss": 12.5}) == "loss 0.1235  val/loss 12.5"


def run_all(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "run_all.sh", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_pipeline_s_script_says_what_it_does_and_starts_nothing_by_a_wrong_name() -> None:
    told = run_all("--help")
    assert told.returncode == 0
    assert told.stdout.startswith("The whole pipeline: SFT, reward model, DPO and RLOO from the SFT model")
    assert "set -euo" not in told.stdout
    wrong = run_all("demoo")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: no command 'demoo'; there are ./run_all.sh, which takes hours, and")


@pytest.mark.parametrize(
    ("name", "line", "told"),
    [
        ("lightning.pytorch.accelerators.cuda", "LOCAL_RANK: 0 - CUDA_VISIBLE_DEVICES: [0]", False),
        ("lightning.pytorch.utilities.rank_zero", "a CUDA device ('NVIDIA H200') that has Tensor Cores. To", False),
        ("lightning.pytorch.utilities.rank_zero", "GPU available: True (cuda), used: True", True),
    ],
)
def test_of_a_gpu_only_that_it_is_used_is_told(
    name: str, line: str, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    quieten()
    logging.getLogger(name).info(line)
    assert (line in capsys.readouterr().err) == told


@pytest.mark.parametrize("left", [True, False])
def test_a_reader_that_leaves_ends_a_command_without_a_word(left: bool) -> None:
    reader, writer = os.pipe()
    if left:
        os.close(reader)
    command = [sys.executable, "cli.py", "configs"]
    result = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    if not left:
        os.close(reader)
    assert result.stderr == ""
    assert result.returncode == (141 if left else 0)
