"""The sampler: its distribution, its independence of the batch, where it stops, and greedy against transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_modules.forward import completion_tokens
from lightning_modules.generation import sample_completions


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    return loaded.eval()


PROMPTS = [torch.tensor([5, 6, 7, 8]), torch.tensor([9]), torch.tensor([3, 3])]


def test_a_completion_does_not_depend_on_the_batch_around_it(model: PreTrainedModel) -> None:
    settings = {"max_completion_length": 12, "stop_token_ids": [1]}
    together = sample_completions(model, PROMPTS, seeds=[11, 12, 13], **settings)  # type: ignore[arg-type]
    for row, (prompt, seed) in enumerate(zip(PROMPTS, [11, 12, 13], strict=True)):
        alone = sample_completions(model, [prompt], seeds=[seed], **settings)  # type: ignore[arg-type]
        mask = together.tokens.completion_mask[row]
        assert together.tokens.input_ids[row][mask].tolist() == (
            alone.tokens.input_ids[0][alone.tokens.completion_mask[0]].tolist()
        )


def test_samples_follow_the_softmax(model: PreTrainedModel) -> None:
    """Chi-square of 20,000 first tokens against the exact distribution, over the likeliest tokens and the rest.

    With 20 degrees of freedom 45.3 is exceeded once in a thousand times; the seeds are fixed.
    """
    count = 20_000
    prompt = torch.tensor([5, 6, 7])
    probabilities = (model(input_ids=prompt.unsqueeze(0)).logits[0, -1] / 0.8).softmax(-1).detach()
    samples = sample_completions(
        model,
        [prompt] * count,
        max_completion_length=1,
        stop_token_ids=[1],
        seeds=range(count),
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
        model, [prompt] * 4000, max_completion_length=1, stop_token_ids=[1], seeds=range(4000), top_p=0.5
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
    completions = completion_tokens(model, samples.tokens)
    ours = completions.sum_by_sequence(completions.log_probs)
    for row, prompt in enumerate(PROMPTS):
        ids = samples.tokens.input_ids[row][samples.tokens.attention_mask[row]]
        log_probs = model(input_ids=ids.unsqueeze(0)).logits[0].log_softmax(-1).detach()
        expected = sum(log_probs[t - 1, ids[t]] for t in range(len(prompt), len(ids)))
        assert ours[row].item() == pytest.approx(float(expected), abs=1e-4)


def test_sampling_leaves_the_mode_and_the_global_random_stream_alone(model: PreTrainedModel) -> None:
    model.train()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sample_completions(model, PROMPTS, max_completion_length=4, stop_token_ids=[1], seeds=[1, 2, 3])
    assert model.training
    assert torch.equal(torch.rand(3), expected)
    model.eval()
