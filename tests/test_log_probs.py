"""Log-probabilities, entropies and the exact KL of tokens; and that padding never changes a completion's."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from datamodules.batches import TokenBatch, pad
from lightning_modules.forward.completions import completion_tokens, sequence_scores
from lightning_modules.functional.log_probs import token_entropy, token_kl, token_log_probs


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    return loaded.eval()


def test_log_prob_is_that_of_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])
    assert token_log_probs(logits, torch.tensor([1])).exp().item() == pytest.approx(3 / 4)
    assert token_log_probs(logits, torch.tensor([1]), temperature=0.5).exp().item() == pytest.approx(9 / 10)


def test_log_probs_of_bfloat16_logits_are_taken_in_float32() -> None:
    logits = (8 * torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))).bfloat16()
    tokens = torch.arange(5)
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(5), tokens]
    torch.testing.assert_close(token_log_probs(logits, tokens).double(), expected, atol=1e-5, rtol=0)


def test_entropy_of_a_uniform_distribution_is_the_log_of_its_size() -> None:
    assert token_entropy(torch.zeros(1, 7)).item() == pytest.approx(math.log(7))
    logits = torch.tensor([[0.0, math.log(3.0)]])
    expected = -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))
    assert token_entropy(logits, temperature=0.5).item() == pytest.approx(expected)


def test_kl_by_hand_and_in_the_right_direction() -> None:
    policy, reference = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert token_kl(policy, reference).item() == pytest.approx(expected)
    assert token_kl(reference, policy).item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))


def test_completion_log_probs_equal_a_row_by_row_computation(model: PreTrainedModel) -> None:
    rows = [[1, 2, 3, 4, 5, 6], [9, 8, 7], [4, 4, 4, 4]]
    masks = [[False, False, True, True, False, True], [False, True, True], [False] * 3 + [True]]
    completions = completion_tokens(model, pad(rows, masks, pad_token_id=4))  # a pad id that is also a real token
    ours = completions.sum_by_sequence(completions.log_probs)
    for row, mask, value in zip(rows, masks, ours.tolist(), strict=True):
        log_probs = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        expected = sum(log_probs[t - 1, row[t]].item() for t in range(1, len(row)) if mask[t])
        assert value == pytest.approx(expected, abs=1e-4)
    assert completions.count_by_sequence().tolist() == [3, 2, 1]


def test_padding_on_either_side_never_changes_a_completion_log_prob(model: PreTrainedModel) -> None:
    ids, mask = [3, 1, 4, 1, 5], [False, False, True, True, True]

    def log_probs(left: int, right: int) -> torch.Tensor:
        batch = TokenBatch(
            torch.tensor([[9] * left + ids + [9] * right]),
            torch.tensor([[False] * left + [True] * 5 + [False] * right]),
            torch.tensor([[False] * left + mask + [False] * right]),
        )
        return completion_tokens(model, batch).log_probs

    torch.testing.assert_close(log_probs(3, 0), log_probs(0, 0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_probs(0, 4), log_probs(0, 0), atol=1e-5, rtol=1e-5)


def test_reward_is_read_at_the_last_token_even_where_that_is_the_pad_token(tiny_model_dir: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1, dtype=torch.float32).eval()
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    rows = [[1, 2, 3, 0], [5, 6], [7, 0, 0]]
    scores = sequence_scores(model, pad(rows, [[False] * len(row) for row in rows], pad_token_id=0))
    for row, score in zip(rows, scores.tolist(), strict=True):
        hidden = model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
        assert score == pytest.approx(model.score(hidden).item(), abs=1e-5)


def test_a_score_is_not_rounded_under_autocast(tiny_model_dir: Path) -> None:
    """The head is left in float32, as bfloat16 would round scores near 10 to steps of 0.06."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1, dtype=torch.float32).eval()
    torch.nn.init.normal_(model.score.weight, std=5.0, generator=torch.Generator().manual_seed(1))
    batch = pad([[1, 2, 3], [5, 6]], [[False] * 3, [False] * 2], pad_token_id=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = sequence_scores(model, batch)
        hidden = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    assert not torch.equal(scores, scores.bfloat16().float())
    last = torch.stack([hidden.last_hidden_state[0, 2], hidden.last_hidden_state[1, 1]]).float()
    torch.testing.assert_close(scores, (last @ model.score.weight.float().T)[:, 0], atol=0.2, rtol=0.02)
