"""A run that is stopped anywhere and resumed by the same command ends as the one that was left alone, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer

from callbacks.checkpoints.exact_resume import judged_enough, settle
from callbacks.logging.metrics_file import MetricsFile
from datamodules.position import Position, ResumableSampler
from datamodules.token_budget import TokenBudgetSampler
from lightning_modules import SFTModule
from tests.command_line import Cli, assert_refused
from tests.kills import METHODS, make_material

ROOT = Path(__file__).parents[1]


def assert_kills_change_nothing(*options: str) -> None:
    """In a process of its own, which has no threads when it forks."""
    command = [sys.executable, "-m", "tests.kills", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # no GPU outlives a fork
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr[-10000:]


def test_two_kills_change_nothing() -> None:
    assert_kills_change_nothing("--kills", "2", "--workers", "0", "--methods", "RLOOModule")


KILLED_IN_A_BAR = """
import os, signal, sys, time
from pathlib import Path

from tqdm.auto import tqdm

from tests.forked import start

folder = Path(sys.argv[1])
for _ in tqdm(range(2)):  # from here on its class has a lock, which later forks take over
    pass


def hold() -> int:
    with tqdm.get_lock():
        (folder / "held").touch()
        time.sleep(60)
    return 0


(first,) = start(hold, ranks=1, log=folder / "log.txt")
while not (folder / "held").exists():
    time.sleep(0.01)
os.kill(first.pid, signal.SIGKILL)
first.join()
(second,) = start(lambda: len(list(tqdm(range(3)))), ranks=1, log=folder / "log.txt")
second.join(30)
code = second.exitcode
second.kill()
sys.exit(code != 3)
"""


def test_a_process_killed_while_it_draws_a_bar_does_not_hold_up_the_next(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED_IN_A_BAR, str(tmp_path)], cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_eight_kills_change_nothing_with_workers_and_without(method: str) -> None:
    assert_kills_change_nothing("--kills", "8", "--seed", "2", "--methods", method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SFTModule", "RLOOModule"])
def test_kills_of_a_rank_or_of_the_whole_job_change_nothing_on_two_ranks(method: str) -> None:
    assert_kills_change_nothing("--kills", "4", "--ranks", "2", "--workers", "0", "--methods", method)


@pytest.mark.slow
def test_kills_change_nothing_of_a_mixture() -> None:
    options = ("--kills", "3", "--workers", "2", "--mixture")
    assert_kills_change_nothing(*options, "--methods", "SFTModule", "DPOModule")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_sampler_goes_on_behind_the_batches_that_were_seen(rank: int) -> None:
    whole = ResumableSampler(range(20), 2, rank, shuffle=True, seed=3)
    resumed = ResumableSampler(
        range(20), 2, rank, shuffle=True, seed=3, start=Position(epoch=1, batches=2), rows_per_batch=3
    )
    whole.set_epoch(1)
    assert list(resumed) == list(whole)[6:], "without being told the epoch, as Lightning's first iterator is not"
    assert len(resumed) == len(whole) == 10
    for sampler in (whole, resumed):
        sampler.set_epoch(2)
    assert list(resumed) == list(whole), "the next epoch is whole"


def test_what_is_asked_about_before_training_is_the_whole_first_epoch() -> None:
    whole = list(ResumableSampler(range(20), 1, 0, shuffle=True, seed=3))
    resumed = ResumableSampler(range(20), 1, 0, shuffle=True, seed=3, start=Position(epoch=1, batches=6))
    rest = list(resumed)
    with resumed.from_the_beginning():
        assert list(resumed) == whole
    assert list(resumed) == rest != whole[6:]


def test_batches_of_a_token_budget_go_on_too() -> None:
    options: dict[str, Any] = {"budget": 10, "world_size": 1, "rank": 0, "seed": 5}
    lengths = [3, 9, 4, 2, 8, 6, 1, 7]
    whole = TokenBudgetSampler(lengths, **options)
    whole.set_epoch(2)
    assert list(TokenBudgetSampler(lengths, **options, start=Position(2, 3))) == list(whole)[3:]


def counters(*, epochs: tuple[int, int], batches: int, completed: int) -> dict[str, Any]:
    def counts(done: int, ended: int) -> dict[str, Any]:
        each = {"ready": done, "started": done, "processed": done, "completed": ended}
        return {"total": dict(each), "current": dict(each)}

    started, processed = epochs
    epoch = counts(started, processed)
    for each in epoch.values():
        each["processed"], each["completed"] = processed, 0
    return {
        "epoch_progress": epoch,
        "epoch_loop.batch_progress": {**counts(batches, completed), "is_last_batch": True},
        "epoch_loop.val_loop.batch_progress": counts(4, 4),
    }


def test_counters_saved_after_a_batch_say_that_it_is_done() -> None:
    loops = counters(epochs=(1, 0), batches=3, completed=2)
    assert settle(loops) == Position(0, 3)
    assert loops["epoch_loop.batch_progress"]["current"]["completed"] == 3
    assert loops["epoch_progress"]["current"] == {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def test_counters_saved_after_an_epoch_say_that_the_next_has_not_begun() -> None:
    loops = counters(epochs=(1, 1), batches=6, completed=6)
    assert settle(loops) == Position(1, 0)
    assert loops["epoch_progress"]["current"]["completed"] == 1
    assert loops["epoch_loop.batch_progress"]["current"]["ready"] == 0
    assert not loops["epoch_loop.batch_progress"]["is_last_batch"]


def test_a_log_is_cut_to_what_it_was(tmp_path: Path) -> None:
    record = MetricsFile(tmp_path)
    record.log_metrics({"b": 1.0, "a": 2.0}, 0)
    sizes = record.sizes()
    record.log_metrics({"a": 3.0}, 1)
    record.log_table("t", ["x"], [[1]])
    record.cut(sizes)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "a": 2.0, "b": 1.0}\n'
    assert (tmp_path / "tables.jsonl").read_text() == ""
    record.cut({"metrics.jsonl": 10_000})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1, "a log is never made longer"


def test_a_batch_s_random_numbers_depend_on_its_place_alone(tiny_model_dir: Path) -> None:
    module = SFTModule(model_name=str(tiny_model_dir))
    module._trainer = type("Trainer", (), {"current_epoch": 1, "global_rank": 0})()  # type: ignore[assignment]

    def drawn(batch_idx: int) -> list[float]:
        module.on_train_batch_start(None, batch_idx)
        return torch.rand(2).tolist()  # type: ignore[no-any-return]

    first = drawn(3)
    torch.rand(100)  # as an evaluation draws
    assert drawn(3) == first
    assert drawn(4) != first


@pytest.mark.filterwarnings("ignore")
def test_a_run_on_another_number_of_processes_is_not_gone_on_with(cli: Cli, config: Any, tmp_path: Path) -> None:
    path = config("SFTModule", evaluation={"num_prompts": 0})
    assert cli("fit", "--config", path).returncode == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    content["exact_resume"]["processes"] = 3
    last.unlink()
    torch.save(content, last)
    result = cli("fit", "--config", path, "--ckpt_path", str(last))
    assert_refused(result, "is of a run on 3 processes, this one has 1")


@pytest.mark.filterwarnings("ignore")
def test_training_anew_in_a_folder_without_a_checkpoint_empties_the_log(
    cli: Cli, config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = config("SFTModule", evaluation={"num_prompts": 0}, trainer={"log_every_n_steps": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "train/loss": 9.0}\n')
    result = cli("fit", "--config", path, "--ckpt_path", "last")
    assert result.returncode == 0
    assert "holds no checkpoint yet, so a training starts anew" in caplog.text
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [step["train/loss"] for step in steps if "train/loss" in step]
    assert losses
    assert 9.0 not in losses


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_says_nothing_of_the_log_costs_no_line_of_it(cli: Cli, config: Any, tmp_path: Path) -> None:
    """As an earlier version wrote it."""
    path = config("SFTModule", evaluation={"num_prompts": 0})
    assert cli("fit", "--config", path).returncode == 0
    log, last = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "checkpoints" / "last.ckpt"
    before, content = log.read_text(), torch.load(last, weights_only=True)
    del content["exact_resume"]
    last.unlink()
    torch.save(content, last)
    assert cli("fit", "--config", path, "--ckpt_path", str(last), "--trainer.max_epochs", "2").returncode == 0
    assert log.read_text().startswith(before)
    assert len(log.read_text()) > len(before)


def trainer_at(step: int, *callbacks: Callback, should_stop: bool = True) -> Trainer:
    """A trainer of five steps after so many."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=5, accelerator="cpu", callbacks=list(callbacks), **quiet)
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    trainer.should_stop = should_stop
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_only_a_judgement_stops_a_resumed_run() -> None:
    """A limit may be raised, and a clock has its own say; early stopping stays as it was."""
    assert judged_enough(trainer_at(3))
    assert judged_enough(trainer_at(3, Timer()))
    assert not judged_enough(trainer_at(3, should_stop=False))
    assert not judged_enough(trainer_at(5))
    assert not judged_enough(trainer_at(3, Timer(duration=timedelta(0))))


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_early_stopping_ended_is_not_gone_on_with(cli: Cli, config: Any, tmp_path: Path) -> None:
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 1, "mode": "max"}}
    trainer = {"max_epochs": 9, "callbacks": [stopping]}
    path = config("SFTModule", evaluation={"num_prompts": 0}, trainer=trainer, model={"learning_rate": 1e-3})
    assert cli("fit", "--config", path).returncode == 0
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert cli("fit", "--config", path, "--ckpt_path", "last").returncode == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == log


@pytest.mark.filterwarnings("ignore")
def test_a_run_killed_in_its_last_evaluation_makes_up_for_it(
    cli: Cli, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No validation is due at its end, so the evaluation follows the last checkpoint."""

    def run(name: str) -> int:
        trainer = {"default_root_dir": str(tmp_path / name), "check_val_every_n_epoch": 2, "log_every_n_steps": 1}
        path = config("SFTModule", trainer=trainer, checkpoint={"monitor": None})
        return cli("fit", "--config", path, "--ckpt_path", "last").returncode

    def killed(*args: Any, **options: Any) -> None:
        raise RuntimeError("killed")

    assert run("alone") == 0
    with monkeypatch.context() as patch:
        patch.setattr("callbacks.nemotron_evaluation.evaluate", killed)
        assert run("killed") == 1
    assert not (tmp_path / "killed" / "eval").exists()
    assert run("killed") == 0
    for name in ("metrics.jsonl", "final/README.md", "eval/epoch=0/pairs.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert "prompts against" in (tmp_path / "killed" / "final" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_the_model_card_of_a_run_killed_in_its_export_has_all_its_figures(
    cli: Cli, config: Any, tmp_path: Path
) -> None:
    path = config("SFTModule")
    assert cli("fit", "--config", path).returncode == 0
    card = tmp_path / "run" / "final" / "README.md"
    before = card.read_text()
    assert "val/loss" in before
    assert "prompts against" in before
    shutil.rmtree(card.parent)
    assert cli("fit", "--config", path, "--ckpt_path", "last").returncode == 0
    assert card.read_text() == before


def test_two_fresh_runs_with_one_seed_are_equal_bit_for_bit(tmp_path: Path) -> None:
    """Under different hash seeds, numbers of workers and of logging steps; two methods draw samples."""
    make_material(tmp_path / "material")
    started = []
    for name, workers, log_every in (("one", 0, 1), ("two", 2, 3)):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(len(name) + workers)}
        environment |= {"WANDB_MODE": "disabled", "HF_DATASETS_CACHE": str(tmp_path / f"datasets-{name}")}
        options = [str(tmp_path / "material"), str(tmp_path / name), "--workers", str(workers)]
        command = [sys.executable, "-m", "tests.repeats", *options, "--log_every", str(log_every)]
        with (tmp_path / f"{name}.txt").open("w") as log:
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    assert [process.wait(280) for process in started] == [0, 0], (tmp_path / "one.txt").read_text()[-2000:]
    for method in METHODS:
        one, two = tmp_path / "one" / method, tmp_path / "two" / method
        files = ["final/model.safetensors", *(str(f.relative_to(one)) for f in one.glob("eval/*/pairs.jsonl"))]
        for file in files:
            assert (one / file).read_bytes() == (two / file).read_bytes(), f"{file} of {method}"
        validations = [
            [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "val/loss" in line]
            for run in (one, two)
        ]
        assert validations[0] == validations[1]
        told = [json.loads((run / "environment.json").read_text()) for run in (one, two)]
        assert told[0] == told[1]
        assert set(told[0]["data"]) == {"train_prefs", "test_prefs"}
