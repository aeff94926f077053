"""Leave-one-out advantages and policy-gradient losses, by hand, by property, and by brute force on a tiny policy."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.functional.reinforce import (
    clipped_policy_gradient_loss,
    kl_penalised_rewards,
    leave_one_out_advantages,
    policy_gradient_loss,
)

reward_tables = st.integers(2, 6).flatmap(
    lambda k: st.lists(st.lists(st.floats(-50, 50), min_size=k, max_size=k), min_size=1, max_size=4)
)


def test_three_rewards_by_hand() -> None:
    advantages = leave_one_out_advantages(torch.tensor([[1.0, 2.0, 6.0]]))
    assert advantages.tolist() == [[1 - 4.0, 2 - 3.5, 6 - 1.5]]


@given(reward_tables, st.floats(-30, 30))
def test_advantages_equal_the_definition_sum_to_zero_and_ignore_a_shift(rows: list[list[float]], shift: float) -> None:
    rewards = torch.tensor(rows, dtype=torch.float64)
    advantages = leave_one_out_advantages(rewards)
    for row, advantage in zip(rows, advantages.tolist(), strict=True):
        expected = [r - (sum(row) - r) / (len(row) - 1) for r in row]
        assert advantage == pytest.approx(expected, abs=1e-9)
    assert advantages.sum(1).abs().max() < 1e-9
    torch.testing.assert_close(leave_one_out_advantages(rewards + shift), advantages, atol=1e-9, rtol=0)


def test_an_unscored_sample_leaves_the_baseline_and_has_no_advantage() -> None:
    advantages = leave_one_out_advantages(torch.tensor([[1.0, math.nan, 6.0], [math.nan, math.nan, 3.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[-5.0, math.nan, 5.0], [math.nan] * 3]), equal_nan=True)


def test_one_sample_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 2 samples per prompt, got 1; raise model\.samples_per_prompt"):
        leave_one_out_advantages(torch.zeros(4, 1))


def test_penalty_takes_beta_times_the_log_ratio_from_the_score() -> None:
    rewards = kl_penalised_rewards(torch.tensor([[3.0, 3.0]]), torch.tensor([[2.0, -1.0]]), beta=0.5)
    assert rewards.tolist() == [[2.0, 3.5]]


def test_loss_is_minus_the_mean_of_advantage_times_log_prob() -> None:
    loss = policy_gradient_loss(torch.tensor([[-1.0, -2.0], [-3.0, -5.0]]), torch.tensor([[2.0, -2.0], [1.0, -1.0]]))
    assert loss.tolist() == [-(2.0 * -1 + -2.0 * -2) / 2, -(1.0 * -3 + -1.0 * -5) / 2]


def test_unscored_samples_carry_no_gradient_and_leave_the_mean() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    policy_gradient_loss(log_probs, torch.tensor([[4.0, math.nan, -4.0]])).sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[-2.0, 0.0, 2.0]]


def test_advantages_are_constants() -> None:
    rewards = torch.tensor([[1.0, 2.0]], requires_grad=True)
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    policy_gradient_loss(log_probs, leave_one_out_advantages(rewards)).sum().backward()
    assert rewards.grad is None


def test_clipped_loss_starts_with_the_policy_gradient() -> None:
    advantages = torch.tensor([[1.5, -1.5], [0.3, -0.3]])
    gradients = []
    for clipped in (False, True):
        log_probs = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
        if clipped:
            loss = clipped_policy_gradient_loss(log_probs, log_probs.detach(), advantages, clip_range=0.2)
        else:
            loss = policy_gradient_loss(log_probs, advantages)
        gradients.append(torch.autograd.grad(loss.sum(), log_probs)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"), [(1.5, 1.0, 0.0), (1.5, -1.0, 1.5), (0.5, 1.0, -0.5), (0.5, -1.0, 0.0)]
)
def test_clipping_stops_only_what_goes_too_far(ratio: float, advantage: float, slope: float) -> None:
    log_probs = torch.tensor([[math.log(ratio), 0.0]], requires_grad=True)
    advantages = torch.tensor([[advantage, math.nan]])
    clipped_policy_gradient_loss(log_probs, torch.zeros(1, 2), advantages, clip_range=0.2).sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad[0, 0].item() == pytest.approx(slope)


def test_expected_gradient_is_the_gradient_of_the_expected_reward() -> None:
    """Over every pair of samples of a three-armed policy, weighted by its probability.

    With beta = 0 the expectation of the leave-one-out gradient is exactly that of E[r], as the baseline of a sample
    does not depend on it.
    """
    scores = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    logits = torch.tensor([0.3, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(3, dtype=torch.float64)
    for first, second in itertools.product(range(3), repeat=2):
        log_probs = logits.log_softmax(0)[[first, second]].unsqueeze(0)
        loss = policy_gradient_loss(log_probs, leave_one_out_advantages(scores[[first, second]].unsqueeze(0)))
        gradient = torch.autograd.grad(loss.sum(), logits)[0]
        expected += log_probs.exp().prod().item() * gradient
    truth = torch.autograd.grad((logits.softmax(0) * scores).sum(), logits)[0]
    torch.testing.assert_close(-expected, truth)


def test_a_ratio_beyond_all_bounds_is_no_nan() -> None:
    """e^200 is infinite in float32, and infinity times an advantage of 0 would be NaN."""
    log_probs = torch.tensor([[200.0, -1.0]], requires_grad=True)
    losses = clipped_policy_gradient_loss(log_probs, torch.zeros(1, 2), torch.tensor([[0.0, 0.0]]), clip_range=0.2)
    losses.sum().backward()
    assert log_probs.grad is not None
    assert losses.isfinite().all()
    assert log_probs.grad.isfinite().all()
