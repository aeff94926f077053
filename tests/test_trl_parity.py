"""Losses, and the gradient of every parameter, against TRL's own trainers: same weights, same rows.

The policy is the tiny model with noise on its weights and the reference the tiny model itself, so no log-ratio is zero.
Where conventions differ, the test concerned says how. One difference must not show in any number: TRL's RLOO pads
prompts on the left and lets the padding count in the positions, the rows here are padded on the right.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from datamodules.batches import PreferenceBatch, TokenBatch, collate_conversations, collate_preferences, pad
from lightning_modules import DPOModule
from lightning_modules.dpo import PairLogProbs, pair_log_probs
from lightning_modules.forward.completions import completion_tokens
from lightning_modules.functional.reinforce import (
    clipped_policy_gradient_loss,
    kl_penalised_rewards,
    leave_one_out_advantages,
    policy_gradient_loss,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the mark below is not in force while tests are collected
    trl = pytest.importorskip("trl", reason="TRL is in the parity dependency group: make setup installs it")

pytestmark = pytest.mark.filterwarnings("ignore")

Row = dict[str, Any]

CONVERSATIONS: list[Row] = [
    {"input_ids": [1, 2, 3, 4, 5, 6, 7, 8], "completion_mask": [bit == "1" for bit in "00110011"]},
    {"input_ids": [9, 8, 7], "completion_mask": [bit == "1" for bit in "011"]},
    {"input_ids": [4, 4, 4, 4, 4], "completion_mask": [bit == "1" for bit in "00001"]},
    {"input_ids": [7, 1, 2, 2, 3, 9], "completion_mask": [bit == "1" for bit in "111111"]},
]
PAIRS: list[Row] = [
    {"prompt": "Why? ", "chosen": "Because.", "rejected": "No"},
    {"prompt": "2+2=", "chosen": "4", "rejected": "Let me think about it"},
    {"prompt": "Say something long: ", "chosen": "something long", "rejected": "short"},
    {"prompt": "Hi", "chosen": "Hello there", "rejected": "What now?"},
]
PROMPTS = ["Hi", "A longer prompt"]
SAMPLES = [[72, 105, 256], [65], [66, 67, 68, 69, 70], [71, 71], [80, 256], [81, 82, 83], [84, 85, 86, 87], [88, 256]]
SCORES = [1.0, -0.5, 2.0, 0.25, 3.0, 0.0, -1.0, 0.5]
BETA, TEMPERATURE, CLIP_RANGE = 0.3, 0.7, 0.2


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's trainers tell the hub that they were made, unless it is offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def move(model: PreTrainedModel, *, seed: int = 0, scale: float = 0.05) -> PreTrainedModel:
    """Add noise to the weights, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.train()


def make_trainer(method: str, directory: Path, rows: Sequence[Row], options: Row, **parts: Any) -> Any:
    """A trainer of TRL's on the CPU in float32; what it takes for the reference is the model in the directory."""
    config = getattr(trl, f"{method}Config")(
        output_dir=str(directory.with_name("trl")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return getattr(trl, f"{method}Trainer")(
        model=move(load(directory)),
        args=config,
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=AutoTokenizer.from_pretrained(directory),
        **parts,
    )


def assert_same_gradients(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    expected = dict(theirs.named_parameters())
    assert [name for name, _ in ours.named_parameters()] == list(expected)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-3, f"{name} is too flat to tell"
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-4, rtol=1e-4)


def assert_parity(loss: Tensor, expected: Tensor, policy: PreTrainedModel, trainer: Any) -> None:
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert_same_gradients(policy, trainer.model)


@pytest.mark.parametrize("rows_at_once", [4, 1])
def test_sft_on_masked_rows_equals_trl_however_trl_splits_the_step(tiny_model_dir: Path, rows_at_once: int) -> None:
    """Both take the mean over the supervised tokens of the whole step; TRL is given their count with each part."""
    trainer = make_trainer("SFT", tiny_model_dir, CONVERSATIONS, {"completion_only_loss": True})
    policy = move(load(tiny_model_dir))
    tokens = collate_conversations(CONVERSATIONS, pad_token_id=trainer.processing_class.pad_token_id)
    losses = -completion_tokens(policy, tokens).log_probs
    assert len(losses) == 4 + 2 + 1 + 5  # nothing predicts the first token of a row

    rows = list(trainer.train_dataset)
    count = torch.tensor(len(losses)) if rows_at_once < len(rows) else None
    parts = [trainer.data_collator(rows[i : i + rows_at_once]) for i in range(0, len(rows), rows_at_once)]
    expected = sum(trainer.compute_loss(trainer.model, part, num_items_in_batch=count) for part in parts)
    assert_parity(losses.mean(), expected, policy, trainer)


def make_dpo_trainer(directory: Path, **options: Any) -> tuple[Any, list[Row]]:
    """The trainer, and its rows of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``."""
    trainer = make_trainer("DPO", directory, PAIRS, {"beta": BETA, **options})
    return trainer, list(trainer.train_dataset)


def trl_loss(trainer: Any, rows: Sequence[Row]) -> Tensor:
    return trainer.compute_loss(trainer.model, trainer.data_collator(list(rows)))


def our_log_probs(directory: Path, rows: Sequence[Row]) -> tuple[PreTrainedModel, PairLogProbs, PairLogProbs]:
    """The policy, and what it and the reference give the pairs; here a template's tail follows, outside the mask."""
    pad_token_id = AutoTokenizer.from_pretrained(directory).pad_token_id
    tokens = collate_preferences(rows, pad_token_id=pad_token_id, tail_ids=[10]).tokens
    policy = move(load(directory))
    with torch.no_grad():
        reference = pair_log_probs(completion_tokens(load(directory), tokens))
    pairs = PreferenceBatch(tokens).pairs()
    return policy, pair_log_probs(completion_tokens(policy, tokens, groups=pairs)), reference


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "robust", "conservative"])
def test_dpo_losses_equal_trl(tiny_model_dir: Path, loss: Any) -> None:
    """Both sum log-probabilities over a completion and average over pairs.

    TRL's sigmoid loss ignores ``label_smoothing``. Its unpaired AOT loss smooths as cDPO does, once it has sorted the
    log-ratios of a batch, which changes nothing in a batch of one pair.
    """
    label_smoothing = 0.2 if loss in ("robust", "conservative") else 0.0
    trl_name = "aot_unpaired" if loss == "conservative" else loss
    trainer, rows = make_dpo_trainer(tiny_model_dir, loss_type=[trl_name], label_smoothing=label_smoothing)
    policy, log_probs, reference = our_log_probs(tiny_model_dir, rows)
    losses, metrics = DPOModule(BETA, loss, label_smoothing).preference_losses(log_probs, reference)
    assert 0 < (metrics["margin"] > 1).sum() < len(rows), "both sides of the hinge"
    batches = [[row] for row in rows] if loss == "conservative" else [rows]
    expected = torch.stack([trl_loss(trainer, batch) for batch in batches]).mean()
    assert_parity(losses.mean(), expected, policy, trainer)


def test_ipo_equals_trl_where_log_probs_are_averaged_over_a_completion(tiny_model_dir: Path) -> None:
    """TRL divides a log-ratio by its completion's length; DPOModule takes the sum, as eq. 17 of the paper does.

    With L tokens in every completion, TRL's loss at beta is therefore the one here at beta / L, over L^2.
    """
    trainer, rows = make_dpo_trainer(tiny_model_dir, loss_type=["ipo"])
    policy, *sums = our_log_probs(tiny_model_dir, rows)
    means = [s._replace(chosen=s.chosen / s.chosen_tokens, rejected=s.rejected / s.rejected_tokens) for s in sums]
    losses, _ = DPOModule(BETA, "ipo").preference_losses(*means)
    assert_parity(losses.mean(), trl_loss(trainer, rows), policy, trainer)


def test_sft_weight_equals_trls_second_loss_where_chosen_lengths_agree(tiny_model_dir: Path) -> None:
    """TRL's cross-entropy is the mean over all chosen tokens of a batch; here every pair weighs the same."""
    trainer, rows = make_dpo_trainer(tiny_model_dir, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    rows = [{**row, "chosen_ids": row["chosen_ids"][:2]} for row in rows]
    policy, log_probs, reference = our_log_probs(tiny_model_dir, rows)
    losses, _ = DPOModule(BETA, sft_weight=0.5).preference_losses(log_probs, reference)
    assert_parity(losses.mean(), trl_loss(trainer, rows), policy, trainer)


class Rollout(NamedTuple):
    """The same samples on both sides, scored and compared."""

    trainer: Any
    trl_batch: dict[str, Tensor]
    policy: PreTrainedModel
    tokens: TokenBatch
    log_probs: Tensor
    advantages: Tensor


def our_completion_log_probs(model: PreTrainedModel, tokens: TokenBatch) -> Tensor:
    prompts = [row * len(PROMPTS) // len(SAMPLES) for row in range(len(SAMPLES))]
    completions = completion_tokens(model, tokens, temperature=TEMPERATURE, groups=prompts)
    return completions.sum_by_sequence(completions.log_probs).view(len(PROMPTS), -1)


def roll_out(directory: Path, scores: Sequence[float | None]) -> Rollout:
    """TRL's trainer runs as it would, but for its call of the generator, which returns ``SAMPLES``."""

    def reward(**_: Any) -> Sequence[float | None]:
        return scores

    options = {
        "beta": BETA,
        "temperature": TEMPERATURE,
        "epsilon": CLIP_RANGE,
        "normalize_advantages": False,
        "num_generations": len(SAMPLES) // len(PROMPTS),
        "per_device_train_batch_size": len(SAMPLES),
    }
    trainer = make_trainer("RLOO", directory, [{"prompt": p} for p in PROMPTS], options, reward_funcs=reward)
    trainer._generate_single_turn = lambda *_: SAMPLES
    prompts = [prompt for prompt in PROMPTS for _ in range(trainer.num_generations)]
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])

    tokenizer = trainer.processing_class
    pairs = list(zip(tokenizer(prompts)["input_ids"], SAMPLES, strict=True))
    masks = [[False] * len(prompt) + [True] * len(sample) for prompt, sample in pairs]
    tokens = pad([prompt + sample for prompt, sample in pairs], masks, pad_token_id=tokenizer.pad_token_id)
    policy = move(load(directory))
    log_probs = our_completion_log_probs(policy, tokens)
    with torch.no_grad():
        log_ratios = log_probs - our_completion_log_probs(load(directory), tokens)
    scored = torch.tensor([torch.nan if score is None else score for score in scores]).view_as(log_ratios)
    advantages = leave_one_out_advantages(kl_penalised_rewards(scored, log_ratios, beta=BETA))
    return Rollout(trainer, batch, policy, tokens, log_probs, advantages)


@pytest.mark.parametrize("scores", [SCORES, [1.0, None, *SCORES[2:]]], ids=["all_scored", "one_unscored"])
def test_rloo_advantages_and_gradients_equal_trl(tiny_model_dir: Path, scores: list[float | None]) -> None:
    """The gradients are equal, the losses are not: TRL's ratio is 1 here, so its loss is minus the mean advantage, 0.

    TRL standardises advantages only where asked, which it is not. It gives an unscored sample the advantage 0 and
    counts it in the mean; here it is left out, so a prompt weighs less in TRL by the share of its scored samples.
    """
    run = roll_out(tiny_model_dir, scores)
    torch.testing.assert_close(run.advantages.nan_to_num().flatten(), run.trl_batch["advantages"], atol=1e-4, rtol=1e-4)
    scored_share = (~run.advantages.isnan()).float().mean(1)
    (policy_gradient_loss(run.log_probs, run.advantages) * scored_share).mean().backward()
    expected = run.trainer.compute_loss(run.trainer.model, run.trl_batch)
    assert expected.item() == pytest.approx(0, abs=1e-5)
    expected.backward()
    assert_same_gradients(run.policy, run.trainer.model)


def test_a_later_update_on_the_same_samples_equals_trl(tiny_model_dir: Path) -> None:
    """Both clip the ratio of whole completions, so the losses are equal too."""
    run = roll_out(tiny_model_dir, SCORES)
    for model in (run.policy, run.trainer.model):
        move(model, seed=1, scale=0.02)
    log_probs = our_completion_log_probs(run.policy, run.tokens)
    losses = clipped_policy_gradient_loss(log_probs, run.log_probs, run.advantages, clip_range=CLIP_RANGE)
    ratios = (log_probs - run.log_probs).exp()
    clipped = torch.where(run.advantages > 0, ratios > 1 + CLIP_RANGE, ratios < 1 - CLIP_RANGE)
    assert 0 < clipped.sum() < clipped.numel()
    expected = run.trainer.compute_loss(run.trainer.model, run.trl_batch)
    assert_parity(losses.mean(), expected, run.policy, run.trainer)
