"""A method that lives outside the suite, made to CONTRIBUTING's recipe: trained, exported, judged and compared."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command_line import Cli
from tests.evaluation_run import read

pytestmark = pytest.mark.filterwarnings("ignore")

METHOD = '''
"""Likelihood of the chosen answer over the rejected one, without a reference."""

from lightning_modules.base import FineTuningModule
from lightning_modules.dpo import pair_log_probs
from lightning_modules.forward.completions import completion_tokens


class LikelihoodModule(FineTuningModule):
    method = "likelihood"
    task = "preferences"

    def losses(self, batch):
        sums = pair_log_probs(completion_tokens(self.model, batch.tokens, groups=batch.pairs()))
        return sums.rejected / sums.rejected_tokens - sums.chosen / sums.chosen_tokens

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch)
        self.log_step({"loss": losses.detach().mean()}, batch_size=len(losses))
        return self.sum_for_step(losses, len(losses))

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.losses(batch).mean(), batch_size=len(batch.pairs()) // 2)
'''


def test_a_method_outside_the_suite_is_trained_exported_judged_and_compared(
    config: Any, tmp_path: Path, tiny_model_dir: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "likelihood_method.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    path = Path(config("DPOModule"))
    content = yaml.safe_load(path.read_text())
    content["model"]["class_path"] = "likelihood_method.LikelihoodModule"
    path.write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    result = cli("fit", "--config", str(path))
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    card = (run / "final" / "README.md").read_text()
    assert "| 1 | LIKELIHOOD | data" in card
    assert "tags:\n- likelihood\n" in card
    assert "| val/loss | " in card
    assert "nan" not in card
    result = cli("validate", "--config", str(path))
    assert result.returncode == 0, result.stderr
    assert read(run / "eval" / "final")[0]["model"] == str(run / "final")
    assert cli("compare", str(run), "--output", str(tmp_path / "report")).returncode == 0
    assert json.loads((tmp_path / "report" / "summary.json").read_text())["runs"]["run"]["method"] == "Likelihood"


def test_a_later_stage_s_card_carries_the_lineage(config: Any, tmp_path: Path, tiny_model_dir: Path, cli: Cli) -> None:
    """From a hub id at the root, which a local model is not; each stage's method, data, and figures if it has any."""
    root = tmp_path / "root"
    root.mkdir()
    for file in tiny_model_dir.iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    history = {"base_model": "Qwen/Qwen2.5-0.5B", "base_name": "Qwen2.5-0.5B", "stages": []}
    (root / "lineage.yaml").write_text(yaml.safe_dump(history))
    stages = {"SFTModule": root, "RLOOModule": tmp_path / "SFTModule" / "final"}
    for method, start in stages.items():
        judged = {"num_prompts": 4 if method == "SFTModule" else 0}
        path = config(method, model={"model_name": str(start)}, evaluation=judged)
        result = cli("fit", "--config", path, "--trainer.default_root_dir", str(tmp_path / method))
        assert result.returncode == 0, result.stderr
    card = (tmp_path / "RLOOModule" / "final" / "README.md").read_text()
    front, _, text = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front) == {
        "base_model": "Qwen/Qwen2.5-0.5B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "rloo", "pytorch-lightning"],
    }
    assert text.startswith("\n# Qwen2.5-0.5B: SFT, RLOO\n\nQwen/Qwen2.5-0.5B, fine-tuned in 2 stages.\n")
    metrics, _ = read(tmp_path / "SFTModule" / "eval" / "epoch=0")
    rows = [line for line in text.splitlines() if line.startswith(("| 1", "| 2"))]
    assert rows[0].startswith("| 1 | supervised fine-tuning | data0 (local) | 2 | 1e-05 | ")
    assert f"wins {100 * metrics['win_rate']:.1f} % [" in rows[0]
    assert "] of 4 prompts against root, judged by brevity |" in rows[0]
    assert rows[1] == "| 2 | REINFORCE leave-one-out | data0 (local) | 2 | 1e-06 | - |"
    local = cli("fit", "--config", config("SFTModule"), "--trainer.default_root_dir", str(tmp_path / "local"))
    assert local.returncode == 0
    card = (tmp_path / "local" / "final" / "README.md").read_text()
    assert "base_model" not in card
    assert "tiny-model0 (a local model), fine-tuned in 1 stage." in card
