"""Damaged caches, full disks, and kills where nothing is saved yet: one line each, and nothing paid for is lost."""

import errno
import json
import os
import signal
import sqlite3
import stat
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from callbacks.checkpoints.preemption import Preempted, Preemption
from callbacks.evaluation import files as evaluation_files
from callbacks.evaluation.cache import EvaluationCache
from callbacks.logging.metrics_file import MetricsFile
from core import files
from core.errors import ConfigurationError
from core.files import write_whole
from lightning_modules import DPOModule
from lightning_modules.models import reference_cache
from tests.command_line import Cli, assert_refused
from tests.test_reference_cache import PAIRS, batch_of

pytestmark = pytest.mark.filterwarnings("ignore")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as file:
        file.execute("CREATE TABLE passwords (name TEXT)")
        file.execute("INSERT INTO passwords VALUES ('mine')")


def other_columns(path: Path) -> None:
    with sqlite3.connect(path) as file:
        file.execute("CREATE TABLE scores (name TEXT, value REAL)")


def no_database(path: Path) -> None:
    path.write_bytes(b"what a power cut left" * 500)


@pytest.mark.parametrize("damage", [foreign, other_columns, no_database])
def test_a_cache_that_is_none_is_left_as_it_is_and_told(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "evaluation.sqlite"
    damage(path)
    before = path.read_bytes()
    told = r"evaluation.sqlite cannot be used .* left as it is, and .*evaluation-2.sqlite taken"
    with pytest.warns(UserWarning, match=told):
        cache = EvaluationCache(path)
    cache.keep_score("a", 1.5)
    assert cache.score("a") == 1.5
    cache.close()
    assert path.read_bytes() == before
    damage(tmp_path / "evaluation-3.sqlite")
    with pytest.warns(UserWarning, match=told):
        again = EvaluationCache(path)
    assert again.score("a") == 1.5
    again.close()


def test_damaged_pages_are_noticed_where_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.sqlite"
    cache = EvaluationCache(path)
    for number in range(2000):
        cache.keep_completion(f"{number:064}", "text " * 20, 20)
    cache.close()
    with path.open("r+b") as file:
        file.seek(8 * 4096)
        file.write(b"\xa5" * (path.stat().st_size - 12 * 4096))
    cache = EvaluationCache(path)
    with pytest.warns(UserWarning, match="cannot be used"):
        found = [cache.completion(f"{number:064}") for number in range(2000)]
    assert found[-1] is None
    cache.keep_completion("x", "new", 1)
    assert cache.completion("x") == ("new", 1)
    cache.close()


def test_a_cache_that_cannot_be_read_costs_a_warning_and_no_training(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """As where its disk is gone; that is told once for what is read and once for what is kept."""
    warnings.simplefilter("always")
    cache = EvaluationCache(tmp_path / "evaluation.sqlite")
    cache.keep_score("a", 1.0)
    cache._file.execute("DROP TABLE scores")
    cache._file.execute("DROP TABLE completions")
    assert cache.score("a") is None
    assert cache.completion("a") is None
    cache.keep_score("a", 2.0)
    cache.keep_score("b", 2.0)
    told = [str(warning.message).partition(" in ")[0] for warning in recwarn]
    assert told == ["what is kept", "no more scores are kept"]
    cache.close()


def test_values_that_nothing_of_ours_wrote_are_asked_about_anew(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.sqlite"
    cache = EvaluationCache(path)
    odd: list[Any] = ["much", float("inf"), b"\x00", "1.5x"]
    with sqlite3.connect(path) as file:
        for number, value in enumerate(odd):
            file.execute("INSERT INTO scores VALUES (?, ?)", (str(number), value))
            file.execute("INSERT INTO completions VALUES (?, ?, ?)", (str(number), b"x" if number else "x", value))
    for number in range(len(odd)):
        assert cache.score(str(number)) is None
        assert cache.completion(str(number)) is None
        cache.keep_score(str(number), 2.0)
        assert cache.score(str(number)) == 2.0
    cache.close()


def test_what_holds_prompts_and_completions_is_its_user_s_alone(config: Any, tmp_path: Path, cli: Cli) -> None:
    assert cli("fit", "--config", config("DPOModule")).returncode == 0
    MetricsFile(tmp_path / "run").log_table("samples", ["completion"], [["text"]])
    patterns = ("cache/*", "run/eval/*/pairs.jsonl", "run/tables.jsonl")
    private = [file for pattern in patterns for file in tmp_path.glob(pattern)]
    kinds = {file.name.split("-")[0] for file in private}
    assert kinds == {"evaluation.sqlite", "reference", "pairs.jsonl", "tables.jsonl"}
    for file in private:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE((tmp_path / "run" / "metrics.jsonl").stat().st_mode) & 0o044


def test_a_cache_behind_a_link_is_refused(tmp_path: Path) -> None:
    foreign(tmp_path / "other.sqlite")
    (tmp_path / "evaluation.sqlite").symlink_to(tmp_path / "other.sqlite")
    with pytest.raises(ConfigurationError, match="is a link, and no cache is kept behind one"):
        EvaluationCache(tmp_path / "evaluation.sqlite")


def test_a_whole_file_follows_no_link_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, path = tmp_path / "other", tmp_path / "metrics.json"
    other.write_text("mine")
    path.symlink_to(other)
    (tmp_path / "metrics.json.partial").symlink_to(other)
    write_whole(path, "new")
    assert (path.read_text(), other.read_text(), path.is_symlink()) == ("new", "mine", False)
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(FULL))
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "newer")
    assert path.read_text() == "new"
    assert {file.name for file in tmp_path.iterdir()} == {"other", "metrics.json", "metrics.json.partial"}


def test_a_full_disk_costs_lines_and_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is there in full or not at all, and there are lines again once there is room."""
    log = MetricsFile(tmp_path)
    log.log_metrics({"a": 1.0}, step=1)
    write = os.write
    for count in (0, 5):  # as a disk that is full does, and one that fills up within the line
        monkeypatch.setattr(os, "write", lambda fd, data, count=count: write(fd, data[:count]) if count else boom())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            log.log_metrics({"a": 2.0}, step=2)
        assert len(told) == (1 if count == 0 else 0), "once is enough"
    monkeypatch.undo()
    log.log_metrics({"a": 3.0}, step=3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3]


def boom(*_: Any, **__: Any) -> None:
    raise FULL


def test_an_evaluation_that_cannot_be_written_ends_no_training(
    config: Any, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(evaluation_files, "write_whole", boom)
    warnings.simplefilter("always")
    result = cli("fit", "--config", config("SFTModule"))
    assert result.returncode == 0, result.stderr
    assert any("has no files of this evaluation (No space left on device)" in str(w.message) for w in recwarn)
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/win_rate" in line for line in logged)
    assert_refused(cli("validate", "--config", config("SFTModule")), "eval/final has no files of this evaluation")


def dpo(model: Path, root: Path, stop_after: int | None = None) -> tuple[DPOModule, list[int]]:
    """A fit of six pairs, one a batch, that is sent SIGTERM once the reference has told so many."""
    module = DPOModule(model_name=str(model), learning_rate=1e-3)
    asked: list[int] = []
    ask = module.reference_log_probs

    def asking(batch: Any) -> torch.Tensor:
        if len(asked) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # ended here, and not at the next step
            pytest.fail("still asking")
        asked.append(1)
        return ask(batch)

    module.reference_log_probs = asking  # type: ignore[method-assign]
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=root / "run",
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Preemption()],
    )
    pairs = [*PAIRS, *((prompt, rejected, chosen) for prompt, chosen, rejected in PAIRS)]
    trainer.fit(module, torch.utils.data.DataLoader([batch_of([pair]) for pair in pairs], batch_size=None))
    return module, asked


def test_sigterm_ends_the_reference_s_pass_at_once_and_what_it_told_is_kept(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    whole, asked = dpo(tiny_model_dir, tmp_path / "whole")
    assert len(asked) == 6
    with pytest.raises(Preempted) as left:
        dpo(tiny_model_dir, tmp_path / "stopped", stop_after=4)
    assert left.value.code == 143
    (table,) = (tmp_path / "stopped" / "cache").iterdir()
    assert len(reference_cache.read_table(table)) == 4
    with table.open("a") as file:
        file.write('["a pair whose line was bro')  # by a kill
    resumed, asked = dpo(tiny_model_dir, tmp_path / "stopped")
    assert len(asked) == 2
    assert len(reference_cache.read_table(table)) == 6
    assert resumed._reference_table == whole._reference_table
    for name, weights in resumed.model.state_dict().items():
        assert torch.equal(weights, whole.model.state_dict()[name])


def test_a_disk_that_keeps_no_table_costs_a_warning(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where the folder should be")
    with pytest.warns(UserWarning, match="the reference's log-probabilities are not kept for another run"):
        dpo(tiny_model_dir, tmp_path)


def test_a_new_file_is_new_and_through_no_link(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / "link").symlink_to(other)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("other", "link", "dangling"):
        with pytest.raises(FileExistsError):
            files.new_file(tmp_path / name)
    assert other.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    os.close(files.new_file(tmp_path / "new", files.OWN))
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
