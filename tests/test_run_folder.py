"""Nothing in a run's folder is replaced in silence, and what is judged is the run's own model."""

import errno
import functools
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from callbacks import HuggingFaceExport, hugging_face_export
from callbacks.checkpoints.boundary_checkpoint import BoundaryCheckpoint
from callbacks.hugging_face_export import check_place, write_export
from commands.checkpoints import checkpoints
from commands.run_folder import FolderLock, RunFolder, give_up_locks
from core.errors import ConfigurationError
from lightning_modules import SFTModule
from tests.command_line import Cli, assert_refused
from tests.evaluation_run import read

pytestmark = pytest.mark.filterwarnings("ignore")
CHANGES = ("--model.learning_rate", "0.05")


def content(folder: Path) -> dict[str, str]:
    """A digest of every file but W&B's and the caches'."""
    files = (file for file in folder.rglob("*") if file.is_file() and "wandb" not in file.parts)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("method", ["DPOModule", "SFTModule"])
def test_validate_with_a_config_alone_judges_the_run_s_final_model(
    method: str, config: Any, tmp_path: Path, tiny_model_dir: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    """Against the model that training started from; its own name is in the figures, and the digest is the file's."""
    path, run = config(method), tmp_path / "run"
    nothing = cli("validate", "--config", path)
    assert_refused(nothing, "run/final holds no model, so there is nothing to judge yet")
    nothing = cli("validate", "--config", path, "--ckpt_path", "last")
    assert_refused(nothing, "run/checkpoints holds no checkpoint to judge")
    assert cli("fit", "--config", path, *CHANGES).returncode == 0
    result = cli("validate", "--config", path, *CHANGES)
    assert result.returncode == 0, result.stderr
    assert f"judging {run / 'final'} against {tiny_model_dir}" in caplog.text
    (during, trained), (after, judged) = (read(run / "eval" / name) for name in ("epoch=0", "final"))
    assert [pair["completion"] for pair in judged] == [pair["completion"] for pair in trained]
    assert [pair["completion"] for pair in judged] != [pair["reference_completion"] for pair in judged]
    assert after["model_digest"] == during["model_digest"]
    assert (after["model"], after["reference"]) == (str(run / "final"), str(tiny_model_dir))
    assert during["model"] == f"{tiny_model_dir} after 2 steps of {method.removesuffix('Module').lower()}"
    if method == "DPOModule":  # against itself the margin would be 0
        lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
        assert lines[-1]["val/margin"] != 0.0
    assert cli("compare", str(run), "--output", str(tmp_path / "report")).returncode == 0
    assert json.loads((tmp_path / "report" / "summary.json").read_text())["notes"] == []


def test_another_model_judged_in_a_run_s_folder_is_noted_by_compare(
    config: Any, tmp_path: Path, tiny_model_dir: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    path = config("SFTModule")
    assert cli("fit", "--config", path, *CHANGES).returncode == 0
    named = ["--model.model_name", str(tiny_model_dir), "--evaluation.reference_model", str(tiny_model_dir)]
    assert cli("validate", "--config", path, *named).returncode == 0
    assert f"judging {tiny_model_dir} against" in caplog.text
    compared = cli("compare", str(tmp_path / "run"), "--output", str(tmp_path / "report"))
    assert "note: the evaluation of run (eval/final) is of other weights than its final model" in compared.stdout


def test_validate_without_any_model_is_refused(cli: Cli) -> None:
    assert_refused(cli("validate", "--evaluation.num_prompts", "3"), "validate needs a model")


def test_a_finished_run_is_replaced_only_where_that_is_asked_for(config: Any, tmp_path: Path, cli: Cli) -> None:
    path, run = config("SFTModule", trainer={"log_every_n_steps": 1}), tmp_path / "run"
    assert cli("fit", "--config", path).returncode == 0
    (run / "notes.txt").write_text("mine")
    before = content(run)
    refused = cli("fit", "--config", path)
    assert_refused(refused, "holds a finished run: go on with --ckpt_path last, start over with --overwrite true")
    assert_refused(cli("fit", "--config", path, "--ckpt_path", "last", "--overwrite", "true"), "name one of the two")
    other = ["--trainer.default_root_dir", str(tmp_path / "other")]
    assert cli("fit", "--config", path, *other, "--trainer.max_epochs", "2").returncode == 0
    foreign = str(tmp_path / "other" / "checkpoints" / "last.ckpt")
    assert_refused(cli("fit", "--config", path, "--ckpt_path", foreign), "holds a finished run")
    mistake = cli("fit", "--config", path, "--overwrite", "true", "--evaluation.dataset_name", "./nowhere")
    assert_refused(mistake, "./nowhere does not exist")
    for more in ([], ["--overwrite", "true"]):
        assert cli("fit", "--config", path, "--trainer.fast_dev_run", "true", *more).returncode == 0
    assert {name: digest for name, digest in content(run).items() if name != "config.yaml"} == {
        name: digest for name, digest in before.items() if name != "config.yaml"
    }

    result = cli("fit", "--config", path, "--overwrite", "true", "--trainer.max_epochs", "2", *CHANGES)
    assert result.returncode == 0, result.stderr
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "train/loss" in line] == [0, 1, 2, 3]
    assert sorted(folder.name for folder in (run / "eval").iterdir()) == ["epoch=0", "epoch=1"]
    assert (run / "notes.txt").read_text() == "mine"
    assert content(run)["final/model.safetensors"] != before["final/model.safetensors"]
    assert yaml.safe_load((run / "config.yaml").read_text())["overwrite"] is False


def test_a_stopped_run_is_not_trained_over_in_silence(config: Any, tmp_path: Path, cli: Cli) -> None:
    path, run = config("SFTModule"), tmp_path / "run"
    assert cli("fit", "--config", path).returncode == 0
    (run / "final" / "config.json").rename(run / "final" / "moved.json")
    assert_refused(cli("fit", "--config", path), "holds a stopped run: go on with --ckpt_path last, start over with")
    assert cli("fit", "--config", path, "--ckpt_path", "last").returncode == 0


def test_a_requeued_job_goes_on_as_lightning_has_it(tmp_path: Path) -> None:
    """SLURM runs the same command again, and Lightning finds what the job saved for that."""
    folder = RunFolder(tmp_path, tmp_path / "checkpoints", tmp_path / "final")
    folder.checkpoints.mkdir()
    (folder.checkpoints / "last.ckpt").touch()
    with pytest.raises(ConfigurationError, match="holds a stopped run"):
        folder.check_free(None, resumes=False, overwrite=False)
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    folder.check_free(None, resumes=False, overwrite=False)
    with pytest.raises(ConfigurationError, match=r"hpc_ckpt_1.ckpt of a requeued job would be gone on from; remove it"):
        folder.check_free(None, resumes=False, overwrite=True)


@pytest.mark.parametrize("name", ["", ".", "..", "checkpoints", "Eval", "a/b", "/tmp", "a\nb", "x.old", "~"])
def test_an_export_goes_to_a_new_name_in_the_run_s_folder(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"export.directory must be a new name within the run's folder"):
        HuggingFaceExport(directory=name)


@pytest.mark.parametrize("place", ["final", "final.partial", "final.old"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_export_replaces_nothing_but_an_export(place: str, kind: str, tmp_path: Path) -> None:
    elsewhere, taken = tmp_path / "elsewhere", tmp_path / place
    elsewhere.mkdir()
    (elsewhere / "thesis.txt").write_text("mine")
    if kind == "link":
        taken.symlink_to(elsewhere)
    elif kind == "file":
        taken.write_text("mine")
    else:
        elsewhere.rename(taken)
    told = "is a link, and an export replaces no link" if kind == "link" else "is no model that a run exported"
    with pytest.raises(ConfigurationError, match=told):
        check_place(tmp_path / "final")


def test_what_an_export_would_replace_is_told_before_training(config: Any, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "thesis.txt").write_text("mine")
    before = content(tmp_path)
    result = cli("fit", "--config", config("SFTModule"))
    assert_refused(result, "run/final is no model that a run exported, so it is not replaced; move it away")
    assert before.items() <= content(tmp_path).items()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def exported(directory: Path) -> SFTModule:
    """The module of a model."""
    module = SFTModule(model_name=str(directory))
    module.configure_model()
    return module


def test_an_export_that_fails_leaves_the_one_before_as_it_was(
    config: Any, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here at its last file; the earlier export is removed once the new one is whole, and not a moment before."""
    path, run = config("SFTModule"), tmp_path / "run"
    assert cli("fit", "--config", path).returncode == 0
    before = content(run / "final")

    def full(*_: Any, **__: Any) -> str:
        assert content(run / "final") == before
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hugging_face_export, "model_card", full)
    result = cli("fit", "--config", path, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert_refused(result, "cannot export the model to")
    assert "No space left on device" in result.stderr
    assert content(run / "final") == before
    assert not (run / "final.partial").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    rename = Path.rename

    def refuse(self: Path, target: Any) -> Path:
        if self.name == "final.partial":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ConfigurationError, match="Permission denied"):
        write_export(
            Trainer(logger=False, default_root_dir=run),
            exported(run / "final"),
            run / "final",
            functools.partial(hugging_face_export.write_model, {}),
            library="transformers",
        )
    assert content(run / "final") == before
    monkeypatch.undo()
    assert cli("fit", "--config", path, "--ckpt_path", "last", "--trainer.max_epochs", "2").returncode == 0
    assert content(run / "final") != before
    assert not (run / "final.old").exists()


@pytest.mark.parametrize("linked", ["eval", "eval/epoch=0"])
def test_no_evaluation_is_written_through_a_link(linked: str, config: Any, tmp_path: Path, cli: Cli) -> None:
    other = tmp_path / "other"
    (other / "epoch=0").mkdir(parents=True)
    for folder in (other, other / "epoch=0"):
        (folder / "metrics.json").write_text("another run's")
    link = tmp_path / "run" / linked
    link.parent.mkdir(parents=True)
    link.symlink_to(other if linked == "eval" else other / "epoch=0")
    before = content(other)
    for options in ([], ["--overwrite", "true"]):
        assert_refused(cli("fit", "--config", config("SFTModule"), *options), "is a link, and no evaluation is written")
    assert content(other) == before


def test_starting_over_removes_nothing_outside_the_run_s_folder(tmp_path: Path) -> None:
    """Links go and not what they lead to; checkpoints elsewhere are the user's to remove."""
    root, other = tmp_path / "run", tmp_path / "other"
    for folder in (root / "eval" / "epoch=0", root / "checkpoints", other / "eval", other / "shards.ckpt"):
        folder.mkdir(parents=True)
    for file in (root / "eval" / "epoch=0" / "metrics.json", other / "eval" / "metrics.json", other / "last.ckpt"):
        file.write_text("{}")
    (other / "shards.ckpt" / "a").write_text("a")
    (root / "eval" / "linked").symlink_to(other / "eval")
    (root / "checkpoints" / "shards.ckpt").symlink_to(other / "shards.ckpt")
    (root / "metrics.jsonl").symlink_to(other / "last.ckpt")
    (root / "final").mkdir()
    (root / "final" / "config.json").write_text("no export made this")
    before = content(other)
    RunFolder(root, root / "checkpoints", root / "final").clear()
    assert content(other) == before
    left = {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir() or path.is_symlink()}
    assert left == {"eval/linked", "final/config.json"}
    outside = RunFolder(root, other, root / "final")
    with pytest.raises(ConfigurationError, match=r"lies outside .* where nothing is removed"):
        outside.check_free(None, resumes=False, overwrite=True)
    outside.clear()
    assert content(other) == before


@pytest.mark.parametrize("name", ["../../x", "a/b", "/tmp/x", "{../../x}", "{/tmp/x}", "x\ny", "best-{epoch}/../x"])
def test_a_checkpoint_stays_in_its_folder(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"checkpoint.filename must be a plain name"):
        BoundaryCheckpoint(filename=name)
    BoundaryCheckpoint(filename="best-{epoch}-{val/loss:.3f}")
    with pytest.raises(ConfigurationError, match=r"checkpoint.dirpath must name a folder"):
        BoundaryCheckpoint(dirpath="")


def test_a_checkpoint_s_record_of_others_removes_nothing_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    callback = BoundaryCheckpoint(dirpath=str(tmp_path / "checkpoints"))
    trainer = Trainer(logger=False, enable_checkpointing=False)
    inside, outside = tmp_path / "checkpoints" / "a.ckpt", tmp_path / "checkpoints" / ".." / "a.ckpt"
    assert callback._should_remove_checkpoint(trainer, str(inside), str(tmp_path / "b.ckpt"))
    assert not callback._should_remove_checkpoint(trainer, str(outside), str(tmp_path / "b.ckpt"))


def test_a_disk_without_room_for_a_checkpoint_is_told_before_training(
    config: Any, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    result = cli("fit", "--config", config("SFTModule"))
    assert_refused(result, "has room for 0.0 MB; make room there, or change checkpoint.dirpath")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


HOLD = """
import fcntl, sys, time
with open(sys.argv[1], "w+") as file:
    fcntl.lockf(file, fcntl.LOCK_SH)  # which leaves room for others of its kind, and none for a run
    print("process 7 on another-machine", file=file, flush=True)
    print("taken", flush=True)
    time.sleep(60)
"""
"""A process that holds a folder, started in a moment."""


def test_a_folder_is_one_run_s_at_a_time(config: Any, tmp_path: Path, cli: Cli) -> None:
    """A second one is told who has it; what a killed process held is free."""
    run = tmp_path / "run"
    run.mkdir()
    command = [sys.executable, "-c", HOLD, str(run / ".fit.lock")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "taken\n"
    refused = cli("fit", "--config", config("SFTModule"))
    assert_refused(refused, f"{run} is in use: process 7 on another-machine runs fit there; wait for it")
    assert not (run / "config.yaml").exists()
    FolderLock(run, "validate").take()  # a checkpoint may be judged while training goes on
    holder.kill()
    holder.communicate()
    assert cli("fit", "--config", config("SFTModule")).returncode == 0
    assert not list(run.glob(".*.lock"))
    FolderLock(run, "fit").take()
    assert (run / ".fit.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    give_up_locks()


def test_checkpoints_that_are_no_more_are_passed_over(config: Any, tmp_path: Path, cli: Cli) -> None:
    """``last.ckpt`` may be a link to one that somebody removed."""
    path, run = config("SFTModule"), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").symlink_to("gone.ckpt")
    assert cli("fit", "--config", path, "--ckpt_path", "last").returncode == 0
    (run / "checkpoints" / "newer.ckpt").symlink_to("gone.ckpt")
    result = cli("fit", "--config", path, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert result.returncode == 0, result.stderr
    losses = [json.loads(line).get("val/loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert len(losses) == 2
    best = f"best-epoch={losses.index(min(losses))}.ckpt"
    assert sorted(Path(file).name for file in checkpoints(str(run / "checkpoints"))) == [best, "last.ckpt"], losses


def test_the_run_s_own_record_is_kept_whatever_loggers_are_set(config: Any, tmp_path: Path, cli: Cli) -> None:
    for number, logger in enumerate(["false", "CSVLogger"]):
        root = tmp_path / f"run-{number}"
        options = ["--trainer.logger", logger, "--trainer.default_root_dir", str(root)]
        options += ["--trainer.logger.save_dir", str(root / "csv")] if logger == "CSVLogger" else []
        result = cli("fit", "--config", config("SFTModule"), *options)
        assert result.returncode == 0, result.stderr
        assert {"config.yaml", "environment.json", "metrics.jsonl"} <= {file.name for file in root.iterdir()}
        assert cli("compare", str(root), "--output", str(tmp_path / "report")).returncode == 0
    assert list((tmp_path / "run-1" / "csv").rglob("metrics.csv"))


def test_a_logger_whose_package_is_missing_is_one_line(config: Any, cli: Cli) -> None:
    result = cli("fit", "--config", config("SFTModule"), "--trainer.logger", "CometLogger")
    assert_refused(result, "Requirement 'comet-ml")
