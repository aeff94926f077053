"""How long it takes to tokenise a split, beside ``datasets`` alone: ``python -m benchmarks.tokenising``.

The yardsticks are ``Dataset.map`` over the same rows with the same tokenizer and chat template, on as many processes:
with transformers' own mask of what an assistant says, for which the template has marks, row by row and in batches; and
with nothing but rendering and tokenising each conversation, without a mask or a check. The rows of ``--rows`` (a file
of conversations) are repeated, each marked, up to ``--count``. The caches are of the run alone.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import datasets

from datamodules import CustomDataModule
from datamodules.chat import load_tokenizer
from datamodules.encoding import cores

TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == "assistant" -%}
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
{% else -%}
{{ message.content }}<|im_end|>
{% endif -%}
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""ChatML with the marks by which transformers finds what an assistant says."""


def masked(rows: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Token ids of a conversation, or of those of a batch, and transformers' mask."""
    found = tokenizer.apply_chat_template(rows["messages"], return_dict=True, return_assistant_tokens_mask=True)
    return {"input_ids": found["input_ids"], "completion_mask": found["assistant_masks"]}


def plain(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Token ids of a conversation, and nothing else."""
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}


YARDSTICKS: dict[str, dict[str, Any]] = {
    "mask": {"function": masked},
    "mask in batches": {"function": masked, "batched": True},
    "ids alone": {"function": plain},
}


def write_rows(source: str, count: int, file: Path) -> None:
    """Repeat conversations, each with its number in its first turn, so that none is in a cache for another."""
    rows = datasets.load_dataset("parquet", data_files=source, split="train").to_list()
    with file.open("w") as lines:
        for number in range(count):
            first, *others = rows[number % len(rows)]["messages"]
            messages = [{**first, "content": f"{number} {first['content']}"}, *others]
            lines.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    """Measure all in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", required=True, help="a parquet file with messages")
    parser.add_argument("--tokenizer", required=True, help="a model's directory")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    heads = [
        "round",
        "suite, s",
        *(f"{name}, s" for name in YARDSTICKS),
        *(f"suite over {name}" for name in YARDSTICKS),
    ]
    print(f"| {' | '.join(heads)} |\n|" + "---|" * len(heads))
    ratios: list[list[float]] = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as directory:
            datasets.config.HF_DATASETS_CACHE = Path(directory) / "cache"
            file, template = Path(directory) / "rows.jsonl", Path(directory) / "marked.jinja"
            write_rows(options.rows, options.count, file)
            template.write_text(TEMPLATE)
            limits: dict[str, Any] = {"max_length": 1_024, "chat_template": str(template)}
            data = CustomDataModule(str(file), "conversations", model_name=options.tokenizer, **limits)
            data.tokenizer = load_tokenizer(options.tokenizer, chat_template=str(template))
            rows = data.load("train")
            how: dict[str, Any] = {"num_proc": cores(), "remove_columns": rows.column_names}
            how["fn_kwargs"] = {"tokenizer": data.tokenizer}
            ours = seconds(lambda data=data: data.encode("train"))
            theirs = [
                seconds(lambda one=one, rows=rows, how=how: rows.map(**one, **how)) for one in YARDSTICKS.values()
            ]
            ratios.append([ours / other for other in theirs])
            print(row(f"{number + 1} | {ours:.1f}", [f"{other:.1f}" for other in theirs], ratios[-1]), flush=True)
    print(row("median | ", [""] * len(YARDSTICKS), [median(each) for each in zip(*ratios, strict=True)]))


def row(first: str, figures: list[str], ratios: list[float]) -> str:
    """Of the table."""
    return f"| {' | '.join([first, *figures, *(f'{ratio:.2f}' for ratio in ratios)])} |"


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
