"""Rows, templates and options as nobody would write them: each is used, dropped with a reason or refused by name."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.errors import ConfigurationError
from datamodules import UltraFeedbackDataModule
from datamodules.batches import collate_conversations, collate_preferences, collate_prompts
from datamodules.chat import load_tokenizer, stop_token_ids, tail_ids
from datamodules.chat_template import CHATML_TEMPLATE
from datamodules.encoders import ENCODERS
from datamodules.encoding import rows_of
from lightning_modules import DPOModule
from lightning_modules.dpo import pair_log_probs
from lightning_modules.forward.completions import completion_losses, completion_tokens
from lightning_modules.functional.reinforce import (
    kl_penalised_rewards,
    leave_one_out_advantages,
    policy_gradient_loss,
)
from lightning_modules.generation.sampler import sample_completions
from lightning_modules.models.loading import load_causal_lm

BODY = "{% for m in messages %}%s{% endfor %}{% if add_generation_prompt %}%s{% endif %}"
TEMPLATES = {
    "chatml": CHATML_TEMPLATE,
    "tags": BODY.replace("%s", "[{{ m.role }}]{{ m.content }}<|im_end|>", 1).replace("%s", "[assistant]"),
    "trimmed": BODY.replace("%s", "<|im_start|>{{ m.role }}:{{ m.content | trim }}<|im_end|>\n", 1).replace(
        "%s", "<|im_start|>assistant:"
    ),
    "bare": BODY.replace("%s", "{{ m.content }}<|endoftext|>", 1).replace("%s", ""),
    "silent": BODY.replace("%s", "{{ m.role }}", 1).replace("%s", ""),
    "refusing": "{{ raise_exception('no') }}",
    "broken": "{% for %}",
    "empty": "",
}
TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", " ", "\n", "yes", "<|im_end|>", "<|im_start|>assistant\nhi", "{{ 1 }}", "\x00", "é\u202e𝄞"]),
)
CONTENT = st.one_of(TEXT, TEXT, TEXT, st.none(), st.integers(), st.lists(st.text(max_size=2), max_size=2))
ROLES = st.sampled_from(["user", "assistant", "user", "assistant", "system", "tool", "", "User"])
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": ROLES, "content": CONTENT}),
    st.dictionaries(st.sampled_from(["role", "content", "from"]), TEXT, max_size=3),
    st.none(),
)
TURNS = st.lists(MESSAGE, max_size=5)


@st.composite
def well_formed(draw: Any) -> list[dict[str, str]]:
    """Turns that alternate, so that most cases come far."""
    count = draw(st.integers(1, 5))
    return [{"role": ("user", "assistant")[i % 2], "content": draw(TEXT)} for i in range(count)]


CONVERSATION = st.one_of(well_formed(), well_formed(), well_formed(), TURNS, st.none(), st.text(max_size=3))


@st.composite
def pairs(draw: Any) -> tuple[Any, Any]:
    """Two conversations, most often of one prompt."""
    chosen = draw(CONVERSATION)
    if draw(st.booleans()) and isinstance(chosen, list) and chosen and isinstance(chosen[-1], dict):
        return chosen, [*chosen[:-1], {"role": "assistant", "content": draw(TEXT)}]
    return chosen, draw(CONVERSATION)


SCORE = st.one_of(st.none(), st.floats(allow_nan=False))
ROWS = st.lists(
    st.builds(
        lambda both, one, other: {"chosen": both[0], "rejected": both[1], "score_chosen": one, "score_rejected": other},
        pairs(),
        SCORE,
        SCORE,
    ),
    min_size=1,
    max_size=3,
)
DPO_OPTIONS = st.fixed_dictionaries(
    {
        "loss": st.sampled_from(["sigmoid", "hinge", "ipo", "conservative", "robust"]),
        "beta": st.sampled_from([0.0, 0.01, 0.1, 5.0]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 0.5]),
        "sft_weight": st.sampled_from([0.0, 1.0]),
    }
)
CASES = {"rows": ROWS, "task": st.sampled_from(list(ENCODERS)), "template": st.sampled_from(list(TEMPLATES))}
CASES |= {"max_length": st.sampled_from([1, 10, 30, 60, 100, 150, 200]), "dpo": DPO_OPTIONS}


@cache
def tokenizer_with(directory: Path, template: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(str(directory))
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


@cache
def model_of(directory: Path) -> Any:
    return load_causal_lm(str(directory), load_tokenizer(str(directory))).eval()


def assert_finite(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.isfinite().all(), tensor


def train_on(
    task: str, kept: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, directory: Path, dpo: dict[str, Any]
) -> None:
    """What a method makes of a batch, up to its loss."""
    model = model_of(directory)
    if task == "conversations":
        batch = collate_conversations(kept, pad_token_id=tokenizer.pad_token_id)
        losses = completion_losses(model, batch)
        assert len(losses) > 0
        assert_finite(losses)
    elif task == "preferences":
        module = DPOModule(model_name=str(directory), **dpo)
        pair_batch = collate_preferences(kept, pad_token_id=tokenizer.pad_token_id, tail_ids=tail_ids(tokenizer))
        policy = pair_log_probs(completion_tokens(model, pair_batch.tokens, groups=pair_batch.pairs()))
        losses, metrics = module.preference_losses(policy, policy._replace(chosen=policy.chosen - 1.0))
        assert_finite(losses, *metrics.values())
        assert (torch.cat([policy.chosen_tokens, policy.rejected_tokens]) > 0).all()
    else:
        prompts = collate_prompts(kept)
        samples = sample_completions(
            model,
            prompts.prompt_ids,
            max_completion_length=3,
            stop_token_ids=stop_token_ids(tokenizer),
            seeds=range(2 * len(kept)),
            samples_per_prompt=2,
        )
        tokens = completion_tokens(model, samples.tokens, groups=[row // 2 for row in range(2 * len(kept))])
        log_probs = tokens.sum_by_sequence(tokens.log_probs).view(-1, 2)
        scores = samples.completion_lengths().float().view(-1, 2)
        rewards = kl_penalised_rewards(scores, log_probs.detach(), beta=0.1)
        assert_finite(policy_gradient_loss(log_probs, leave_one_out_advantages(rewards)))


def use(directory: Path, *, rows: Any, task: Any, template: str, max_length: int, dpo: dict[str, Any]) -> str:
    """What becomes of the rows: ``refused``, ``dropped`` or ``used``."""
    tokenizer = tokenizer_with(directory, template)
    options = {"read": UltraFeedbackDataModule.readers[task], "tokenizer": tokenizer, "max_length": max_length}
    try:
        encoded = rows_of(ENCODERS[task](rows, range(len(rows)), **options))
        kept = [row for row in encoded if not row["dropped"]]
        for row in encoded:
            assert set(row) == set(ENCODERS[task].features)
            ids = [token for name, column in row.items() if name.endswith("_ids") for token in column]
            assert bool(ids) == (not row["dropped"])
            assert len(row.get("input_ids", ())) <= max_length
        if kept:
            train_on(task, kept, tokenizer, directory, dpo)
    except ConfigurationError:
        return "refused"
    return "used" if kept else "dropped"


QUICK = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


@QUICK
@given(**CASES)
def test_nothing_crashes_and_nothing_is_no_number(tiny_model_dir: Path, **case: Any) -> None:
    use(tiny_model_dir, **case)


@pytest.mark.slow
@settings(QUICK, max_examples=2000)
@given(**CASES)
def test_nothing_crashes_and_nothing_is_no_number_in_two_thousand_cases(tiny_model_dir: Path, **case: Any) -> None:
    use(tiny_model_dir, **case)


def test_the_cases_come_far(tiny_model_dir: Path) -> None:
    """A good part of them trains, or the others would say little."""
    outcomes: list[str] = []

    @settings(QUICK, database=None, derandomize=True)
    @given(**CASES)
    def count(**case: Any) -> None:
        outcomes.append(use(tiny_model_dir, **case))

    count()
    assert min(outcomes.count(name) for name in ("used", "dropped", "refused")) >= 15, outcomes
