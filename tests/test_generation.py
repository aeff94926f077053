"""The sampler: its distribution, its independence of the batch, where it stops, and greedy against transformers."""

import gc
import json
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lightning_modules.forward.completions import completion_tokens
from lightning_modules.generation.decoders import decoder, decodes
from lightning_modules.generation.projections import packs
from lightning_modules.generation.sampler import Samples, sample_completions


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    return loaded.eval()


CONFIG = "qwen2.5-0.5b.config.json"
PROMPTS = [torch.tensor([5, 6, 7, 8]), torch.tensor([9]), torch.tensor([3, 3])]


def completions(samples: Samples) -> list[list[int]]:
    """The tokens of each completion."""
    rows = zip(samples.tokens.input_ids, samples.tokens.completion_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def log_probs_by_row(samples: Samples) -> list[list[float]]:
    return [part.tolist() for part in samples.log_probs.split(samples.completion_lengths().tolist())]


def many_prompts(count: int, vocab: int) -> list[torch.Tensor]:
    """Of 1 to 150 tokens, so on both sides of the edge of an attention block."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 151, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab, (length,), generator=generator) for length in lengths]


def drawn(model: Any, prompts: Sequence[torch.Tensor], rows: Iterable[int], **settings: Any) -> Samples:
    """The samples of some of the prompts, each with the seed that is its own."""
    rows = list(rows)
    options = {"max_completion_length": 24, "stop_token_ids": [1, 2, 3, 4], **settings}
    return sample_completions(model, [prompts[row] for row in rows], seeds=[100 + row for row in rows], **options)


BITS = pytest.mark.skipif(not packs(torch.float32), reason="without oneDNN another batch may round otherwise")


@BITS
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 20}, {"temperature": 0.0}, {"min_length": 9}])
def test_a_completion_and_its_log_probs_are_the_same_bits_in_any_batch(
    model: PreTrainedModel, settings: dict[str, Any]
) -> None:
    """Alone, in another order, beside other prompts and in batches of other sizes, while rows leave on the way."""
    prompts = many_prompts(20, 259)
    together = drawn(model, prompts, range(20), **settings)
    expected, expected_log_probs = completions(together), log_probs_by_row(together)
    if not settings:
        assert len(set(map(len, expected))) > 5  # rows left at various steps
    for rows in ([4], [19, 0, 7], [1, 2], reversed(range(20)), range(3, 16)):
        rows = list(rows)
        some = drawn(model, prompts, rows, **settings)
        assert completions(some) == [expected[row] for row in rows]
        assert log_probs_by_row(some) == [expected_log_probs[row] for row in rows]


@BITS
def test_a_batch_mate_changes_no_bit_in_a_model_of_the_real_vocabulary(real_qwen: Any) -> None:
    prompts = many_prompts(5, 151_936)
    together = drawn(real_qwen, prompts, range(5), max_completion_length=8, stop_token_ids=[])
    for rows in ([3], [4, 1]):
        some = drawn(real_qwen, prompts, rows, max_completion_length=8, stop_token_ids=[])
        assert completions(some) == [completions(together)[row] for row in rows]
        assert log_probs_by_row(some) == [log_probs_by_row(together)[row] for row in rows]


@BITS
def test_samples_of_one_prompt_equal_separate_rows_with_the_same_seeds(model: PreTrainedModel) -> None:
    settings: dict[str, Any] = {"max_completion_length": 16, "stop_token_ids": [1, 2], "seeds": range(12)}
    shared = sample_completions(model, PROMPTS, samples_per_prompt=4, **settings)
    separate = sample_completions(model, [prompt for prompt in PROMPTS for _ in range(4)], **settings)
    assert completions(shared) == completions(separate)
    assert len(set(map(tuple, completions(shared)))) > 4
    assert torch.equal(shared.log_probs, separate.log_probs)
    for ours, theirs in zip(shared.tokens, separate.tokens, strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_without_its_own_decode_step_samples_the_same_at_any_batch_size() -> None:
    """Its logits may differ in the last bit, so the promise is weaker, but leaving rows must not disturb the others."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=2, n_positions=256, initializer_range=0.3)
    other = GPT2LMHeadModel(config).eval()
    prompts = many_prompts(9, 80)
    together = drawn(other, prompts, range(9))
    assert len(set(map(len, completions(together)))) > 3
    for row in range(9):
        alone = drawn(other, prompts, [row])
        assert completions(alone) == [completions(together)[row]]
        assert log_probs_by_row(alone)[0] == pytest.approx(log_probs_by_row(together)[row], abs=1e-4)


def test_samples_follow_the_softmax(model: PreTrainedModel) -> None:
    """Chi-square of 20,000 first tokens against the exact distribution, over the likeliest tokens and the rest.

    With 20 degrees of freedom 45.3 is exceeded once in a thousand times; the seeds are fixed.
    """
    count = 20_000
    prompt = torch.tensor([5, 6, 7])
    probabilities = (model(input_ids=prompt.unsqueeze(0)).logits[0, -1] / 0.8).softmax(-1).detach()
    samples = sample_completions(
        model,
        [prompt],
        max_completion_length=1,
        stop_token_ids=[1],
        seeds=range(count),
        samples_per_prompt=count,
        temperature=0.8,
    )
    drawn = torch.bincount(samples.tokens.input_ids[:, -1], minlength=len(probabilities)).float()
    order = probabilities.argsort(descending=True)[:20]
    observed = torch.cat([drawn[order], (count - drawn[order].sum()).unsqueeze(0)])
    expected = count * torch.cat([probabilities[order], (1 - probabilities[order].sum()).unsqueeze(0)])
    assert ((observed - expected) ** 2 / expected).sum() < 45.3


def test_top_p_keeps_the_smallest_set_that_holds_the_probability(model: PreTrainedModel) -> None:
    prompt = torch.tensor([5, 6, 7])
    probabilities, order = model(input_ids=prompt.unsqueeze(0)).logits[0, -1].softmax(-1).sort(descending=True)
    kept = int((probabilities.cumsum(0) < 0.5).sum()) + 1
    samples = sample_completions(
        model,
        [prompt],
        max_completion_length=1,
        stop_token_ids=[1],
        seeds=range(4000),
        samples_per_prompt=4000,
        top_p=0.5,
    )
    assert set(samples.tokens.input_ids[:, -1].tolist()) == set(order[:kept].tolist())


def test_greedy_equals_transformers_generate(model: PreTrainedModel) -> None:
    for prompt in PROMPTS:
        ours = sample_completions(
            model, [prompt], max_completion_length=20, stop_token_ids=[300], seeds=[0], temperature=0.0
        )
        theirs = model.generate(  # type: ignore[operator]
            prompt.unsqueeze(0),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert ours.tokens.input_ids[0].tolist() == theirs[0].tolist()


def test_greedy_equals_transformers_generate_on_a_real_model(real_data: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(real_data / "stories260k", dtype=torch.float32).eval()
    assert decodes(model)
    prompts = [torch.tensor([1, 403, 407, 261]), torch.tensor([1, 410])]
    ours = sample_completions(
        model, prompts, max_completion_length=60, stop_token_ids=[2], seeds=[0, 0], temperature=0.0
    )
    for row, prompt in enumerate(prompts):
        theirs = model.generate(
            prompt.unsqueeze(0),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=60,
            do_sample=False,
            pad_token_id=2,
        )
        kept = ours.tokens.input_ids[row][ours.tokens.attention_mask[row]]
        assert kept.tolist() == theirs[0].tolist()


@pytest.fixture(scope="module")
def real_qwen(real_data: Path) -> Any:
    """A narrow Qwen2 with the real model's config otherwise: 151,936 tokens, tied, random weights."""
    config = Qwen2Config(**json.loads((real_data / "qwen2.5-tokenizer" / CONFIG).read_text()))
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 96, 2
    config.num_attention_heads, config.num_key_value_heads, config.layer_types = 4, 2, ["full_attention"] * 2
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).float().eval()


def test_greedy_equals_transformers_generate_on_the_real_vocabulary(real_qwen: Any) -> None:
    prompts = many_prompts(4, 151_936)
    ours = sample_completions(
        real_qwen, prompts, max_completion_length=16, stop_token_ids=[], seeds=range(4), temperature=0.0
    )
    for row, prompt in enumerate(prompts):
        theirs = real_qwen.generate(
            prompt.unsqueeze(0),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert completions(ours)[row] == theirs[0, len(prompt) :].tolist()


def test_a_seed_s_uniform_numbers_are_those_of_float32_under_any_default(model: PreTrainedModel) -> None:
    """Lightning sets the default to the precision of a run, and bfloat16 has few numbers between 0 and 1."""
    expected = drawn(model, PROMPTS, range(3))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = drawn(model, PROMPTS, range(3))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.tokens.input_ids, expected.tokens.input_ids)
    assert torch.equal(found.log_probs, expected.log_probs)


def test_no_stop_token_comes_before_the_min_length(model: PreTrainedModel) -> None:
    """And the log-probs are those of the distribution without it."""
    stops = list(range(200))  # most of the vocabulary, so most samples would stop at once
    free = sample_completions(
        model, PROMPTS, max_completion_length=12, stop_token_ids=stops, seeds=range(60), samples_per_prompt=20
    )
    held = sample_completions(
        model,
        PROMPTS,
        max_completion_length=12,
        stop_token_ids=stops,
        seeds=range(60),
        samples_per_prompt=20,
        min_length=5,
    )
    assert min(map(len, completions(free))) == 1
    assert min(map(len, completions(held))) == 6
    assert all(token >= 200 for tokens in completions(held) for token in tokens[:5])
    logits = model(input_ids=PROMPTS[0].unsqueeze(0)).logits[0, -1].detach()
    allowed = logits[200:].log_softmax(-1)
    for tokens, log_probs in zip(completions(held)[:20], log_probs_by_row(held)[:20], strict=True):
        assert log_probs[0] == pytest.approx(allowed[tokens[0] - 200].item(), abs=1e-5)


def test_without_stop_tokens_every_completion_has_the_greatest_length(model: PreTrainedModel) -> None:
    samples = sample_completions(model, PROMPTS, max_completion_length=9, stop_token_ids=[], seeds=range(3))
    assert samples.completion_lengths().tolist() == [9, 9, 9]
    assert not samples.finished.any()


def test_a_completion_ends_with_its_stop_token_which_counts(model: PreTrainedModel) -> None:
    prompt = PROMPTS[0]
    first = sample_completions(model, [prompt], max_completion_length=6, stop_token_ids=[300], seeds=[4])
    tokens = first.tokens.input_ids[0, len(prompt) :].tolist()
    assert not first.finished[0]
    stop = tokens[2]
    stopped = sample_completions(
        model, [prompt, PROMPTS[1]], max_completion_length=6, stop_token_ids=[stop], seeds=[4, 5]
    )
    assert stopped.finished[0]
    ids = stopped.tokens.input_ids[0][stopped.tokens.completion_mask[0]].tolist()
    assert ids == tokens[: tokens.index(stop) + 1]
    assert stopped.completion_lengths()[0] == len(ids)


def test_log_probs_of_samples_are_those_they_were_drawn_with(model: PreTrainedModel) -> None:
    """The training forward over left-padded samples agrees with a fresh forward over each unpadded row."""
    samples = sample_completions(model, PROMPTS, max_completion_length=8, stop_token_ids=[1], seeds=[1, 2, 3])
    trained = completion_tokens(model, samples.tokens)
    assert (samples.log_probs - trained.log_probs).abs().max() < 1e-5
    ours = trained.sum_by_sequence(trained.log_probs)
    for row, prompt in enumerate(PROMPTS):
        ids = samples.tokens.input_ids[row][samples.tokens.attention_mask[row]]
        log_probs = model(input_ids=ids.unsqueeze(0)).logits[0].log_softmax(-1).detach()
        expected = sum(log_probs[t - 1, ids[t]] for t in range(len(prompt), len(ids)))
        assert ours[row].item() == pytest.approx(float(expected), abs=1e-4)


def test_sampling_leaves_modes_gradients_and_the_global_random_stream_alone(model: PreTrainedModel) -> None:
    model.train()
    model.base_model.layers[0].eval()  # a part in another mode than the whole
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    samples = sample_completions(model, PROMPTS, max_completion_length=4, stop_token_ids=[1], seeds=[1, 2, 3])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.rand(3), expected)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not samples.log_probs.requires_grad
    assert torch.is_grad_enabled()
    model.eval()


def test_an_error_on_the_way_leaves_the_mode_as_it_was(model: PreTrainedModel) -> None:
    model.train()
    with pytest.raises(IndexError):
        sample_completions(model, [torch.tensor([10_000])], max_completion_length=4, stop_token_ids=[1], seeds=[1])
    assert model.training
    model.eval()


def test_samples_are_the_same_in_inference_mode_and_can_be_trained_on_outside(model: PreTrainedModel) -> None:
    settings: dict[str, Any] = {"max_completion_length": 8, "stop_token_ids": [1], "seeds": [1, 2, 3]}
    plain = sample_completions(model, PROMPTS, **settings)
    with torch.inference_mode():
        inferred = sample_completions(model, PROMPTS, **settings)
    assert completions(plain) == completions(inferred)
    completion_tokens(model, plain.tokens).log_probs.sum().backward()
    model.zero_grad(set_to_none=True)


def test_under_autocast_the_log_probs_are_those_of_the_training_forward_to_bfloat16(model: PreTrainedModel) -> None:
    """And gradients still reach the weights that the sampler cast before, in the same autocast region."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        samples = sample_completions(model, PROMPTS, max_completion_length=8, stop_token_ids=[], seeds=[1, 2, 3])
        log_probs = completion_tokens(model, samples.tokens).log_probs
    assert (samples.log_probs - log_probs).abs().mean() < 0.03
    log_probs.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad(set_to_none=True)


def test_copies_of_weights_and_the_cache_are_freed_when_sampling_ends(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By reference counting: waiting for the garbage collector, they would stand beside the training step's tensors."""
    used = []

    def watched(*args: Any, **options: Any) -> Any:
        made = decoder(*args, **options)
        used.append(weakref.ref(made))
        return made

    monkeypatch.setattr("lightning_modules.generation.sampler.decoder", watched)
    gc.disable()
    try:
        sample_completions(model, PROMPTS, max_completion_length=4, stop_token_ids=[], seeds=[1, 2, 3])
        assert [reference() for reference in used] == [None]
    finally:
        gc.enable()


def test_a_stop_token_beyond_the_vocabulary_is_no_token(model: PreTrainedModel) -> None:
    """As a tokenizer may have more tokens than the model; with a minimum length its logit would be looked up."""
    options: dict[str, Any] = {"max_completion_length": 4, "seeds": range(3), "min_length": 2}
    plain = sample_completions(model, PROMPTS, stop_token_ids=[5], **options)
    beyond = sample_completions(model, PROMPTS, stop_token_ids=[5, model.config.vocab_size], **options)
    assert completions(beyond) == completions(plain)
