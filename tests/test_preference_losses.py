"""DPO's losses and Bradley-Terry against closed forms and against each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.functional.preference import (
    bradley_terry_loss,
    conservative_loss,
    hinge_loss,
    ipo_loss,
    robust_loss,
    sigmoid_loss,
)

margins = st.lists(st.floats(-20, 20), min_size=1, max_size=6).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def test_policy_equal_to_reference_costs_log_two() -> None:
    assert sigmoid_loss(torch.zeros(3)).tolist() == pytest.approx([math.log(2)] * 3)


def test_sigmoid_loss_by_hand() -> None:
    assert sigmoid_loss(torch.tensor([2.0])).item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_sigmoid_gradient_pushes_the_margin_up_by_the_probability_of_being_wrong() -> None:
    margin = torch.tensor([1.5], requires_grad=True)
    sigmoid_loss(margin).sum().backward()
    assert margin.grad is not None
    assert margin.grad.item() == pytest.approx(-1 / (1 + math.exp(1.5)))


@given(margins)
def test_conservative_loss_is_the_expected_sigmoid_loss_under_swapped_labels(values: torch.Tensor) -> None:
    expected = 0.7 * sigmoid_loss(values) + 0.3 * sigmoid_loss(-values)
    torch.testing.assert_close(conservative_loss(values, label_smoothing=0.3), expected)


@given(margins)
def test_robust_loss_is_unbiased_for_the_clean_loss(values: torch.Tensor) -> None:
    noisy = 0.8 * robust_loss(values, label_smoothing=0.2) + 0.2 * robust_loss(-values, label_smoothing=0.2)
    torch.testing.assert_close(noisy, sigmoid_loss(values))


def test_hinge_loss_is_zero_from_a_margin_of_one_on() -> None:
    assert hinge_loss(torch.tensor([-1.0, 0.0, 0.25, 1.0, 3.0])).tolist() == [2.0, 1.0, 0.75, 0.0, 0.0]


def test_ipo_loss_is_least_at_half_over_beta() -> None:
    assert ipo_loss(torch.tensor([5.0, 6.0, 0.0]), beta=0.1).tolist() == pytest.approx([0.0, 1.0, 25.0])


def test_bradley_terry_loss_prefers_the_chosen_score_to_be_higher() -> None:
    loss = bradley_terry_loss(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 3.0]))
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))])
