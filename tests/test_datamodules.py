"""Rows to batches: what is dropped and counted, what is cut, what is refused; on small files and on the real rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules import SmolTalkDataModule, UltraFeedbackDataModule
from datamodules.batches import PreferenceBatch, PromptBatch, TokenBatch, pad
from datamodules.chat import Message
from datamodules.errors import ConfigurationError
from datamodules.prompts import load_prompts


def user(text: str | None) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pair(prompt: str, chosen: str, rejected: str, scores: tuple[float, float] = (9.0, 2.0)) -> dict[str, Any]:
    return {
        "chosen": [user(prompt), assistant(chosen)],
        "rejected": [user(prompt), assistant(rejected)],
        "score_chosen": scores[0],
        "score_rejected": scores[1],
    }


def talk(directory: Path, model: Path, rows: list[dict[str, Any]], **options: Any) -> SmolTalkDataModule:
    write(directory / "train.jsonl", rows)
    write(directory / "test.jsonl", rows)
    module = SmolTalkDataModule(dataset_name=str(directory), model_name=str(model), **options)
    module.setup("fit")
    return module


def feedback(directory: Path, model: Path, rows: list[dict[str, Any]], **options: Any) -> UltraFeedbackDataModule:
    write(directory / "train_prefs.jsonl", rows)
    write(directory / "test_prefs.jsonl", rows)
    module = UltraFeedbackDataModule(dataset_name=str(directory), model_name=str(model), **options)
    module.setup("fit")
    return module


def test_padding_goes_by_position() -> None:
    batch = pad([[5, 0], [7, 8, 9]], [[False, True], [False, True, True]], pad_token_id=0)
    assert batch.input_ids.tolist() == [[5, 0, 0], [7, 8, 9]]
    assert batch.attention_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.completion_mask.tolist() == [[False, True, False], [False, True, True]]


def test_conversations_are_dropped_with_a_reason(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [
        {"messages": [user("hi"), assistant("yo")]},
        {"messages": [user("hi"), assistant("  ")]},
        {"messages": [user("only a question")]},
        {"messages": [user(None), assistant("yo")]},
        {"messages": [user("x" * 300), assistant("yo")]},
    ]
    module = talk(tmp_path, tiny_model_dir, rows, max_length=100)
    assert module.dropped["train"] == {
        "empty completion": 1,
        "no supervised token": 1,
        "malformed": 1,
        "too long": 1,
    }
    (batch,) = module.train_dataloader()
    assert isinstance(batch, TokenBatch)
    assert module.tokenizer.decode(batch.input_ids[0][batch.completion_mask[0]]) == "yo<|im_end|>"


def test_a_long_conversation_loses_its_earliest_exchange(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [{"messages": [user("a" * 80), assistant("b"), user("c"), assistant("d")]}]
    (batch,) = talk(tmp_path, tiny_model_dir, rows, max_length=90).val_dataloader()
    text = "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>"
    module = talk(tmp_path, tiny_model_dir, rows, max_length=90)
    assert module.tokenizer.decode(batch.input_ids[0]) == text


def test_pairs_hold_the_chosen_half_first_and_mask_only_the_completions(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [pair("q", "good", "bad"), pair("long question", "fine", "poor answer")]
    module = feedback(tmp_path, tiny_model_dir, rows)
    (batch,) = module.val_dataloader()
    assert isinstance(batch, PreferenceBatch)
    tokens = batch.tokens
    learned = [module.tokenizer.decode(i[m]) for i, m in zip(tokens.input_ids, tokens.completion_mask, strict=True)]
    assert learned == [f"{text}<|im_end|>" for text in ("good", "fine", "bad", "poor answer")]
    whole = module.tokenizer.apply_chat_template(rows[1]["rejected"], tokenize=False)
    assert module.tokenizer.decode(tokens.input_ids[3][tokens.attention_mask[3]]) == whole


def test_pairs_are_dropped_with_a_reason_and_ties_are_counted(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    different = {**pair("q", "a", "b"), "rejected": [user("another q"), assistant("b")]}
    rows = [
        pair("q", "a", "b"),
        pair("q", "a", "b", scores=(5.0, 5.0)),
        pair("q", "a", "a"),
        pair("q", "a", ""),
        pair("q", "a" * 300, "b"),
        different,
    ]
    with caplog.at_level("INFO"):
        module = feedback(tmp_path, tiny_model_dir, rows, max_length=100)
    assert module.dropped["train_prefs"] == {
        "chosen equals rejected": 1,
        "empty completion": 1,
        "too long": 1,
        "prompts differ": 1,
    }
    assert "2 of 6 rows kept, 1 of them with tied scores" in caplog.text


def test_prompts_come_with_their_conversation(tmp_path: Path, tiny_model_dir: Path) -> None:
    module = feedback(tmp_path, tiny_model_dir, [pair("q", "a", "b")], task="prompts")
    (batch,) = module.val_dataloader()
    assert isinstance(batch, PromptBatch)
    assert batch.prompts == [[user("q")]]
    assert module.tokenizer.decode(batch.prompt_ids[0]) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def test_one_file_is_split_without_overlap(tmp_path: Path, tiny_model_dir: Path) -> None:
    write(tmp_path / "rows.jsonl", [{"messages": [user(f"q{i}"), assistant("a")]} for i in range(40)])
    module = SmolTalkDataModule(
        dataset_name=str(tmp_path / "rows.jsonl"), model_name=str(tiny_model_dir), batch_size=40
    )
    module.setup("fit")
    (train,), (held_out,) = module.train_dataloader(), module.val_dataloader()
    texts = [set(module.tokenizer.batch_decode(batch.input_ids)) for batch in (train, held_out)]
    assert (len(texts[0]), len(texts[1])) == (38, 2)
    assert not texts[0] & texts[1]


def test_every_epoch_has_its_own_order_and_the_same_rows(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [{"messages": [user(f"{i:02}"), assistant("a")]} for i in range(30)]
    loader = talk(tmp_path, tiny_model_dir, rows, batch_size=30).train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        (batch,) = loader
        orders.append(batch.input_ids)
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0].sort(0).values, orders[1].sort(0).values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_name": "./nowhere"}, "nowhere does not exist; change data.dataset_name"),
        ({"model_name": "./nowhere"}, "model directory ./nowhere does not exist"),
        ({"batch_size": 0}, "data.batch_size must be at least 1, got 0"),
        ({"task": "preferences"}, "SmolTalkDataModule has no preferences"),
        ({"max_length": 3}, "no row of .* can be used"),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, tiny_model_dir: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path / "train.jsonl", [{"messages": [user("q"), assistant("a")]}])
    write(tmp_path / "test.jsonl", [{"messages": [user("q"), assistant("a")]}])
    options = {"dataset_name": str(tmp_path), "model_name": str(tiny_model_dir), **change}
    with pytest.raises(ConfigurationError, match=message):
        SmolTalkDataModule(**options).setup("fit")


def test_wrong_columns_a_missing_split_and_a_broken_file_are_named(tmp_path: Path, tiny_model_dir: Path) -> None:
    write(tmp_path / "train_prefs.jsonl", [{"question": "q"}])
    options = {"dataset_name": str(tmp_path), "model_name": str(tiny_model_dir)}
    with pytest.raises(ConfigurationError, match=r"lacks the columns \['chosen', 'rejected'\], it has \['question'\]"):
        UltraFeedbackDataModule(**options).setup("fit")
    with pytest.raises(ConfigurationError, match=r"has no train.parquet or train.jsonl, only \['train_prefs.jsonl'\]"):
        SmolTalkDataModule(**options).setup("fit")
    (tmp_path / "train.jsonl").write_text('{"messages": [\n')
    with pytest.raises(ConfigurationError, match=r"train.jsonl cannot be read"):
        SmolTalkDataModule(**options).setup("fit")


def test_evaluation_prompts_are_distinct_short_enough_and_end_with_the_user(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    from datamodules.chat import load_tokenizer

    rows = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b" * 200}, {"prompt": "c"}, {"prompt": "d"}]
    write(tmp_path / "prompts.jsonl", rows)
    tokenizer = load_tokenizer(str(tiny_model_dir))
    prompts = load_prompts(str(tmp_path / "prompts.jsonl"), "any", tokenizer=tokenizer, count=2, max_length=100)
    assert [prompt.messages for prompt in prompts] == [[user("a")], [user("c")]]


def test_real_pairs_are_handled_as_defined(real_data: Path) -> None:
    module = UltraFeedbackDataModule(
        dataset_name=str(real_data / "ultrafeedback"),
        model_name=str(real_data / "qwen2.5-tokenizer"),
        max_length=4096,
    )
    module.setup("fit")
    assert module.dropped["train_prefs"] == {"chosen equals rejected": 4, "empty completion": 2}
    lengths = [len(batch.tokens.input_ids[0]) for batch in module.val_dataloader()]
    assert max(lengths) <= 4096
