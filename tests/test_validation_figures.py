"""What a validation logs, by hand: which side is subtracted from which, and what has no score counts for nothing."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from datamodules.batches import PromptBatch
from datamodules.chat import load_tokenizer
from lightning_modules import DPOModule, RewardModule, RLOOModule
from lightning_modules.models.loading import load_causal_lm
from tests.test_modules import MASKS, ROWS, exact_log_prob, pairs

pytestmark = pytest.mark.filterwarnings("ignore")
PAIRS = [(0, 1), (2, 3)]


def validated(module: LightningModule, batches: list[Any], root: Path) -> dict[str, float]:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", default_root_dir=root, **quiet)
    (found,) = trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    return {name: float(value) for name, value in found.items()}


@pytest.fixture
def moved_model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Another model of the same kind, so that no figure is 0."""
    model = load_causal_lm(str(tiny_model_dir), load_tokenizer(str(tiny_model_dir)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    model.save_pretrained(tmp_path / "moved")
    load_tokenizer(str(tiny_model_dir)).save_pretrained(tmp_path / "moved")
    return tmp_path / "moved"


@torch.no_grad()
def test_dpo_s(tiny_model_dir: Path, moved_model: Path, tmp_path: Path) -> None:
    module = DPOModule(model_name=str(moved_model), reference_model=str(tiny_model_dir), beta=0.3)
    found = validated(module, [pairs([pair]) for pair in PAIRS], tmp_path)
    policy, reference = (
        load_causal_lm(str(folder), load_tokenizer(str(tiny_model_dir))) for folder in (moved_model, tiny_model_dir)
    )
    ratios = [
        exact_log_prob(policy, ROWS[i], MASKS[i]) - exact_log_prob(reference, ROWS[i], MASKS[i]) for i in range(4)
    ]
    margins = torch.stack([0.3 * (ratios[chosen] - ratios[rejected]) for chosen, rejected in PAIRS])
    assert margins.abs().min() > 1e-3
    assert found["val/margin"] == pytest.approx(margins.mean().item(), abs=1e-5)
    assert found["val/loss"] == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item(), abs=1e-5)
    assert found["val/accuracy"] == pytest.approx((margins > 0).float().mean().item())
    chosen = torch.stack([0.3 * ratios[chosen] for chosen, _ in PAIRS]).mean().item()
    rejected = torch.stack([0.3 * ratios[rejected] for _, rejected in PAIRS]).mean().item()
    assert (found["val/chosen_reward"], found["val/rejected_reward"]) == pytest.approx((chosen, rejected), abs=1e-5)


@torch.no_grad()
def test_the_reward_model_s(tiny_model_dir: Path, tmp_path: Path) -> None:
    module = RewardModule(model_name=str(tiny_model_dir))
    module.configure_model()
    module.model.score.weight.normal_(generator=torch.Generator().manual_seed(3))
    given = [(1, 0), (2, 3)]
    found = validated(module, [pairs([pair]) for pair in given], tmp_path)
    scores = [
        module.model.score(module.model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]).item()
        for row in ROWS
    ]
    margins = torch.tensor([scores[chosen] - scores[rejected] for chosen, rejected in given])
    assert margins.abs().min() > 1e-3
    assert len(set(margins.sign().tolist())) == 1, "or the accuracy of the flipped margins would be the same"
    assert found["val/margin"] == pytest.approx(margins.mean().item(), abs=1e-4)
    assert found["val/accuracy"] == float(margins[0] > 0)
    assert found["val/loss"] == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item(), abs=1e-4)


def test_rloo_s(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A sample without a score is in no mean of scores or rewards, and counts for the lengths."""
    scores = iter([3.0, math.nan, -1.0, 2.5])
    module = RLOOModule(
        model_name=str(tiny_model_dir),
        reward=lambda prompts, completions: [next(scores) for _ in completions],
        beta=0.0,
        max_completion_length=3,
        missing_eos_penalty=10.0,
    )
    module.setup = lambda stage: None  # type: ignore[method-assign]  # whose preflight would take a score
    prompts = [[{"role": "user", "content": text}] for text in "ab"]
    batch = PromptBatch(prompts, [torch.tensor([1, 2]), torch.tensor([3])])
    sampled = []
    sample = module.sample
    module.sample = lambda *args, **kwargs: sampled.append(sample(*args, **kwargs)) or sampled[-1]  # type: ignore
    found = validated(module, [batch, batch], tmp_path)
    finished = [bool(end) for samples in sampled for end in samples.finished]
    rewards = [s - 10.0 * (not end) for s, end in zip([3.0, math.nan, -1.0, 2.5], finished, strict=True)]
    assert found["val/score"] == pytest.approx((3.0 - 1.0 + 2.5) / 3)
    assert found["val/reward"] == pytest.approx(sum(r for r in rewards if not math.isnan(r)) / 3)
    assert found["val/truncated"] == pytest.approx(sum(not end for end in finished) / 4)
