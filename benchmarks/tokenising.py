"""How long it takes to tokenise a split, beside ``datasets`` alone: ``python -m benchmarks.tokenising``.

The yardstick is ``Dataset.map`` over the same rows with the same tokenizer and chat template, on as many processes,
with nothing done but to render each conversation and tokenise it once: no mask, no check. The rows of ``--rows`` (a
file of conversations) are repeated, each marked, up to ``--count``. The caches are of the run alone.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets

from datamodules import CustomDataModule
from datamodules.base import cores
from datamodules.chat import load_tokenizer


def plain(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Token ids of a conversation, and nothing else."""
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}


def write_rows(source: str, count: int, file: Path) -> None:
    """Repeat conversations, each with its number in its first turn, so that none is in a cache for another."""
    rows = datasets.load_dataset("parquet", data_files=source, split="train").to_list()
    with file.open("w") as lines:
        for number in range(count):
            first, *others = rows[number % len(rows)]["messages"]
            messages = [{**first, "content": f"{number} {first['content']}"}, *others]
            lines.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    """Measure both in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", required=True, help="a parquet file with messages")
    parser.add_argument("--tokenizer", required=True, help="a model's directory")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    print("| round | suite, s | datasets alone, s | ratio |\n|---|---|---|---|")
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as directory:
            datasets.config.HF_DATASETS_CACHE = Path(directory) / "cache"
            file = Path(directory) / "rows.jsonl"
            write_rows(options.rows, options.count, file)
            data = CustomDataModule(str(file), "conversations", model_name=options.tokenizer, max_length=1_024)
            data.tokenizer = tokenizer
            rows = data.load("train")
            began = time.perf_counter()
            data.encode("train")
            ours = time.perf_counter() - began
            began = time.perf_counter()
            rows.map(plain, fn_kwargs={"tokenizer": tokenizer}, num_proc=cores(), remove_columns=rows.column_names)
            theirs = time.perf_counter() - began
            print(f"| {number + 1} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
