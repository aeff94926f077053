"""The benchmarks measure what they say: same tokens, full lengths, operations counted right, ratios by round."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.meter import CLEAR_REFS, Meter
from benchmarks.shapes import SHAPES, SPECIAL_TOKENS, Segment, save_model
from benchmarks.table import comparison, growth
from benchmarks.workloads import SUPERVISED_SHARE, Size, make
from datamodules.chat import encode_conversation, load_tokenizer
from datamodules.encoders import encode_conversation_rows, encode_preference_rows, encode_prompt_rows
from datamodules.formats import Read, read_messages, read_pair

SHAPE = SHAPES["tiny"]
SIZE = Size(tokens=2_000, length=8, row_length=8)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shape")
    save_model(SHAPE, directory)
    return directory


def test_an_sft_step_has_the_tokens_it_counts(model_dir: Path) -> None:
    work = make("sft", SHAPE, SIZE)
    options = {"read": read_messages, "tokenizer": load_tokenizer(str(model_dir)), "max_length": 10_000}
    rows = encode_conversation_rows(work.rows, range(len(work.rows)), **options)
    assert sum(map(len, rows["input_ids"])) == work.units
    supervised = sum(map(sum, rows["completion_mask"]))
    assert supervised / work.units == pytest.approx(SUPERVISED_SHARE, abs=0.01)


def test_a_dpo_step_counts_a_prompt_for_both_answers(model_dir: Path) -> None:
    work = make("dpo", SHAPE, SIZE)
    options = {"read": read_pair, "tokenizer": load_tokenizer(str(model_dir)), "max_length": 10_000}
    rows = encode_preference_rows(work.rows, range(len(work.rows)), **options)
    tokens = {name: sum(map(len, rows[name])) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    assert 2 * tokens["prompt_ids"] + tokens["chosen_ids"] + tokens["rejected_ids"] == work.units


def test_prompts_have_the_tokens_that_the_operations_are_counted_for(model_dir: Path) -> None:
    tokenizer = load_tokenizer(str(model_dir))
    options = {"read": Read(read_messages, prompt=True), "tokenizer": tokenizer, "max_length": 10_000}
    rows = make("rloo", SHAPE, SIZE).rows
    lengths = list(map(len, encode_prompt_rows(rows, range(len(rows)), **options)["prompt_ids"]))
    whole = [Segment(0, n + SIZE.length, 0) for n in lengths for _ in range(SIZE.samples)]
    repeated = [Segment(0, n, 0) for n in lengths for _ in range(SIZE.samples - 1)]
    heads = [Segment(0, 0, SIZE.length)] * len(whole)
    once = SHAPE.forward_flops(whole) - SHAPE.forward_flops(repeated) + SHAPE.forward_flops(heads)
    assert make("rloo", SHAPE, SIZE).flops == pytest.approx(5 * once)


def test_a_forward_pass_costs_what_torch_counts(model_dir: Path) -> None:
    """Torch counts the products with weights exactly, and attention as if every token attended to all."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.full((1, 10), 5))
    counts = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    products = counts["aten.mm"] + counts["aten.addmm"]
    attention = 4 * SHAPE.layers * SHAPE.hidden * (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 10)
    assert SHAPE.forward_flops([Segment(0, 10, 10)]) == products + attention


def test_a_sequence_costs_the_same_in_pieces() -> None:
    whole = SHAPE.forward_flops([Segment(0, 9, 4)])
    assert SHAPE.forward_flops([Segment(0, 5, 0), Segment(5, 9, 4)]) == whole


def test_no_completion_ends_before_the_limit(model_dir: Path) -> None:
    tokenizer = load_tokenizer(str(model_dir))
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    for row in make("generation", SHAPE, SIZE).rows:
        ids = encode_conversation(tokenizer, row["messages"], add_generation_prompt=True).input_ids
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        assert logits.softmax(-1)[: len(SPECIAL_TOKENS)].sum() < 1e-5
        assert logits[len(SPECIAL_TOKENS) :].std() < 1  # all other tokens stay about as likely as each other


def result(name: str, number: int, seconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "workload": "sft",
        "round": number,
        "yardstick": name == "TRL",
        "unit": "tokens",
        "units": 100,
        "tokens": 100,
        "seconds": seconds,
        "flops": 50.0,
        "matmul_flops": 100.0,
        "memory_bytes": 1.0,
        "decode_bytes": 0.0,
        "peak_mib": 10.0 if name == "suite" else 40.0,
        "foreign_cores": 0.0,
        **changes,
    }


def test_ratios_are_taken_within_a_round() -> None:
    """Speeds 100 and 25, then 20 and 10: ratios 4 and 2, median 3; half, then a tenth of the rate of a product."""
    results = [result("suite", 1, 1.0), result("TRL", 1, 4.0), result("suite", 2, 5.0), result("TRL", 2, 10.0)]
    suite, trl = comparison(results).splitlines()[2:]
    assert suite == "| suite | 60.0 (20.0 to 100.0) | 3.00 (2.00 to 4.00) | 10 | 0.25 | 30% |  | 0.00 |"
    assert trl == "| TRL | 17.5 (10.0 to 25.0) | 1 | 40 | 1.00 | 9% |  | 0.00 |"


def test_the_exponent_is_one_where_time_grows_in_proportion() -> None:
    results = [result("suite", 1, 1.0), result("suite", 1, 2.0, tokens=200), result("suite", 1, 8.0, tokens=400)]
    exponents = [line.split(" | ")[3] for line in growth("tokens", results).splitlines()[2:]]
    assert exponents == ["", "1.00", "2.00"]


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="peak memory is read from Linux's /proc")
def test_the_peak_holds_what_was_freed_after_the_start_and_nothing_from_before() -> None:
    before = torch.ones(100 * 2**18)
    del before
    meter = Meter("cpu", warm_up=1, processes=1)
    meter.start()
    meter.tick()
    during = torch.ones(40 * 2**18)
    del during
    meter.tick()
    assert 35 < meter.result()["peak_mib"] < 60
