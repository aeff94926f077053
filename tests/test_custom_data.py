"""One's own rows in every usual format: the same tokens and masks as the same rows as messages; splits; refusals."""

import bz2
import csv
import gzip
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from core.errors import ConfigurationError
from datamodules import CustomDataModule, UltraFeedbackDataModule, source
from datamodules.chat import load_tokenizer
from datamodules.encoders import prompt_key
from datamodules.formats import FORMATS, common_beginning, find_format, read_pair, read_transcript
from datamodules.messages import UnusableRowError
from datamodules.prompts import load_prompts
from tests.command_line import Cli, assert_refused

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Row:
    return {"role": "assistant", "content": text, **more}


def write(file: Path, rows: list[Row]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        with file.open("w", encoding="utf-8", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def encoded(name: str, task: str, model: str, *, training: bool = True, **options: Any) -> Dataset:
    module = CustomDataModule(name, task, model_name=model, max_length=4_000, **options)  # type: ignore[arg-type]
    module.setup("fit")
    return module._splits[module.train_split if training else module.validation_split]


def single(row: Row) -> bool:
    return [turn["role"] for turn in row["messages"]] == ["user", "assistant"]


AS_CONVERSATION: dict[str, Callable[[Row], Row]] = {
    "messages": lambda row: {"messages": row["messages"]},
    "messages as JSON": lambda row: {"messages": json.dumps(row["messages"])},
    "messages in parts": lambda row: {
        "messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in row["messages"]]
    },
    "prompt + completion, messages": lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
    "prompt + completion, text": lambda row: {
        "prompt": row["messages"][0]["content"],
        "completion": row["messages"][1]["content"],
    },
    "Alpaca": lambda row: {
        "instruction": row["messages"][0]["content"],
        "input": "",
        "output": row["messages"][1]["content"],
    },
    "ShareGPT": lambda row: {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]}
            for turn in row["messages"]
        ]
    },
    "chosen + rejected": lambda row: {"chosen": row["messages"], "rejected": [*row["messages"][:-1], assistant("no")]},
}
OF_ONE_TURN = ("prompt + completion, text", "Alpaca")

AS_PAIR: dict[str, Callable[[Row], Row]] = {
    "with its prompt": lambda row: {"chosen": row["chosen"], "rejected": row["rejected"]},
    "with its prompt, and it as text": lambda row: {
        "prompt": row["chosen"][0]["content"],
        "chosen": row["chosen"],
        "rejected": row["rejected"],
    },
    "beside its prompt, messages": lambda row: {
        "prompt": row["chosen"][:-1],
        "chosen": row["chosen"][-1:],
        "rejected": row["rejected"][-1:],
    },
    "beside its prompt, text": lambda row: {
        "prompt": row["chosen"][0]["content"],
        "chosen": row["chosen"][-1]["content"],
        "rejected": row["rejected"][-1]["content"],
    },
    "text with its prompt": lambda row: {
        "prompt": row["chosen"][0]["content"],
        "chosen": row["chosen"][0]["content"] + "\n" + row["chosen"][-1]["content"],
        "rejected": row["chosen"][0]["content"] + "\n" + row["rejected"][-1]["content"],
    },
    "transcripts": lambda row: {
        side: f"\n\nHuman: {row[side][0]['content']}\n\nAssistant: {row[side][-1]['content']}"
        for side in ("chosen", "rejected")
    },
}


@pytest.fixture(scope="module")
def qwen(real_data: Path) -> str:
    return str(real_data / "qwen2.5-tokenizer")


@pytest.fixture(scope="module")
def talks(real_data: Path) -> list[Row]:
    rows = load_dataset("parquet", data_files=str(next((real_data / "smol-smoltalk").rglob("test*.parquet"))))["train"]
    found = [{"messages": row["messages"]} for row in rows]
    return [*filter(single, found)][:20] + [row for row in found if not single(row)][:10]


@pytest.fixture(scope="module")
def pairs(real_data: Path) -> list[Row]:
    rows = load_dataset("parquet", data_files=str(next((real_data / "ultrafeedback").rglob("test*.parquet"))))["train"]
    texts = [row for row in rows if all(text(row[side]) for side in ("chosen", "rejected"))]
    return [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in texts][:20]


def text(messages: list[Row]) -> bool:
    """Whether it survives being written as a transcript."""
    return all(turn["content"].strip() == turn["content"] != "" for turn in messages)


@pytest.mark.parametrize("form", AS_CONVERSATION)
def test_a_conversation_is_learned_alike_in_every_format(
    form: str, talks: list[Row], tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows = [row for row in talks if single(row)] if form in OF_ONE_TURN else talks
    plain = write(tmp_path / "messages.jsonl", rows)
    suffix = ".parquet" if form in ("ShareGPT", "prompt + completion, messages") else ".json"
    other = write(tmp_path / f"other{suffix}", [AS_CONVERSATION[form](row) for row in rows])
    for task in ("conversations", "prompts"):
        expected = encoded(plain, task, str(tiny_model_dir))
        assert encoded(other, task, str(tiny_model_dir))[:] == expected[:]
        assert len(expected) >= 18


def test_the_supervised_text_is_what_the_assistant_says(talks: list[Row], qwen: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(qwen)
    rows = [AS_CONVERSATION["ShareGPT"](row) for row in talks]
    found = encoded(write(tmp_path / "rows.jsonl", rows), "conversations", qwen)
    learned = [
        tokenizer.decode(
            [token for token, counts in zip(row["input_ids"], row["completion_mask"], strict=True) if counts]
        )
        for row in found
    ]
    said = {
        "".join(turn["content"] + "<|im_end|>" for turn in row["messages"] if turn["role"] == "assistant")
        for row in talks
    }
    assert set(learned) <= said
    assert len(learned) == 28


@pytest.mark.parametrize("form", AS_PAIR)
def test_a_pair_is_learned_alike_in_every_format(
    form: str, pairs: list[Row], tiny_model_dir: Path, tmp_path: Path
) -> None:
    plain = write(tmp_path / "plain.jsonl", pairs)
    other = write(tmp_path / "other.jsonl", [AS_PAIR[form](row) for row in pairs])
    for task in ("preferences", "conversations", "prompts"):
        assert encoded(other, task, str(tiny_model_dir))[:] == encoded(plain, task, str(tiny_model_dir))[:]


def test_published_data_modules_read_text_and_triples_too(
    pairs: list[Row], tiny_model_dir: Path, tmp_path: Path
) -> None:
    def found(form: str) -> Dataset:
        for split in ("train_prefs", "test_prefs"):
            write(tmp_path / form / f"{split}.jsonl", [AS_PAIR[form](row) for row in pairs])
        module = UltraFeedbackDataModule(str(tmp_path / form), model_name=str(tiny_model_dir), max_length=4_000)
        module.setup("fit")
        assert not module.dropped["train_prefs"]["malformed"]
        return module._splits["train_prefs"]

    for form in ("beside its prompt, text", "beside its prompt, messages"):
        assert found(form)[:] == found("with its prompt")[:]


def test_the_common_beginning_of_a_pair_ends_with_a_word() -> None:
    assert common_beginning("Is it so? It is", "Is it so? It isn't") == "Is it so? It"
    assert common_beginning("Why? Thus.", "Why? Then.") == "Why?"
    with pytest.raises(UnusableRowError, match="no common prompt"):
        common_beginning("yes", "yet")
    chosen, rejected = read_pair({"chosen": "Why? Thus.", "rejected": "Why? Then."})
    assert chosen == [user("Why?"), assistant("Thus.")]
    assert rejected == [user("Why?"), assistant("Then.")]


def test_a_transcript_has_a_turn_for_each_speaker() -> None:
    told = "\n\nHuman: Hi\n\nthere Human: x\n\nAssistant: Yo.\n\nHuman: Bye\n\nAssistant: Bye."
    assert read_transcript(told) == [
        user("Hi\n\nthere Human: x"),
        assistant("Yo."),
        user("Bye"),
        assistant("Bye."),
    ]


def test_a_side_of_another_prompt_is_dropped() -> None:
    row = {"prompt": [user("a")], "chosen": [user("b"), assistant("x")], "rejected": [user("b"), assistant("y")]}
    with pytest.raises(UnusableRowError, match="another prompt"):
        read_pair(row)


@pytest.mark.parametrize("with_system", ["prompt", "side"])
def test_a_system_turn_on_one_side_alone_is_kept(with_system: str) -> None:
    system, asked, answer = {"role": "system", "content": "s"}, user("a"), assistant("x")
    prompt = [system, asked] if with_system == "prompt" else [asked]
    side = [asked, answer] if with_system == "prompt" else [system, asked, answer]
    assert read_pair({"prompt": prompt, "chosen": side, "rejected": side})[0] == [system, asked, answer]


def test_an_instruction_stands_above_its_input(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": f"{i} + 1", "output": i + 1, "system": "Brief."} for i in range(4)]
    found = encoded(write(tmp_path / "rows.jsonl", rows), "prompts", str(tiny_model_dir))
    assert found[0]["messages"][0] == {"role": "system", "content": "Brief."}
    assert {row["messages"][1]["content"] for row in found} < {f"Add.\n\n{i} + 1" for i in range(4)}


def test_a_table_of_text_stays_text(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    rows = [{"prompt": f"number {i}", "completion": answer} for i, answer in enumerate(["007", "null", "NA", "1.0"])]
    found = encoded(write(tmp_path / "rows.csv", rows), "conversations", str(tiny_model_dir), validation_share=0.25)
    texts = {tokenizer.decode(row["input_ids"]).split("<|im_start|>assistant\n")[1] for row in found}
    assert len(texts) == 3
    assert texts < {f"{row['completion']}<|im_end|>" for row in rows}


def test_columns_are_renamed_and_a_system_turn_added(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": f"a{i}", "prompt": "something else"} for i in range(10)]
    name = write(tmp_path / "rows.jsonl", rows)
    options: dict[str, Any] = {"columns": {"prompt": "question", "completion": "answer"}, "system": "Be kind."}
    found = encoded(name, "prompts", str(tiny_model_dir), **options)
    asked = {row["messages"][1]["content"] for row in found}
    assert asked < {f"q{i}" for i in range(10)}
    assert all(row["messages"][0] == {"role": "system", "content": "Be kind."} for row in found)
    module = CustomDataModule(name, "conversations", model_name=str(tiny_model_dir), **options)
    prompts = load_prompts(
        name,
        "any",
        tokenizer=load_tokenizer(str(tiny_model_dir)),
        count=10,
        max_length=100,
        held_out=module.prompt_rows("any"),
    )
    assert {prompt.messages[1]["content"] for prompt in prompts}.isdisjoint(asked)
    assert prompts[0].messages[0]["content"] == "Be kind."


@pytest.mark.filterwarnings("ignore")
def test_prompts_of_the_evaluation_may_stand_in_a_column_of_any_name(config: Any, tmp_path: Path, cli: Cli) -> None:
    rows = [{"question": f"q{i}", "answer": f"a{i}", "prompt": i} for i in range(5)]
    path = config("SFTModule", evaluation={"dataset_name": write(tmp_path / "rows.csv", rows)})
    assert cli("fit", "--config", path, "--evaluation.columns", "{prompt: question}").returncode == 0
    pairs = (tmp_path / "run" / "eval" / "epoch=0" / "pairs.jsonl").read_text().splitlines()
    asked = [json.loads(pair)["prompt"][0]["content"] for pair in pairs]
    assert asked == [f"q{i}" for i in range(4)]
    renamed = write(tmp_path / "others.csv", [{"question": "q"}])
    wrong = ["--evaluation.dataset_name", renamed, "--overwrite", "true"]
    assert_refused(cli("fit", "--config", path, *wrong), "perhaps with evaluation.columns {prompt: question}")
    missing = [*wrong, "--evaluation.columns", "{prompt: nothing}"]
    assert_refused(cli("fit", "--config", path, *missing), "lacks the columns ['nothing']")
    own = yaml.safe_load(Path(path).read_text())["data"]["init_args"]["dataset_name"]
    trained_on = ["--evaluation.dataset_name", own, "--evaluation.columns", "{prompt: question}", "--overwrite", "true"]
    assert_refused(cli("fit", "--config", path, *trained_on), "which is trained on: unset evaluation.columns")


def test_plain_text_is_learned_whole_and_long_text_in_pieces(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    name = write(tmp_path / "rows.jsonl", [{"text": letter * 9} for letter in "abcdef"] + [{"text": " "}])
    module = CustomDataModule(name, "conversations", model_name=str(tiny_model_dir), max_length=4, validation_share=0.3)
    module.setup("fit")
    found = module._splits["train"]
    texts = [tokenizer.decode(row["input_ids"]) for row in found]
    assert len(texts) == 3 * len({letter[0] for letter in texts})
    assert texts[:3] == [texts[0][0] * 4, texts[0][0] * 4, texts[0][0] + "<|endoftext|>"]
    assert all(row["completion_mask"] == [False] + [True] * (len(row["input_ids"]) - 1) for row in found)


@pytest.mark.parametrize(
    ("row", "task", "told"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, "conversations", "unpaired answers.*make pairs"),
        ({"question": "a", "answer": "b"}, "conversations", "of no format.*prompt: question, completion: answer"),
        ({"prompt": "a"}, "conversations", "rows of prompt, which serve prompts and no conversations"),
        ({"messages": [user("a"), assistant("b")]}, "preferences", "serve conversations, prompts and no preferences"),
        ({"text": "a"}, "prompts", "rows of text, which serve conversations and no prompts"),
    ],
)
def test_rows_that_do_not_serve_the_task_are_refused(
    row: Row, task: str, told: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=told):
        encoded(write(tmp_path / "rows.jsonl", [row] * 3), task, str(tiny_model_dir))


@pytest.mark.parametrize("nothing", [0, 0.0, False])
def test_an_answer_of_weight_0_is_context(nothing: float, tiny_model_dir: Path, tmp_path: Path) -> None:
    """As OpenAI's rows have it; the others are learned, whether they have a weight or none."""
    tokenizer = load_tokenizer(str(tiny_model_dir))
    turns = [user("a"), assistant("bad", weight=nothing), user("b"), assistant("good", weight=1), user("c")]
    rows = [{"messages": [*turns, assistant("fine")]}, {"messages": turns[:2]}] * 2
    write(tmp_path / "test.jsonl", rows)
    module = CustomDataModule(
        str(Path(write(tmp_path / "train.jsonl", rows)).parent), "conversations", model_name=str(tiny_model_dir)
    )
    module.setup("fit")
    assert module.dropped["train"] == {"no supervised token": 2}
    for row in module._splits["train"]:
        pairs = list(zip(row["input_ids"], row["completion_mask"], strict=True))
        assert tokenizer.decode([token for token, counts in pairs if counts]) == "good<|im_end|>fine<|im_end|>"
        assert "assistant\nbad<|im_end|>" in tokenizer.decode(row["input_ids"])


def rows_of(count: int, first: int = 0) -> list[Row]:
    return [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(first, first + count)]


def test_a_share_is_held_out_by_the_seed_and_no_row_is_in_both(tiny_model_dir: Path, tmp_path: Path) -> None:
    name, model = write(tmp_path / "rows.jsonl", rows_of(40)), str(tiny_model_dir)

    def asked(**options: Any) -> set[str]:
        return {row["messages"][0]["content"] for row in encoded(name, "prompts", model, **options)}

    held_out = asked(training=False, validation_share=0.25)
    assert len(held_out) == 10
    assert held_out.isdisjoint(asked(validation_share=0.25))
    assert held_out | asked(validation_share=0.25) == {f"q{i}" for i in range(40)}
    assert held_out == asked(training=False, validation_share=0.25)
    assert held_out != asked(training=False, validation_share=0.25, split_seed=1)


def compressed(opener: Callable[..., Any], name: str) -> Callable[[Path, list[Row]], Path]:
    def written(directory: Path, rows: list[Row]) -> Path:
        with opener(directory / name, "wt", encoding="utf-8") as file:
            file.write(Path(write(directory / name.rpartition(".")[0], rows)).read_text("utf-8"))
        (directory / name.rpartition(".")[0]).unlink()
        return directory / name

    return written


def tabulated(directory: Path, rows: list[Row]) -> Path:
    lines = ["prompt\tcompletion", *(f"{row['prompt']}\t{row['completion']}" for row in rows)]
    (directory / "rows.tsv").write_text("\n".join(lines) + "\n")
    return directory / "rows.tsv"


def saved(directory: Path, rows: list[Row], num_shards: int = 2) -> Path:
    Dataset.from_list(rows).save_to_disk(directory / "saved", num_shards=num_shards)
    return directory / "saved"


LAYOUTS: dict[str, Callable[[Path, list[Row]], Path]] = {
    "JSON": lambda directory, rows: Path(write(directory / "rows.json", rows)),
    "gzip": compressed(gzip.open, "rows.jsonl.gz"),
    "bzip2": compressed(bz2.open, "rows.csv.bz2"),
    "xz": compressed(lzma.open, "rows.json.xz"),
    "TSV": tabulated,
    "save_to_disk": saved,
    "Arrow": lambda directory, rows: saved(directory, rows, num_shards=1) / "data-00000-of-00001.arrow",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_rows_are_read_however_they_are_kept(layout: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    expected = encoded(write(tmp_path / "plain.jsonl", rows_of(20)), "conversations", str(tiny_model_dir))
    found = encoded(str(LAYOUTS[layout](tmp_path, rows_of(20))), "conversations", str(tiny_model_dir))
    assert found[:] == expected[:]


@pytest.mark.parametrize("kept", ["saved", "compressed"])
def test_splits_are_found_however_they_are_kept(kept: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    rows, model = {"train": rows_of(5), "test": rows_of(3, first=5)}, str(tiny_model_dir)
    if kept == "saved":
        DatasetDict({name: Dataset.from_list(each) for name, each in rows.items()}).save_to_disk(tmp_path / "rows")
    else:
        (tmp_path / "rows").mkdir()
        for name, each in rows.items():
            compressed(gzip.open, f"{name}-00000-of-00001.jsonl.gz")(tmp_path / "rows", each)
    before = sorted(tmp_path.rglob("*"))
    assert len(encoded(str(tmp_path / "rows"), "prompts", model)) == 5
    assert len(encoded(str(tmp_path / "rows"), "prompts", model, training=False)) == 3
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written beside one's rows"


def test_a_broken_file_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    whole = LAYOUTS["gzip"](tmp_path, rows_of(500)).read_bytes()
    for content in (whole[: len(whole) // 2], b"no gzip", whole[:20] + b"xxxx" + whole[24:]):
        (tmp_path / "rows.jsonl.gz").write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"rows\.jsonl\.gz .*; change data.dataset_name"):
            encoded(str(tmp_path / "rows.jsonl.gz"), "prompts", str(tiny_model_dir))


def test_a_saved_dataset_without_one_of_its_files_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = saved(tmp_path, rows_of(20))
    max(directory.glob("*.arrow")).unlink()
    with pytest.raises(ConfigurationError, match=r"data-00001-of-00002\.arrow.*; change data.dataset_name"):
        encoded(str(directory), "prompts", str(tiny_model_dir))


def test_rows_within_something_else_are_no_rows(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({"data": rows_of(3)}))
    with pytest.raises(ConfigurationError, match=r"has one row, with the columns \['data'\], and none to hold out"):
        encoded(str(tmp_path / "rows.json"), "prompts", str(tiny_model_dir))


def test_a_subset_of_a_hub_dataset_is_named_behind_a_colon(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def load(name: str, subset: str | None = None, split: str = "") -> Dataset:
        asked.append((name, subset))
        if subset is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nE")
        return Dataset.from_list(rows_of(5 if split == "train" else 2))

    monkeypatch.setattr(source, "load_dataset", load)
    monkeypatch.setattr(source, "get_dataset_split_names", lambda *name: load(*name) and ["train", "test"])
    assert len(encoded("some/rows:hard", "prompts", str(tiny_model_dir))) == 5
    assert set(asked) == {("some/rows", "hard")}
    with pytest.raises(ConfigurationError, match=r"\['a', 'b'\]; name one in data.dataset_name: some/rows:SUBSET"):
        encoded("some/rows", "prompts", str(tiny_model_dir))


def test_what_is_no_text_is_told_from_what_is_malformed(tiny_model_dir: Path, tmp_path: Path) -> None:
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]
    rows = [{"messages": json.dumps([user("a"), assistant("b")])}] * 4
    rows += [{"messages": json.dumps([{"role": "user", "content": parts}, assistant("b")])}]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", rows)
    module = CustomDataModule(str(tmp_path), "conversations", model_name=str(tiny_model_dir))
    module.setup("fit")
    assert module.dropped["train"] == {"content in parts that are not text": 1}


@pytest.mark.parametrize("validation", ["validation", "dev", "test"])
def test_a_split_of_a_usual_name_is_the_validation(validation: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00001.jsonl", rows_of(5))
    write(tmp_path / "data" / f"{validation}-00000-of-00001.jsonl", rows_of(3, first=5))
    model = str(tiny_model_dir)
    assert len(encoded(str(tmp_path), "prompts", model)) == 5
    assert len(encoded(str(tmp_path), "prompts", model, training=False)) == 3


def test_splits_that_are_not_there_are_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    for split in ("first", "second"):
        write(tmp_path / f"{split}.jsonl", rows_of(5))
    model = str(tiny_model_dir)
    with pytest.raises(ConfigurationError, match=r"\['first', 'second'\] and no 'train'.*data.train_split"):
        encoded(str(tmp_path), "prompts", model)
    with pytest.raises(ConfigurationError, match=r"no 'third'; change data\.validation_split"):
        encoded(str(tmp_path), "prompts", model, train_split="first", validation_split="third")
    assert len(encoded(str(tmp_path), "prompts", model, train_split="second", validation_split="first")) == 5


@pytest.mark.parametrize("leave_out", [True, False])
def test_training_rows_with_a_held_out_prompt_are_counted_and_left_out_on_demand(
    leave_out: bool, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    rows = [{"prompt": [{"role": "system", "content": "s"}, user("Q1  ")], "completion": [assistant("b")]}]
    rows += [{"prompt": [user(f"q{i}")], "completion": [assistant("a")]} for i in range(3)]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", [{"prompt": [user("q1")], "completion": [assistant("c")]}])
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        found = encoded(str(tmp_path), "conversations", str(tiny_model_dir), decontaminate=leave_out)
    assert len(found) == (2 if leave_out else 4)
    assert "2 of 4 training rows have a held-out prompt" in caplog.text


def test_a_prompt_is_told_by_its_words_and_who_said_what_counts_in_order() -> None:
    assert prompt_key([user("A  b")]) == prompt_key([{"role": "system", "content": "s"}, user(" a B\n")])
    assert prompt_key([user("a"), assistant("b"), user("c")]) != prompt_key([user("a"), assistant("c"), user("b")])
    assert prompt_key([user("a b")]) != prompt_key([user("ab")])


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
WITH_TOOLS = [
    user("How is it in Rome?"),
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "name": "weather", "content": "sunny, 31 degrees"},
    assistant("Sunny."),
]


@pytest.fixture(scope="module")
def qwen_instruct(real_data: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(
        str(real_data / "qwen2.5-tokenizer"),
        chat_template=str(real_data / "qwen2.5-tokenizer" / "instruct_chat_template.jinja"),
    )


@pytest.mark.parametrize("as_json", [False, True])
def test_what_a_tool_gave_is_context_and_what_is_called_is_learned(
    as_json: bool, real_data: Path, qwen_instruct: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    call = {"function": {"name": "weather", "arguments": json.dumps({"city": "Rome"})}}
    turns = [WITH_TOOLS[0], assistant("", tool_calls=[call]), *WITH_TOOLS[2:]] if as_json else WITH_TOOLS
    tools: Any = json.dumps([TOOL]) if as_json else [TOOL]
    rows = [{"messages": turns, "tools": tools}] * 2 + [{"messages": [user("Hi"), assistant("Yo")], "tools": None}] * 2
    found = encoded(
        write(tmp_path / "rows.jsonl", rows),
        "conversations",
        str(real_data / "qwen2.5-tokenizer"),
        chat_template=str(real_data / "qwen2.5-tokenizer" / "instruct_chat_template.jinja"),
        validation_share=0.25,
    )
    row = max(found, key=lambda row: len(row["input_ids"]))
    ids, mask = row["input_ids"], row["completion_mask"]
    learned = qwen_instruct.decode([token for token, counts in zip(ids, mask, strict=True) if counts])
    given = qwen_instruct.decode([token for token, counts in zip(ids, mask, strict=True) if not counts])
    call_text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    assert learned == f"{call_text}<|im_end|>Sunny.<|im_end|>"
    assert "sunny, 31 degrees" in given
    assert "Of a city." in given
    whole = qwen_instruct.apply_chat_template(WITH_TOOLS, tools=[TOOL], tokenize=False)
    assert qwen_instruct.decode(ids) + "\n" == whole


def test_rows_whose_tools_the_template_does_not_show_are_dropped(tiny_model_dir: Path, tmp_path: Path) -> None:
    plain = {"messages": [user("Hi"), assistant("Yo")]}
    results = {"messages": [user("Hi"), assistant("calling"), {"role": "tool", "content": "9"}, assistant("Yo")]}
    name = write(tmp_path / "train.jsonl", [plain, results, {"messages": WITH_TOOLS}])
    write(tmp_path / "test.jsonl", [plain])
    module = CustomDataModule(str(tmp_path), "conversations", model_name=str(tiny_model_dir))
    module.setup("fit")  # ChatML shows the turns of any role, and no calls
    assert module.dropped["train"] == {"tool turns that the chat template does not know": 1}
    without = tmp_path / "no_tools.jinja"
    without.write_text(
        "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    module = CustomDataModule(
        str(tmp_path), "conversations", model_name=str(tiny_model_dir), chat_template=str(without)
    )
    module.setup("fit")
    assert module.dropped["train"] == {"tool turns that the chat template does not know": 2}
    assert name


def test_every_format_is_named_with_what_tells_it() -> None:
    assert len({form.columns for form in FORMATS}) == len(FORMATS)
    for form in FORMATS:
        assert all(column in form.name for column in form.columns)


METHODS = {"SFTModule": "conversations", "DPOModule": "preferences", "RLOOModule": "prompts"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "method"),
    [
        *((form, "SFTModule") for form in ("Alpaca", "ShareGPT", "text")),
        *((form, "DPOModule") for form in ("beside its prompt, text", "transcripts")),
        *((form, "RLOOModule") for form in ("prompt", "beside its prompt, messages")),
        ("prompt", "SFTModule"),
        ("text", "RLOOModule"),
    ],
)
def test_each_format_trains_the_methods_that_it_serves(
    form: str, method: str, talks: list[Row], pairs: list[Row], config: Any, cli: Cli, tmp_path: Path
) -> None:
    content = yaml.safe_load(Path(config(method, evaluation={"num_prompts": 0})).read_text())
    model = tmp_path / "model"  # that reads longer rows than the tests' own need
    shutil.copytree(content["model"]["init_args"]["model_name"], model)
    details = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(details | {"max_position_embeddings": 8_192}))
    content["model"]["init_args"]["model_name"] = str(model)
    alone = {"prompt": lambda row: {"prompt": row["messages"][:-1]}, "text": lambda row: {"text": str(row)}}
    make = (AS_CONVERSATION | AS_PAIR | alone)[form]
    rows = [make(row) for row in (pairs if form in AS_PAIR else filter(single, talks))][:20]
    task = METHODS[method]
    served = find_format(list(rows[0]), source="rows").readers
    options = {"dataset_name": write(tmp_path / "rows.jsonl", rows), "task": task, "max_length": 4_000}
    content["data"] = {"class_path": "datamodules.CustomDataModule", "init_args": options}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(content))
    result = cli("fit", "--config", str(file), "--trainer.limit_train_batches", "2", "--trainer.log_every_n_steps", "1")
    if task in served:
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    else:
        assert_refused(result, f"and no {task}; change data.task or data.dataset_name")
