"""Batches of a token budget: every row once, no batch above the budget, alike on every process."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ConfigurationError
from datamodules import UltraFeedbackDataModule
from datamodules.token_budget import TokenBudgetSampler, best_fit

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=40)


def samplers(lengths: list[int], world_size: int) -> list[TokenBudgetSampler]:
    return [
        TokenBudgetSampler(lengths, budget=12, world_size=world_size, rank=rank, seed=5) for rank in range(world_size)
    ]


@settings(deadline=None)
@given(lengths=LENGTHS, world_size=st.integers(1, 3))
def test_every_row_comes_once_and_no_batch_is_above_the_budget(lengths: list[int], world_size: int) -> None:
    batches = [batch for sampler in samplers(lengths, world_size) for batch in sampler]
    rows = sorted(row for batch in batches for row in batch)
    if any(len(batch) > 1 for batch in batches):
        assert rows == list(range(len(lengths)))
    else:  # nothing was left to split, so some may be repeated
        assert set(rows) == set(range(len(lengths)))
        assert len(rows) < len(lengths) + world_size
    assert all(sum(lengths[row] for row in batch) <= 12 for batch in batches)


@settings(deadline=None)
@given(lengths=LENGTHS, world_size=st.integers(1, 4))
def test_in_training_every_process_has_the_same_number_of_batches(lengths: list[int], world_size: int) -> None:
    counts = {len(list(sampler)) for sampler in samplers(lengths, world_size)}
    assert counts == {len(sampler) for sampler in samplers(lengths, world_size)}
    assert len(counts) == 1
    assert counts != {0}


def test_a_row_goes_where_it_leaves_the_least_room() -> None:
    assert best_fit([6, 8, 3, 2, 5, 20], range(6), budget=10) == [[0, 2], [1, 3], [4], [5]]


def test_an_epoch_has_its_own_order_of_the_same_batches() -> None:
    (sampler,) = samplers([1 + i % 7 for i in range(60)], 1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_a_pair_counts_its_prompt_once(data: Path, tiny_model_dir: Path) -> None:
    """A pair of the small data has the same length each; three fit exactly, with one token less only two do."""

    def batch_sizes(budget: int) -> list[int]:
        module = UltraFeedbackDataModule(
            model_name=str(tiny_model_dir),
            dataset_name=str(data),
            task="preferences",
            max_length=64,
            tokens_per_batch=budget,
        )
        module.setup("fit")
        return [len(batch.pairs()) // 2 for batch in module.train_dataloader()]

    module = UltraFeedbackDataModule(
        model_name=str(tiny_model_dir), dataset_name=str(data), task="preferences", max_length=64
    )
    module.setup("fit")
    tokens = next(iter(module.train_dataloader())).tokens
    prompt = int((tokens.attention_mask & ~tokens.completion_mask.cumsum(1).bool()).sum(1)[0])
    pair = prompt + int(tokens.completion_mask.sum(1)[0] + tokens.completion_mask.sum(1)[-1])
    assert max(batch_sizes(3 * pair)) == 3
    assert max(batch_sizes(3 * pair - 1)) == 2
    assert sum(batch_sizes(3 * pair)) == 7


def test_batches_of_a_budget_hold_the_rows_of_the_plain_ones(data: Path, tiny_model_dir: Path) -> None:
    rows = []
    for options in ({"batch_size": 7}, {"tokens_per_batch": 10_000}):
        module = UltraFeedbackDataModule(
            model_name=str(tiny_model_dir), dataset_name=str(data), task="conversations", max_length=64, **options
        )
        module.setup("fit")
        (batch,) = module.train_dataloader()
        (held_out,) = module.val_dataloader()
        rows.append((batch.input_ids.sort(0).values, batch.completion_mask.sum(), held_out.input_ids))
    for plain, filled in zip(*rows, strict=True):
        assert torch.equal(plain, filled)


@pytest.mark.parametrize(("task", "budget"), [("conversations", 63), ("prompts", 1000)])
def test_a_budget_that_cannot_be_is_named(tiny_model_dir: Path, data: Path, task: str, budget: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"data.tokens_per_batch .*got {budget} for {task}"):
        UltraFeedbackDataModule(
            model_name=str(tiny_model_dir),
            dataset_name=str(data),
            task=task,
            max_length=64,
            tokens_per_batch=budget,  # type: ignore[arg-type]
        )
