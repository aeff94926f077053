"""Every fast path gives the log-probabilities and gradients of the plain padded forward pass of transformers."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from datamodules.batches import TokenBatch
from lightning_modules.forward import attention
from lightning_modules.forward.capabilities import Capabilities, attempted, capabilities
from lightning_modules.forward.completions import completion_states, completion_tokens, read_tokens, states_kl
from lightning_modules.forward.layout import flatten
from lightning_modules.functional import head
from lightning_modules.functional.log_probs import token_kl

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, Any] = {
    "qwen2": lambda: Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**GROUPED, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "mistral_window": lambda: MistralConfig(**GROUPED, sliding_window=8),
    "gemma2_softcap": lambda: Gemma2Config(**GROUPED, attn_logit_softcapping=2.0, final_logit_softcapping=1.5),
    "cohere_scale": lambda: CohereConfig(**GROUPED, logit_scale=0.25),
}
PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12]]
ROWS = [PROMPTS[0] + [13, 14, 15], PROMPTS[0] + [13, 16], PROMPTS[1] + [17], PROMPTS[1] + [17, 18, 19, 20]]
STARTS = [6, 6, 2, 2]
GROUPS = [0, 0, 1, 1]


def make(name: str, *, replaced: bool = True) -> PreTrainedModel:
    """A small model, with the attention that loading gives it unless that is not to be replaced."""
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases that are not zero, norms that are not one
                parameter.add_(0.2 * torch.randn_like(parameter))
    if replaced:
        attention.replace_attention(model)
    return model.train()


def batch_of(rows: Sequence[Sequence[int]], *, left: bool) -> TokenBatch:
    width = max(map(len, rows)) + 1
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask, completion_mask = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, STARTS, strict=True)):
        offset = width - len(row) if left else 0
        ids[i, offset : offset + len(row)] = torch.tensor(row)
        attention_mask[i, offset : offset + len(row)] = True
        completion_mask[i, offset + start : offset + len(row)] = True
    return TokenBatch(ids, attention_mask, completion_mask)


def plain_log_probs(model: PreTrainedModel, temperature: float = 1.0) -> Tensor:
    """Transformers alone: right-padded rows, all logits, a log-softmax."""
    batch = batch_of(ROWS, left=False)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    log_probs = (logits / temperature).log_softmax(-1)[:, :-1]
    chosen = log_probs.gather(2, batch.input_ids[:, 1:].unsqueeze(2)).squeeze(2)
    return chosen[batch.completion_mask[:, 1:]]


def weighted(log_probs: Tensor) -> Tensor:
    """A loss that weighs every token otherwise."""
    return (log_probs * torch.linspace(-1, 2, len(log_probs))).sum()


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(ours) == set(expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4, f"{name} is too flat to tell"
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(ours[name], gradient, atol=1e-5 * scale, rtol=1e-5, msg=name)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens at a time."""
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 2 * 4 * VOCABULARY)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("groups", [None, GROUPS, [0, 0, 0, 0]], ids=["unshared", "shared", "all_alike"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("small_chunks")
def test_log_probs_and_gradients_equal_the_plain_forward(name: str, groups: list[int] | None, left: bool) -> None:
    plain, fast = make(name, replaced=False), make(name)
    expected = plain_log_probs(plain)
    ours = completion_tokens(fast, batch_of(ROWS, left=left), groups=groups)
    torch.testing.assert_close(ours.log_probs, expected, atol=1e-5, rtol=1e-5)
    assert_same(gradients(fast, weighted(ours.log_probs)), gradients(plain, weighted(expected)))
    assert ours.count_by_sequence().tolist() == [3, 2, 1, 4]


def test_which_models_take_which_path() -> None:
    """A window bounds the rows that may be laid flat; Gemma 2 caps its attention and its logits, Cohere scales them."""
    found = {name: capabilities(make(name)) for name in CONFIGS}
    assert found == {
        "qwen2": Capabilities(float("inf"), True),
        "qwen3": Capabilities(float("inf"), True),
        "llama": Capabilities(float("inf"), True),
        "gpt_neox": Capabilities(float("inf"), True),
        "mistral_window": Capabilities(8.0, True),
        "gemma2_softcap": Capabilities(0.0, False),
        "cohere_scale": Capabilities(float("inf"), False),
    }


def test_a_shared_beginning_is_run_once_even_within_the_completions() -> None:
    """9 + 8 + 3 + 6 tokens; the first pair has the prompt and a token in common, the second all of its shorter row."""
    flat = flatten(batch_of(ROWS, left=True), GROUPS)
    assert flat.input_ids[0].tolist() == [*ROWS[0], 16, *ROWS[2], 18, 19, 20]
    assert flat.position_ids[0].tolist() == [*range(9), 7, 0, 1, 2, 3, 4, 5]
    assert flat.segments.lengths == [7, 2, 1, 3, 3]
    assert flat.segments.prefixes == [None, 0, 0, None, 3]


@pytest.mark.usefixtures("small_chunks")
def test_weights_known_before_give_the_same_gradient_and_wrong_ones_no_other() -> None:
    model = make("gpt_neox")
    batch = batch_of(ROWS, left=False)
    weights = torch.tensor([0.5, -2.0, 0.0, 1.0])

    def found(row_weights: Tensor | None) -> dict[str, Tensor]:
        ours = completion_tokens(model, batch, row_weights=row_weights, temperature=0.7)
        return gradients(model, 3 * (weights * ours.sum_by_sequence(ours.log_probs)).sum())

    expected = found(None)
    assert_same(found(weights), expected)
    assert_same(found(torch.ones(4)), expected)


@pytest.mark.parametrize("known", [None, torch.ones(4)], ids=["recomputed", "known"])
def test_a_bias_of_the_head_has_its_gradient(known: Tensor | None) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((4, 5), (7, 5), (7,)))
    ids = torch.tensor([3, 0, 6, 3])
    output = head.head_log_probs(hidden, weight, bias, ids, temperature=0.6, weights=known)
    expected = ((hidden @ weight.T + bias) / 0.6).log_softmax(-1)[torch.arange(4), ids]
    torch.testing.assert_close(output.log_probs, expected)
    ours = torch.autograd.grad(2 * output.log_probs.sum(), (hidden, weight, bias))
    for found, exact in zip(ours, torch.autograd.grad(2 * expected.sum(), (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("small_chunks")
def test_entropy_and_accuracy_are_those_of_the_tempered_distribution() -> None:
    torch.manual_seed(0)
    hidden, weight = 3 * torch.randn(9, 5), torch.randn(VOCABULARY, 5)
    exact = torch.distributions.Categorical(logits=hidden @ weight.T / 1.7)
    ids = exact.logits.argmax(-1)
    ids[::2] = (ids[::2] + 1) % VOCABULARY
    output = head.head_log_probs(hidden, weight, None, ids, temperature=1.7, entropy=True, accuracy=True)
    torch.testing.assert_close(output.entropy, exact.entropy(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.log_probs, exact.log_prob(ids), atol=1e-5, rtol=1e-5)
    assert output.correct is not None
    assert output.correct.tolist() == [False, True] * 4 + [False]


def test_bfloat16_operands_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 16).bfloat16(), torch.randn(5000, 16).bfloat16()
    ids = torch.arange(6)
    output = head.head_log_probs(hidden, weight, None, ids)
    logits = (hidden @ weight.T).double()
    expected = logits.log_softmax(-1)[torch.arange(6), ids].float()
    assert output.log_probs.dtype == torch.float32
    torch.testing.assert_close(output.log_probs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_lays_the_recomputed_rows_flat_too() -> None:
    plain, fast = make("qwen2"), make("qwen2")
    fast.gradient_checkpointing_enable()
    ours = completion_tokens(fast, batch_of(ROWS, left=False), groups=GROUPS)
    assert_same(gradients(fast, weighted(ours.log_probs)), gradients(plain, weighted(plain_log_probs(plain))))


@pytest.mark.parametrize("name", ["llama", "cohere_scale"])
@pytest.mark.usefixtures("small_chunks")
def test_kl_in_chunks_equals_the_kl_of_all_logits(name: str) -> None:
    policy = make(name)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        reference.get_input_embeddings().weight.mul_(1.3)  # type: ignore[operator, union-attr]
    batch = batch_of(ROWS, left=False)
    ours, theirs = (completion_states(model, batch, GROUPS) for model in (policy, reference))
    predicts = batch.completion_mask[:, 1:]
    logits = [
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits[:, :-1][predicts]
        for model in (policy, reference)
    ]
    expected = token_kl(*logits)
    assert expected.min() > 1e-3
    torch.testing.assert_close(states_kl(ours, theirs), expected, atol=1e-5, rtol=1e-4)
    log_probs = torch.log_softmax(logits[0], -1).gather(1, batch.input_ids[:, 1:][predicts].unsqueeze(1))[:, 0]
    torch.testing.assert_close(read_tokens(ours).log_probs, log_probs, atol=1e-5, rtol=1e-5)


def test_asking_changes_nothing_and_rows_are_laid_flat_only_where_attention_was_replaced() -> None:
    plain = make("llama", replaced=False)
    assert capabilities(plain) == Capabilities(0.0, True)
    assert plain.config._attn_implementation == "sdpa"


def test_a_switched_model_still_generates_and_saves_as_before(tmp_path: Path) -> None:
    plain, switched = make("llama", replaced=False).eval(), make("llama").eval()
    assert switched.config._attn_implementation == attention.NAME
    batch = batch_of(ROWS, left=True)
    prompts = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    assert torch.equal(
        plain.generate(**prompts, **settings),
        switched.generate(**prompts, **settings),  # type: ignore[operator]
    )
    switched.save_pretrained(tmp_path)
    assert attention.NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["qwen2", "cohere_scale"])
def test_the_entropy_is_tempered_whichever_logits_are_read(name: str) -> None:
    """Of a model whose head is read in chunks, and of one whose own logits are taken."""
    model = make(name)
    batch = batch_of(ROWS, left=False)
    found = completion_tokens(model, batch, temperature=1.7, entropy=True)
    expected = []
    for row, completed in zip(ROWS, (3, 2, 1, 4), strict=True):
        logits = model(input_ids=torch.tensor([row])).logits[0, -completed - 1 : -1] / 1.7
        expected.append(torch.distributions.Categorical(logits=logits).entropy())
    torch.testing.assert_close(found.entropy, torch.cat(expected).detach(), atol=1e-4, rtol=1e-4)


def test_weights_five_per_cent_off_are_no_common_factor() -> None:
    weights = torch.tensor([0.5, -2.0, 1.0])
    assert head.common_factor(3 * weights, weights) == pytest.approx(3.0)
    assert head.common_factor(3 * weights * torch.tensor([1.0, 1.05, 1.0]), weights) is None
    assert head.common_factor(torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3)) is None


CLOSED = RuntimeError("[../gloo/tcp/pair.cc] Connection closed by peer")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), CLOSED])
def test_a_probe_blames_no_model_for_what_is_not_its_doing(error: Exception) -> None:
    def probe(raised: Exception) -> float:
        raise raised

    with pytest.raises(type(error), match=str(error).partition("] ")[2] or "no room"):
        attempted(lambda: probe(error), "gives others")
    assert attempted(lambda: probe(TypeError("no such\ninput")), "gives others") == (math.inf, "fails (no such)")
    assert attempted(lambda: math.nan, "gives others") == (math.inf, "gives others")
    assert attempted(lambda: 0.5, "gives others") == (0.5, "gives others")
