"""Architectures of transformers, small and with random weights: log-probabilities and samples are its own."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from datamodules.batches import pad
from lightning_modules.forward.attention import replace_attention
from lightning_modules.forward.completions import completion_tokens
from lightning_modules.generation.sampler import sample_completions
from tests.test_decode import by_forward, made, seeing

pytestmark = pytest.mark.filterwarnings("ignore")  # of settings that so small a model leaves out of proportion

SPECIAL = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 299}
TINY = {
    **SPECIAL,
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
HEADS = {**TINY, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
RECURRENT = {**SPECIAL, "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}


def of(name: str, **options: Any) -> Callable[[], Any]:
    """A recipe for a model, by the name of its configuration."""
    return lambda: transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**options))


FAMILIES: dict[str, Callable[[], Any]] = {
    "Qwen2": of("Qwen2", **TINY),
    "Qwen3": of("Qwen3", **HEADS),
    "Qwen3 MoE": of("Qwen3Moe", **HEADS, **EXPERTS, num_experts=4),
    "Qwen3.5": of("Qwen3_5Text", **HEADS),
    "Llama": of("Llama", **TINY),
    "Llama 4": of(
        "Llama4Text",
        **HEADS,
        num_local_experts=2,
        interleave_moe_layer_step=2,
        intermediate_size_mlp=48,
        attention_chunk_size=16,
    ),
    "Mistral": of("Mistral", **TINY, sliding_window=16),
    "Mixtral": of("Mixtral", **TINY, num_local_experts=4),
    "Ministral 3": of("Ministral3", **HEADS),
    "Gemma": of("Gemma", **HEADS),
    "Gemma 2": of("Gemma2", **HEADS, sliding_window=16),
    "Gemma 3, text": of("Gemma3Text", **HEADS, sliding_window=16),
    "Gemma 3": lambda: transformers.Gemma3ForConditionalGeneration(seeing(**HEADS)),
    "Phi-3": of("Phi3", **TINY),
    "SmolLM3": of("SmolLM3", **TINY),
    "OLMo 2": of("Olmo2", **TINY),
    "OLMo 3": of("Olmo3", **TINY, sliding_window=16),
    "Granite": of("Granite", **TINY),
    "Granite 4": of("GraniteMoeHybrid", **TINY, **STATES, layer_types=["mamba", "attention"] * 2, num_local_experts=0),
    "GLM-4": of("Glm4", **HEADS),
    "GPT-OSS": of("GptOss", **HEADS, num_local_experts=4, num_experts_per_tok=2),
    "DeepSeek V3": of(
        "DeepseekV3",
        **{**TINY, "num_key_value_heads": 4},
        **EXPERTS,
        **LATENT,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "EXAONE 4": of("Exaone4", **TINY),
    "LFM2": of("Lfm2", **TINY),
    "Falcon-H1": of("FalconH1", **TINY, **STATES, mamba_d_ssm=64),
    "StableLM": of("StableLm", **TINY),
    "GPT-NeoX": of("GPTNeoX", **{name: value for name, value in TINY.items() if name != "num_key_value_heads"}),
    "GPT-2": of("GPT2", **SPECIAL, vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "Mamba": of("Mamba", **RECURRENT, initializer_range=0.2),
    "RWKV": of("Rwkv", vocab_size=300, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
}


def rows_of(lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 299, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_and_samples_of_an_architecture_are_those_of_its_own_forward_pass(name: str) -> None:
    """Of rows of unequal lengths, beyond a window of attention, together; the forward pass has one at a time."""
    model = made(FAMILIES[name])
    rows = rows_of((3, 21, 9))
    with torch.no_grad():
        logits = [model(input_ids=row.unsqueeze(0)).logits[0, :-1].float().log_softmax(-1) for row in rows]
    expected = torch.cat([values.gather(1, row[1:, None])[:, 0] for values, row in zip(logits, rows, strict=True)])
    greedy: list[list[int]] = []
    for row in rows:
        whole = row
        for _ in range(6):
            whole = torch.cat([whole, by_forward(model, whole).argmax().view(1)])
        greedy.append(whole[len(row) :].tolist())

    replace_attention(model)
    masks = [[False] + [True] * (len(row) - 1) for row in rows]
    tokens = pad([row.tolist() for row in rows], masks, pad_token_id=0)
    found = completion_tokens(model, tokens).log_probs
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert found.requires_grad
    samples = sample_completions(
        model, rows, max_completion_length=6, stop_token_ids=[], seeds=[1, 2, 3], temperature=0.0
    )
    ids, mask = samples.tokens.input_ids, samples.tokens.completion_mask
    assert [row[own].tolist() for row, own in zip(ids, mask, strict=True)] == greedy
