"""Drawing tokens from logits: the distribution by chi-square, its truncations, log-probabilities, and every edge."""

import math

import pytest
import torch
from torch import Tensor

from lightning_modules.functional.sampling import draw_tokens

COUNT = 8_000


def peaked_logits(vocab: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed))


def truncated(logits: Tensor, *, temperature: float, top_p: float, top_k: int) -> Tensor:
    """The exact distribution by sorting, in float64: top-k first, then the smallest set that holds ``top_p``."""
    values, order = (logits[0].double() / temperature).sort(descending=True)
    if top_k:
        values = torch.cat([values[:top_k], torch.full_like(values[top_k:], -math.inf)])
    ranked = values.softmax(-1)
    kept = torch.where(ranked.cumsum(-1) - ranked < top_p, ranked, 0.0)
    return torch.zeros_like(kept).scatter(0, order, kept / kept.sum())


@pytest.mark.parametrize("vocab", [50, 64, 3001])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.7, 1.0, 0), (2.0, 1.0, 0), (1.0, 0.9, 0), (1.0, 1.0, 7), (1.3, 0.8, 20), (3.0, 0.97, 0)],
)
def test_draws_follow_the_exact_distribution(vocab: int, temperature: float, top_p: float, top_k: int) -> None:
    """Evenly spaced uniform numbers, so no chance: each token is drawn as often as expected, to within rounding.

    A wrong temperature, order or cut moves the counts by thousands. At temperature 3 the nucleus of the largest
    vocabulary is wider than the quick search.
    """
    logits = peaked_logits(vocab)
    uniforms = (torch.arange(COUNT) + 0.5) / COUNT
    tokens, log_probs = draw_tokens(
        logits.expand(COUNT, -1), uniforms, temperature=temperature, top_p=top_p, top_k=top_k
    )
    expected = truncated(logits, temperature=temperature, top_p=top_p, top_k=top_k)
    drawn = torch.bincount(tokens, minlength=vocab).double()
    assert (drawn - COUNT * expected).abs().max() < 2.5
    assert drawn[expected == 0].sum() == 0
    assert (log_probs.double() - expected[tokens].log()).abs().max() < 2e-5


def test_independent_uniforms_pass_a_chi_square_test() -> None:
    """With 20 degrees of freedom 45.3 is exceeded once in a thousand times; the seed is fixed."""
    logits = peaked_logits(2000, seed=3)
    uniforms = torch.rand(COUNT, generator=torch.Generator().manual_seed(5))
    tokens, _ = draw_tokens(logits.expand(COUNT, -1), uniforms)
    expected = logits[0].softmax(-1)
    order = expected.argsort(descending=True)[:20]
    drawn = torch.bincount(tokens, minlength=2000).float()
    observed = torch.cat([drawn[order], (COUNT - drawn[order].sum()).view(1)])
    counts = COUNT * torch.cat([expected[order], (1 - expected[order].sum()).view(1)])
    assert ((observed - counts) ** 2 / counts).sum() < 45.3


def test_a_token_of_probability_zero_is_never_drawn_even_at_the_ends() -> None:
    """Uniform numbers 0 and the last one below 1, impossible tokens before, behind and in whole blocks."""
    logits = torch.full((2, 300), -math.inf)
    logits[:, 100:103] = 0.0
    uniforms = torch.tensor([0.0, 1 - 2.0**-24])
    for top_p, top_k in ((1.0, 0), (0.99, 0), (1.0, 5), (0.99, 5)):
        tokens, log_probs = draw_tokens(logits, uniforms, top_p=top_p, top_k=top_k)
        assert set(tokens.tolist()) <= {100, 101, 102}
        assert log_probs.tolist() == pytest.approx([math.log(1 / 3)] * 2)


@pytest.mark.parametrize("vocab", [3, 64, 65, 1000])
def test_temperature_zero_takes_the_first_of_the_likeliest_tokens(vocab: int) -> None:
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(1)).round()
    tokens, log_probs = draw_tokens(logits, torch.rand(5), temperature=0.0)
    assert tokens.tolist() == [row.tolist().index(row.max()) for row in logits]
    assert log_probs.tolist() == [0.0] * 5


def test_a_tiny_nucleus_or_top_1_is_the_likeliest_token() -> None:
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(1))
    for top_p, top_k in ((1e-6, 0), (1.0, 1)):
        tokens, log_probs = draw_tokens(logits, torch.rand(5), top_p=top_p, top_k=top_k)
        assert torch.equal(tokens, logits.argmax(-1))
        assert log_probs.abs().max() < 1e-6


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (0.999, 0), (1.0, 40)])
def test_a_row_is_drawn_alike_in_any_batch(top_p: float, top_k: int) -> None:
    logits = torch.randn(9, 40_000, generator=torch.Generator().manual_seed(2))
    logits[::2] *= 5
    uniforms = torch.rand(9, generator=torch.Generator().manual_seed(3))
    tokens, log_probs = draw_tokens(logits, uniforms, top_p=top_p, top_k=top_k)
    for rows in ([0], [8, 3, 5], [1, 2, 3, 4, 5]):
        some, some_log_probs = draw_tokens(logits[rows], uniforms[rows], top_p=top_p, top_k=top_k)
        assert torch.equal(some, tokens[rows])
        assert torch.equal(some_log_probs, log_probs[rows])


def test_the_nucleus_ends_with_the_token_that_reaches_it() -> None:
    """Of .5, .25 and .25 the first alone holds half, so nothing else is drawn."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    for top_p, kept in ((0.5, {0}), (0.500001, {0, 1}), (0.75, {0, 1}), (0.76, {0, 1, 2})):
        drawn = {int(draw_tokens(logits, torch.tensor([u / 100]), top_p=top_p)[0]) for u in range(100)}
        assert drawn == kept, top_p
