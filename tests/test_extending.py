"""The files that docs/extending.md shows do what it says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid

from datamodules.batches import collate_preferences
from lightning_modules.base import FineTuningModule
from tests.command_line import Cli

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Path:
    """The page's files in a directory that a command is started from."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL):
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_a_method_of_one_s_own_trains_and_is_judged(own_files: Path, config: Any, cli: Cli, tmp_path: Path) -> None:
    options = ("--model", "simpo.SimPOModule", "--model.beta", "3.0", "--model.learning_rate", "1e-2")
    result = cli("fit", "--config", config("DPOModule", trainer={"max_epochs": 3}), *options)
    assert result.returncode == 0, result.stderr
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val/loss"] for line in logged if "val/loss" in line]
    assert losses[-1] < losses[0]
    assert "evaluation on 4 prompts" in result.stderr
    assert "simple preference optimisation" in (tmp_path / "run" / "final" / "README.md").read_text()


@torch.no_grad()
def test_its_loss_is_the_paper_s(own_files: Path, tiny_model_dir: Path) -> None:
    from simpo import SimPOModule

    module: FineTuningModule = SimPOModule(model_name=str(tiny_model_dir), beta=3.0, gamma=0.5)
    module.configure_model()
    sides = {"chosen_ids": [5, 6, 7], "rejected_ids": [8, 9]}
    batch = collate_preferences([{"prompt_ids": [1, 2, 3], **sides}], pad_token_id=0, tail_ids=[])
    means = []
    for answer in sides.values():
        log_probs = log_softmax(module.model(torch.tensor([[1, 2, 3, *answer]])).logits[0], dim=-1)
        means.append(torch.stack([log_probs[2 + at, token] for at, token in enumerate(answer)]).mean())
    losses, _ = module.losses(batch)  # type: ignore[operator]
    torch.testing.assert_close(losses[0], -logsigmoid(3.0 * (means[0] - means[1]) - 0.5))


@pytest.mark.parametrize(("method", "task"), [("SFTModule", "conversations"), ("RLOOModule", "prompts")])
def test_rows_of_one_s_own_are_trained_on(
    method: str, task: str, own_files: Path, config: Any, cli: Cli, tmp_path: Path
) -> None:
    for split in ("train", "test"):
        rows = [{"diff": f"+{number}", "comment": "Looks good."} for number in range(5)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ("--data", "reviews.ReviewsDataModule", "--data.dataset_name", str(tmp_path), "--data.task", task)
    result = cli("fit", "--config", config(method), *own)
    assert result.returncode == 0, result.stderr
    assert f"{tmp_path} train: 5 of 5 rows kept" in result.stderr


def test_a_judge_of_one_s_own_says_what_to_send_and_where_the_score_is(own_files: Path) -> None:
    from house_judge import HouseJudge

    judge = HouseJudge(base_url="http://127.0.0.1:9000", max_attempts=1)
    path, body = judge.request([{"role": "user", "content": "a"}])
    assert (path, body) == ("/judge", {"conversation": [{"role": "user", "content": "a"}]})
    assert judge.parse({"quality": "2.5"}) == 2.5
