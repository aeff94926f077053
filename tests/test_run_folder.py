"""Nothing in a run's folder is replaced in silence, and what is judged is the run's own model."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands.run_folder import RunFolder
from datamodules.errors import ConfigurationError
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


@pytest.mark.parametrize("name", ["", ".", "..", "checkpoints", "eval", "a/b", "/tmp"])
def test_an_export_replaces_nothing_but_an_export(name: str, config: Any, cli: Cli) -> None:
    result = cli("fit", "--config", config("SFTModule", export={"directory": name}))
    assert_refused(result, f"export.directory must be a new name within the run's folder, got {name!r}")


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
