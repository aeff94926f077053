"""Our decode step against transformers' forward, for each architecture it knows; and which ones it does not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from lightning_modules.generation.decoders import decoder, decodes
from lightning_modules.generation.family_decoder import FamilyDecoder, of_like_length
from lightning_modules.generation.projections import packs, projection
from lightning_modules.generation.sampler import sample_completions
from lightning_modules.generation.transformers_decoder import (
    TransformersDecoder,
    WholeRowDecoder,
    steps_as_whole_rows,
)
from lightning_modules.models.loading import most_tokens

SMALL = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
}
FAMILY: dict[str, Callable[[], PreTrainedModel]] = {
    "Qwen2, tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True)),
    "Qwen2, untied": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=False)),
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=20)),
    "Qwen3 with biases": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8, attention_bias=True)),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "Llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)),
    "Llama 3's rotation": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=LLAMA3)),
    "YaRN": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, rope_parameters=YARN)),
    "wide heads": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, head_dim=20)),
    "Mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)),
}
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=24, n_layer=2, n_head=2, n_positions=256)),
    "Mistral with a window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=16)),
    "Qwen2 with a window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    ),
    "Qwen3 with a window": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    ),
    "a rotation that depends on the length": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=LONGROPE)),
}
FORGETFUL: dict[str, Callable[[], PreTrainedModel]] = {
    "Mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=300, hidden_size=24, num_hidden_layers=2, state_size=8, initializer_range=0.2)
    ),
    "RecurrentGemma": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(**{name: value for name, value in SMALL.items() if name != "max_position_embeddings"})
    ),
}
"""Those that transformers' cache, or padding before a prompt, makes forget or misread what they have read."""


def seeing(**text: Any) -> Gemma3Config:
    """The configuration of a model that reads pictures too."""
    picture = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3Config(
        text_config={**SMALL, "head_dim": 8, "sliding_window": 16, **text},
        vision_config={**picture, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=299,
    )


def made(recipe: Callable[[], PreTrainedModel]) -> Any:
    """Random weights, biases and norms included: their initial zeros and ones would hide a mistake."""
    torch.manual_seed(0)
    model = recipe()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def prompts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 300, (length,), generator=generator) for length in lengths]


def by_forward(model: Any, ids: Tensor) -> Tensor:
    """Logits after the last token, by transformers' forward over the one unpadded row."""
    with torch.no_grad():
        return model(input_ids=ids.unsqueeze(0)).logits[0, -1]


@pytest.mark.parametrize("name", FAMILY)
def test_a_decode_step_equals_the_forward_over_the_whole_row(name: str) -> None:
    """Prompts of unequal lengths, across the edge of an attention block, and a row that has left on the way."""
    model = made(FAMILY[name])
    assert decodes(model)
    rows = prompts(3, 126, 140)
    decoding = FamilyDecoder(model, rows, samples_per_prompt=1, max_completion_length=8)
    with torch.no_grad():
        logits = decoding.start()
        for step in range(6):
            expected = torch.stack([by_forward(model, ids) for ids in rows])
            assert (logits - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())
            if step == 3:
                decoding.keep(torch.tensor([2, 1]))
                rows, logits = [rows[2], rows[1]], logits[[2, 1]]
            tokens = logits.argmax(-1)
            rows = [torch.cat([ids, token.view(1)]) for ids, token in zip(rows, tokens, strict=True)]
            logits = decoding.step(tokens)


@pytest.mark.parametrize("name", ["Qwen2, tied", "Qwen3", "Llama with biases"])
def test_prompts_read_together_as_on_a_gpu_are_those_read_one_by_one(name: str) -> None:
    model = made(FAMILY[name])
    rows = prompts(3, 126, 5, 140, 1, 64, 5)
    assert len(of_like_length([len(row) for row in rows])) > 1
    alone, together = (FamilyDecoder(model, rows, samples_per_prompt=2, max_completion_length=8) for _ in range(2))
    with torch.no_grad():
        found = [alone.start(), together._read(0, rows).repeat_interleave(2, dim=0)]
        for _ in range(4):
            torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
            tokens = found[0].topk(len(found[0])).indices.diagonal()  # so that samples of one prompt part
            found = [decoding.step(tokens) for decoding in (alone, together)]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40))
def test_prompts_of_a_group_are_at_most_half_padding(lengths: list[int]) -> None:
    groups = of_like_length(lengths)
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    for group in groups:
        own = [lengths[number] for number in group]
        assert len(own) * max(own) <= 2 * sum(own)
    if max(lengths) <= 2 * min(lengths):
        assert len(groups) == 1


@pytest.mark.parametrize("name", [*OTHERS, *FORGETFUL, "Llama"])
def test_the_decoder_for_any_other_model_equals_the_forward_too(name: str) -> None:
    model = made((FAMILY | OTHERS | FORGETFUL)[name])
    rows = prompts(3, 40, 17)
    with torch.no_grad():
        assert steps_as_whole_rows(model) is (name not in FORGETFUL)
    kind = WholeRowDecoder if name in FORGETFUL else TransformersDecoder
    decoding = kind(model, rows, samples_per_prompt=2)
    rows = [row for row in rows for _ in range(2)]
    with torch.no_grad():
        logits = decoding.start()
        for step in range(5):
            expected = torch.stack([by_forward(model, ids) for ids in rows])
            assert (logits - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())
            if step == 2:
                decoding.keep(torch.tensor([5, 1, 2]))
                rows, logits = [rows[5], rows[1], rows[2]], logits[[5, 1, 2]]
            tokens = logits.topk(len(rows)).indices.diagonal()  # so that samples of one prompt part
            rows = [torch.cat([ids, token.view(1)]) for ids, token in zip(rows, tokens, strict=True)]
            logits = decoding.step(tokens)


@pytest.mark.parametrize("name", [*OTHERS, *FORGETFUL])
def test_an_architecture_that_is_not_exactly_known_goes_through_transformers(name: str) -> None:
    model = made((OTHERS | FORGETFUL)[name])
    with torch.no_grad():
        made_for = decoder(model, prompts(3), samples_per_prompt=1, max_completion_length=4)
    assert type(made_for) is (WholeRowDecoder if name in FORGETFUL else TransformersDecoder)


def test_a_model_that_is_silent_about_the_cache_is_told_of_and_samples_what_generate_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It keeps its state elsewhere: with a cache that it does not know each token would follow nothing."""
    model = made(FORGETFUL["Mamba"])
    rows = prompts(3, 17)
    with caplog.at_level("INFO"):
        for _ in range(2):
            found = sample_completions(
                model, rows, max_completion_length=7, stop_token_ids=[], seeds=[1, 2], temperature=0.0
            )
    assert [record.getMessage() for record in caplog.records if "MambaForCausalLM" in record.getMessage()] == [
        "MambaForCausalLM: a token at a time with transformers' cache gives other logits, so sampling reads whole rows "
        "for each token, which is slow"
    ]
    for row, ids, mask in zip(rows, found.tokens.input_ids, found.tokens.completion_mask, strict=True):
        theirs = model.generate(row.unsqueeze(0), max_new_tokens=7, do_sample=False, pad_token_id=0)[0, len(row) :]
        assert ids[mask].tolist() == theirs.tolist()


def test_a_model_whose_text_is_a_part_of_its_configuration_is_sampled_from() -> None:
    """As Gemma 3, which reads pictures too: the vocabulary is its text model's."""
    model = made(lambda: Gemma3ForConditionalGeneration(seeing()))
    assert most_tokens(model.config) == SMALL["max_position_embeddings"]
    rows = prompts(3, 20)
    found = sample_completions(
        model, rows, max_completion_length=5, stop_token_ids=[300], seeds=[1, 2], temperature=0.0
    )
    for row, ids, mask in zip(rows, found.tokens.input_ids, found.tokens.completion_mask, strict=True):
        for token in ids[mask]:
            assert token == by_forward(model, row).argmax()
            row = torch.cat([row, token.view(1)])


def test_a_replaced_layer_goes_through_transformers() -> None:
    """An adapter or a quantised layer is no plain linear layer; a subclass may compute anything."""
    model = made(FAMILY["Qwen2, tied"])
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    assert not decodes(model)

    class Other(Qwen2ForCausalLM):
        pass

    assert not decodes(Other(Qwen2Config(**SMALL)))


@pytest.mark.parametrize("name", ["Qwen2, tied", "Qwen3", "Llama"])
@pytest.mark.parametrize("mixed", [True, False])
def test_bfloat16_rounds_where_the_training_forward_does(name: str, mixed: bool) -> None:
    """Under autocast, and with bfloat16 weights, logits are no farther from transformers' than its own rounding.

    The yardstick is how far transformers' bfloat16 logits are from its float32 ones.
    """
    model = made(FAMILY[name])
    exact = copy.deepcopy(model)
    if not mixed:
        model.to(torch.bfloat16)
    rows = prompts(5, 9)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        decoding = FamilyDecoder(model, rows, samples_per_prompt=1, max_completion_length=8)
        decoding.start()
        tokens = torch.tensor([7, 8])
        logits = decoding.step(tokens)
        assert logits.dtype == torch.bfloat16
        rows = [torch.cat([ids, token.view(1)]) for ids, token in zip(rows, tokens, strict=True)]
        theirs = torch.stack([by_forward(model, ids) for ids in rows]).float()
    truth = torch.stack([by_forward(exact, ids) for ids in rows])
    assert (logits.float() - theirs).abs().mean() < 0.7 * (theirs - truth).abs().mean()


def test_a_decoder_reads_the_weights_as_they_are_at_the_time() -> None:
    """What an optimiser step changes is seen by the next rollout."""
    model = made(FAMILY["Qwen2, tied"])
    row, tokens = prompts(6), torch.tensor([3])
    with torch.no_grad():
        for _ in range(2):
            decoding = FamilyDecoder(model, row, samples_per_prompt=1, max_completion_length=4)
            decoding.start()
            expected = by_forward(model, torch.cat([row[0], tokens]))
            assert (decoding.step(tokens)[0] - expected).abs().max() < 1e-4
            for parameter in model.parameters():
                parameter.mul_(1.1)


def linears(inputs: int, *outputs: int) -> list[torch.nn.Linear]:
    """Layers of one input, every second with a bias."""
    torch.manual_seed(1)
    return [torch.nn.Linear(inputs, count, bias=bool(place % 2)) for place, count in enumerate(outputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outputs", [(7,), (16, 5, 9)])
def test_a_projection_is_the_layers_side_by_side(dtype: torch.dtype, outputs: tuple[int, ...]) -> None:
    layers = linears(24, *outputs)
    rows = torch.randn(3, 24)
    with torch.no_grad():
        expected = torch.cat([layer.to(dtype)(rows.to(dtype)) for layer in copy.deepcopy(layers)], dim=-1)
        ours = projection(layers, dtype)(rows)
    assert ours.dtype == dtype
    assert (ours.float() - expected.float()).abs().max() < {torch.float32: 1e-6}.get(dtype, 0.02)


@pytest.mark.skipif(not packs(torch.float32), reason="without oneDNN another number of rows may round otherwise")
@pytest.mark.parametrize("inputs", [16, 256, 4864])
def test_a_row_of_a_product_is_the_same_bits_in_any_number_of_rows(inputs: int) -> None:
    rows = torch.randn(40, inputs, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        product = projection(linears(inputs, 300, 20), torch.float32)
        together = product(rows)
        for count in (1, 2, 3, 4, 5, 11, 12, 16, 17, 31):
            assert torch.equal(product(rows[:count]), together[:count])
            assert torch.equal(product(rows[-count:].clone()), together[-count:])


def test_a_rotation_of_a_part_is_not_exactly_known() -> None:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    assert not decodes(made(lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, rope_parameters=rope))))
    rope["partial_rotary_factor"] = 1.0
    assert decodes(made(lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, rope_parameters=rope))))
