"""Rows to batches: what is dropped and counted, what is cut, what is refused; on small files and on the real rows."""

import json
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Features, load_dataset

from core.errors import ConfigurationError
from datamodules import SmolTalkDataModule, UltraFeedbackDataModule, encoding, rendering
from datamodules.batches import PreferenceBatch, PromptBatch, TokenBatch, pad
from datamodules.chat import encode_conversation, load_tokenizer, tail_ids
from datamodules.chat_template import CHATML_TEMPLATE, turn_end
from datamodules.encoders import ENCODERS, IDS
from datamodules.formats import Task, read_messages
from datamodules.messages import Message
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


def test_what_is_wrong_with_real_rows_is_a_counted_reason_and_no_error(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Control tokens are no text, and a conversation begins with a question."""
    rows = [
        {"messages": [user("hi"), assistant("yo")]},
        {"messages": [assistant("welcome"), user("hi"), assistant("yo")]},
        {"messages": [user("hi"), assistant("<|im_end|>")]},
        {"messages": [user("hi"), assistant("<|im_end|> <|im_start|>")]},
    ]
    reasons = {"begins with an assistant turn": 1, "empty completion": 2}
    assert talk(tmp_path, tiny_model_dir, rows).dropped["train"] == reasons
    prompts = talk(tmp_path, tiny_model_dir, rows, task="prompts")
    assert prompts.dropped["train"] == {"begins with an assistant turn": 1}


def test_a_row_that_the_template_refuses_is_a_counted_reason(tmp_path: Path, tiny_model_dir: Path) -> None:
    template = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}"
    (tmp_path / "strict.jinja").write_text(template + CHATML_TEMPLATE)
    rows = [
        {"messages": [user("hi"), assistant("yo")]},
        {"messages": [{"role": "system", "content": "be"}, user("hi"), assistant("yo")]},
    ]
    module = talk(tmp_path, tiny_model_dir, rows, chat_template=str(tmp_path / "strict.jinja"))
    assert module.dropped["train"] == {"refused by the chat template (no system role)": 1}


RULES = (
    "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}"
    "{%- if 'loop' in messages[0]['content'] -%}"
    "{%- for a in range(99999) -%}{%- for b in range(99999) -%}{%- endfor -%}{%- endfor -%}"
    "{%- endif -%}"
    "{%- if 'count' in messages[0]['content'] -%}{{ messages | length }}{%- endif -%}"
    "{%- if tools -%}{{ tools | tojson }}{%- endif -%}"
)
"""A template that refuses some rows, takes for ever over others, rewrites earlier text of others, and lists tools."""


@pytest.mark.parametrize("task", ["conversations", "preferences", "prompts"])
def test_rows_encoded_together_are_as_each_alone(
    task: Task, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is beside them: rows that are refused, that time out, that are shortened, and that have tools."""
    monkeypatch.setattr(rendering, "RENDERED_TOGETHER", 100)
    monkeypatch.setattr(rendering, "RENDER_S", 0.1)
    (tmp_path / "rules.jinja").write_text(RULES + CHATML_TEMPLATE)
    tokenizer = load_tokenizer(str(tiny_model_dir), chat_template=str(tmp_path / "rules.jinja"))
    tool = {"type": "function", "function": {"name": "f", "description": "A tool.", "parameters": {}}}
    talks = [
        [user("hi"), assistant("yo")],
        [{"role": "system", "content": "be"}, user("hi"), assistant("yo")],
        [user("long " * 9), assistant("yes"), user("and?"), assistant("no"), user("so?"), assistant("well")],
        [user("loop"), assistant("yo")],
        [assistant("first")],
        [user("bye"), assistant("so long"), user("really?"), assistant("yes")],
        [user("x" * 150), assistant("too long")],
    ]
    rows = [
        {"messages": talk, "chosen": talk, "rejected": [*talk[:-1], assistant("other")], "tools": tools}
        for talk in talks
        for tools in ([tool], None)
    ]
    options = {"read": UltraFeedbackDataModule.readers[task], "tokenizer": tokenizer, "max_length": 180}
    together = ENCODERS[task](rows, range(len(rows)), **options)
    alone = [ENCODERS[task]([row], [0], **options) for row in rows]
    assert together == {name: [one[name][0] for one in alone] for name in together}
    assert len(set(together["dropped"])) == 5, "used, refused twice over, no conversation, too long"
    assert together["dropped"].count("") == 7


def test_a_call_of_a_template_is_given_so_much_text_and_no_more(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many turns a conversation has, each of which has what went before it rendered again."""
    monkeypatch.setattr(rendering, "RENDERED_TOGETHER", 1_000)
    tokenizer = load_tokenizer(str(tiny_model_dir))
    turn_end(tokenizer)  # whose probe is a call of its own
    apply, given = tokenizer.apply_chat_template, list[list[int]]()

    def counted(conversations: list[list[Message]], **options: Any) -> Any:
        given.append([sum(len(turn["content"]) for turn in turns) for turns in conversations])
        return apply(conversations, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    rows = [{"messages": [user("q" * 50), assistant("a" * 50)] * turns} for turns in (9, 1, 1, 1, 30, 1, 1, 1, 1)]
    options = {"read": read_messages, "tokenizer": tokenizer, "max_length": 10_000}
    encoded = ENCODERS["conversations"](rows, range(len(rows)), **options)
    assert encoded["dropped"] == [""] * len(rows)
    assert all(sum(each) < 1_000 + max(each) for each in given)
    assert max(map(len, given)) > 3, "and several at a time where they are short"


def test_an_unusable_template_names_its_row(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "ROWS_PER_BATCH", 2)
    (tmp_path / "rules.jinja").write_text(RULES + CHATML_TEMPLATE)
    rows = [{"messages": [user("hi"), assistant("yo"), user("and?"), assistant("no")]} for _ in range(7)]
    rows[5] = {"messages": [user("count"), *rows[5]["messages"][1:]]}
    with pytest.raises(ConfigurationError, match="row 5: the chat template rewrites earlier text at turn 1"):
        talk(tmp_path, tiny_model_dir, rows, chat_template=str(tmp_path / "rules.jinja"))


def test_a_pair_without_two_answers_that_differ_is_dropped(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Nothing of such a pair could be learned but that the one side is empty."""
    question = {**pair("q", "a", "b"), "rejected": [user("q"), user("b")]}
    opened = {side: [assistant("welcome"), user("q"), assistant(side)] for side in ("chosen", "rejected")}
    rows = [
        pair("q", "a", "b"),
        question,
        {**pair("q", "a", "b"), "chosen": [user("q"), user("a")]},
        pair("q", "yes", "yes<|im_end|>"),
        pair("q", "yes", "<|im_end|>"),
        {**pair("q", "a", "b"), **opened},
        {**pair("q", "a", "b"), "chosen": None},
    ]
    module = feedback(tmp_path, tiny_model_dir, rows)
    assert module.dropped["train_prefs"] == {
        "no answer at the end": 2,
        "chosen equals rejected": 1,
        "empty completion": 1,
        "begins with an assistant turn": 1,
        "malformed": 1,
    }


def test_answers_that_the_template_writes_alike_are_equal(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "trim.jinja").write_text(CHATML_TEMPLATE.replace("message['content']", "message['content'] | trim"))
    rows = [pair("q", "a", "b"), pair("q", "yes", "yes ")]
    module = feedback(tmp_path, tiny_model_dir, rows, chat_template=str(tmp_path / "trim.jinja"))
    assert module.dropped["train_prefs"] == {"chosen equals rejected": 1}


def test_a_missing_conversation_is_a_counted_reason_in_every_task(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [pair("q", "a", "b"), {**pair("q", "a", "b"), "chosen": None}]
    for task in ("preferences", "prompts", "conversations"):
        module = feedback(tmp_path, tiny_model_dir, rows, task=task)
        assert module.dropped["train_prefs"] == {"malformed": 1}, task


def test_the_encoding_code_is_a_part_of_the_cache_s_key(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that an earlier version encoded, and kept on disk, are not read as this one's."""
    write(tmp_path / "test.jsonl", [{"messages": [user("hi"), assistant("yo")]}])

    def key() -> str:
        module = SmolTalkDataModule(dataset_name=str(tmp_path), model_name=str(tiny_model_dir))
        module.setup("validate")
        return str(module._splits["test"]._fingerprint)

    assert key() == key()
    before = key()
    monkeypatch.setattr(encoding, "code_digest", lambda: "other code")
    assert key() != before


def test_the_encoding_code_is_every_module_that_rows_go_through() -> None:
    """One that were left out could change what is trained on, and old rows would be read for new ones."""
    reached, ahead = set[str](), ["encoders"]
    while ahead:
        name = ahead.pop()
        reached.add(name)
        imports = re.findall(r"^from datamodules\.(\w+) import", Path("datamodules", f"{name}.py").read_text(), re.M)
        ahead += set(imports) - reached
    assert reached == set(encoding.CODE)


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
        ({"num_workers": -1}, "data.num_workers must not be negative, got -1"),
        ({"chat_template": "nowhere.jinja"}, "no chat template 'nowhere.jinja'"),
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
    (tmp_path / "train-0.jsonl").write_text('{"messages": "good"}\n')
    (tmp_path / "train-1.jsonl").write_bytes(b'{"messages": "good"}\n{"messages": "caf\xe9"}\n')
    with pytest.raises(ConfigurationError, match=r"line 2 of .*train-1.jsonl is not in UTF-8 .* at byte 17"):
        SmolTalkDataModule(**options).setup("fit")
    (tmp_path / "train-1.jsonl").unlink()
    (tmp_path / "train.jsonl").write_text('{"messages": [\n')
    with pytest.raises(ConfigurationError, match=r"train.jsonl cannot be read"):
        SmolTalkDataModule(**options).setup("fit")


def test_evaluation_prompts_are_distinct_short_enough_and_end_with_the_user(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    rows = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b" * 200}, {"prompt": "c"}, {"prompt": "d"}]
    write(tmp_path / "prompts.jsonl", rows)
    tokenizer = load_tokenizer(str(tiny_model_dir))
    prompts = load_prompts(str(tmp_path / "prompts.jsonl"), "any", tokenizer=tokenizer, count=2, max_length=100)
    assert [prompt.messages for prompt in prompts] == [[user("a")], [user("c")]]


def test_a_usable_prompt_is_found_beside_what_is_none(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [{"prompt": "a", "chosen": "text"}, {"prompt": "b", "messages": []}, {"prompt": [user("c")]}]
    for row in rows:
        write(tmp_path / "prompts.jsonl", [row])
        prompts = load_prompts(
            str(tmp_path / "prompts.jsonl"),
            "any",
            tokenizer=load_tokenizer(str(tiny_model_dir)),
            count=2,
            max_length=100,
        )
        assert len(prompts) == 1, row


def test_why_no_row_is_a_prompt_is_told_by_reason(tmp_path: Path, tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    rows = [{"prompt": {"text": "5"}}, {"prompt": {"text": "7"}}]
    write(tmp_path / "numbers.jsonl", rows)
    with pytest.raises(ConfigurationError, match=r"\(2 malformed\); change evaluation.dataset_name"):
        load_prompts(str(tmp_path / "numbers.jsonl"), "any", tokenizer=tokenizer, count=2, max_length=100)
    rows = [{"messages": [assistant("welcome"), user("q"), assistant("a")]}, {"messages": [user("q" * 200)]}]
    write(tmp_path / "talks.jsonl", rows)
    told = r"\(1 begins with an assistant turn, 1 longer than 100 tokens\)"
    with pytest.raises(ConfigurationError, match=told):
        load_prompts(str(tmp_path / "talks.jsonl"), "any", tokenizer=tokenizer, count=2, max_length=100)


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


def test_the_order_of_the_rows_comes_from_the_data_s_seed(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [{"messages": [user(f"{i:02}"), assistant("a")]} for i in range(30)]
    for budget in (None, 64):
        orders = []
        for seed in (1, 2, 1):
            options = {"seed": seed, "tokens_per_batch": budget, "max_length": 64}
            loader = talk(tmp_path, tiny_model_dir, rows, **options).train_dataloader()
            orders.append([row for batch in loader for row in batch.input_ids.tolist()])
        assert orders[0] == orders[2] != orders[1]
        assert sorted(map(str, orders[0])) == sorted(map(str, orders[1]))


def test_validation_shards_hold_each_row_once(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Seven rows on two processes: the padding that training's shards get would count a row twice."""
    rows = [{"messages": [user(f"{i:02}"), assistant("a")]} for i in range(7)]
    module = talk(tmp_path, tiny_model_dir, rows, batch_size=2)
    shards = []
    for rank in range(2):
        strategy = types.SimpleNamespace(root_device=torch.device("cpu"))
        fake: Any = types.SimpleNamespace(world_size=2, global_rank=rank, strategy=strategy, overfit_batches=0)
        module.trainer = fake
        shards.append([row for batch in module.val_dataloader() for row in batch.input_ids.tolist()])
    assert [len(shard) for shard in shards] == [4, 3]
    assert len({str(row) for shard in shards for row in shard}) == 7


@pytest.mark.parametrize("over", [0, 1])
def test_a_row_at_the_exact_limit_is_kept_and_one_token_more_is_not(
    over: int, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """A conversation, a pair with the template's tail behind it, and a prompt of the evaluation."""
    tokenizer = load_tokenizer(str(tiny_model_dir))
    whole = encode_conversation(tokenizer, [user("q"), assistant("yes")]).input_ids
    limit = len(whole) - over
    kept = {"messages": [user("q"), assistant("y")]}
    talks = talk(tmp_path / "a", tiny_model_dir, [{"messages": [user("q"), assistant("yes")]}, kept], max_length=limit)
    assert talks.dropped["train"] == ({} if not over else {"too long": 1})

    tail = len(tail_ids(tokenizer))
    assert tail == 1
    two = [pair("q", "yes", "no"), pair("q", "y", "n")]
    pairs = feedback(tmp_path / "b", tiny_model_dir, two, task="preferences", max_length=limit + tail, batch_size=2)
    assert pairs.dropped["train_prefs"] == ({} if not over else {"too long": 1})
    assert max(batch.tokens.input_ids.shape[1] for batch in pairs.train_dataloader()) <= limit + tail

    question = encode_conversation(tokenizer, [user("q")], add_generation_prompt=True).input_ids
    write(tmp_path / "prompts.jsonl", [{"prompt": "q"}, {"prompt": ""}])
    options = {"tokenizer": tokenizer, "count": 1, "max_length": len(question) - over}
    (prompt,) = load_prompts(str(tmp_path / "prompts.jsonl"), "any", **options)
    assert prompt.messages == [user("" if over else "q")]


@encoding.giving(Features({"doubled": IDS}))
def noted(rows: list[dict[str, Any]], indices: list[int], *, notes: str) -> dict[str, list[Any]]:
    """An encoder that says which rows it was given, and that is stopped once."""
    numbers = [row["n"] for row in rows]
    if 6 in numbers and not Path(notes, "stopped").exists():
        Path(notes, "stopped").touch()
        raise KeyboardInterrupt
    with Path(notes, "rows").open("a") as file:
        file.write("".join(f"{number} " for number in numbers))
    return {"doubled": [[] if number < 4 else [2 * number] for number in numbers]}


def test_a_tokenisation_that_was_stopped_goes_on_with_the_part_it_was_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "ROWS_PER_PART", 4)
    write(tmp_path / "rows.jsonl", [{"n": n} for n in range(10)])
    rows = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path))

    def encoded() -> list[list[int]]:
        found = encoding.encode_rows(rows, noted, title="noting", notes=str(tmp_path))
        return list(found["doubled"])

    with pytest.raises(KeyboardInterrupt):
        encoded()
    expected = [[] if n < 4 else [2 * n] for n in range(10)]
    assert encoded() == expected, "also where the first part has nothing that tells its type"
    assert encoded() == expected
    assert (tmp_path / "rows").read_text() == "0 1 2 3 4 5 6 7 8 9 ", "no part that was whole is encoded again"


def test_what_was_trained_on_has_a_digest_of_its_content(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Whatever the files are called and whenever they were written; a token more or a row elsewhere changes it."""
    rows = [{"messages": [user(f"{i}"), assistant("a" * (i + 1))]} for i in range(4)]
    changed = [*rows[:3], {"messages": [user("3"), assistant("aaab")]}]
    found = [
        talk(tmp_path / str(number), tiny_model_dir, content).digests()["train"]
        for number, content in enumerate((rows, rows, changed, rows[::-1]))
    ]
    assert found[0] == found[1]
    assert len(set(found)) == 3
