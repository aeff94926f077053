"""``plan``: the trace against real passes, the parts by hand, steps and calls counted, what fits and what would."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from transformers import AutoConfig, AutoModelForCausalLM

from callbacks import NemotronEvaluation
from commands.plan import rounded
from commands.planning.batch import Largest, largest_batch
from commands.planning.memory import Account, Run, optimiser_bytes
from commands.planning.trace import LiveMemory, Passes, Size, trace
from datamodules import SmolTalkDataModule
from datamodules.batches import pad
from datamodules.chat import load_tokenizer
from lightning_modules import DPOModule, RLOOModule, SFTModule
from lightning_modules.forward.completions import completion_tokens
from lightning_modules.models.adapter_files import LoraOptions
from lightning_modules.models.loading import load_causal_lm
from lightning_modules.rewards.rules import brevity
from tests.command_line import Cli, assert_refused
from tests.conftest import make_tiny_model

ROWS = [[5] * 30, [6] * 21, [7] * 9]


def batch_of(rows: list[list[int]]) -> Any:
    return pad(rows, [[False] * 5 + [True] * (len(row) - 5) for row in rows], pad_token_id=0)


def test_what_stands_is_counted_while_it_stands() -> None:
    weight = torch.nn.Parameter(torch.zeros(10, 10))
    holder = torch.nn.Module()
    holder.weight = weight
    with LiveMemory(holder) as live:
        first = torch.ones(25)
        second = first.view(5, 5)
        assert live.now == (100, 100)
        del first
        assert live.now == (100, 100)  # which a view keeps
        del second
        assert live.now == (0, 0)
        kept = weight.t()
        assert live.now == (0, 0)
    assert max(live.history) == (100, 100)
    assert kept is not None


def deeper(model: Path, layers: int) -> Any:
    """A model's configuration with another number of layers."""
    kinds = ["full_attention"] * layers
    return AutoConfig.from_pretrained(model, num_hidden_layers=layers, layer_types=kinds)


@pytest.mark.parametrize("layers", [2, 5])
def test_the_trace_is_what_a_real_pass_takes(layers: int, tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    config = deeper(tmp_path, layers)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    real = load_causal_lm(str(tmp_path), load_tokenizer(str(tmp_path))).train()
    batch = batch_of(ROWS)
    completion_tokens(real, batch)  # the probe of what the model can do
    with LiveMemory(real) as live:
        loss = completion_tokens(real, batch).log_probs.sum()
        forward = max(live.history).all
        began = len(live.history)
        loss.backward()
    traced = trace(config, batch, None, Passes())
    assert traced.parameters.all == sum(parameter.numel() for parameter in real.parameters())
    assert traced.forward.all == pytest.approx(forward, rel=0.05)
    assert traced.backward.all == pytest.approx(max(live.history[began:]).all, rel=0.05)


def test_checkpointing_and_adapters_take_less(tiny_model_dir: Path) -> None:
    config = deeper(tiny_model_dir, 6)
    plain, checkpointed, adapted = (
        trace(config, batch_of(ROWS), None, how)
        for how in (Passes(), Passes(checkpointing=True), Passes(lora=LoraOptions(rank=2)))
    )
    assert checkpointed.forward.all < 0.5 * plain.forward.all
    assert adapted.trained.all < 0.5 * plain.trained.all
    assert adapted.parameters.all == plain.parameters.all + adapted.trained.all


def account(module: Any, **options: Any) -> Account:
    given: dict[str, Any] = {
        "precision": "32-true",
        "device": "cpu",
        "accumulates": False,
        "distributed": False,
        "evaluation": None,
        "batch": Largest(batch_of(ROWS), None, [5, 5, 5], 20.0, {"": 1.0}),
    }
    return Account(Run(module=module, **{**given, **options}))


def test_weights_gradients_and_the_optimiser_are_four_numbers_a_weight(tiny_model_dir: Path) -> None:
    found = account(SFTModule(str(tiny_model_dir)))
    weights = 4 * found.traced.parameters.all
    step = next(moment for moment in found.moments() if moment.name == "optimiser step").parts
    assert [step[name].all for name in ("weights", "optimiser", "gradients")] == [weights, 2 * weights, weights]
    assert account(SFTModule(str(tiny_model_dir)), distributed=True).buckets.all == weights
    assert account(SFTModule(str(tiny_model_dir)), precision="bf16-true").weights.all == weights // 2
    assert account(SFTModule(str(tiny_model_dir), lora=LoraOptions(rank=2))).optimiser.all == 8 * found_adapter(found)


def found_adapter(found: Account) -> int:
    """Weights of an adapter of rank 2 on the tiny model: 2 x (in + out) of each linear layer."""
    config = found.config
    hidden, mlp = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    widths = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, mlp)] * 3
    return int(config.num_hidden_layers * 2 * sum(map(sum, widths)))


def test_a_reference_stands_where_the_method_needs_it(tiny_model_dir: Path) -> None:
    name = str(tiny_model_dir)

    def reference(module: Any) -> set[str]:
        return {moment.name for moment in account(module).moments() if moment.parts.get("reference", Size(0)).all}

    assert reference(DPOModule(model_name=name)) == {"validation", "asking the reference"}
    assert "forward pass" in reference(DPOModule(model_name=name, precompute_reference=False))
    assert "sampling" in reference(RLOOModule(brevity, model_name=name))
    assert reference(RLOOModule(brevity, model_name=name, beta=0.0)) == set()
    assert reference(DPOModule(model_name=name, lora=LoraOptions(rank=2))) == set()


def test_the_judge_s_reference_is_a_model_more_but_where_an_adapter_is_switched_off_for_it(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    name, other = str(tiny_model_dir), tmp_path / "other"
    make_tiny_model(other)

    def compared(named: str | None, *, shards: int = 1, **options: Any) -> int:
        evaluation = NemotronEvaluation(reward=brevity, reference_model=named)
        moments = account(SFTModule(name, **options), evaluation=evaluation, shards=shards).moments()
        (moment,) = (moment for moment in moments if moment.name == "evaluation, reference")
        return moment.parts["compared with"].all

    one = 4 * account(SFTModule(name)).traced.parameters.all
    assert compared(None) == compared(name) == one
    assert compared(None, shards=4) == one // 4
    assert compared(None, lora=LoraOptions(rank=2)) == compared(name, lora=LoraOptions(rank=2)) == 0
    assert compared(str(other), lora=LoraOptions(rank=2)) == one


def test_the_samplers_cache_is_two_numbers_a_token_layer_and_width(tiny_model_dir: Path) -> None:
    module = RLOOModule(brevity, model_name=str(tiny_model_dir), samples_per_prompt=2, max_completion_length=10)
    found = account(module)
    parts = found.sampling().parts
    config = found.config
    width = config.hidden_size // config.num_attention_heads
    tokens = 3 * 2 * 128  # a row's places come in blocks of 128
    assert (
        parts["sampler's cache"].all == 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * width * tokens
    )
    assert parts["logits"].all == 3 * 4 * config.vocab_size * 6


def test_the_optimisers_own_memory_is_seen_from_a_step(tiny_model_dir: Path) -> None:
    name = str(tiny_model_dir)
    assert optimiser_bytes(SFTModule(name)) == 8.0
    assert optimiser_bytes(SFTModule(name, optimizer=torch.optim.SGD)) == 0.0
    assert optimiser_bytes(SFTModule(name, optimizer=torch.optim.Adafactor)) < 1.0


def test_the_largest_batch_is_of_the_longest_rows_a_batch_may_have(tiny_model_dir: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        turns = [("q", "y" * length) for length in (1, 50, 3, 40, 2, 60)]
        lines = [
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
            for q, a in turns
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    data = SmolTalkDataModule(str(tmp_path), model_name=str(tiny_model_dir), batch_size=2)
    found = largest_batch(data, SFTModule(str(tiny_model_dir)))
    assert found.tokens.completion_mask.sum().item() == 60 + 50 + 2
    prompts = SmolTalkDataModule(str(tmp_path), task="prompts", model_name=str(tiny_model_dir), batch_size=2)
    module = RLOOModule(brevity, model_name=str(tiny_model_dir), samples_per_prompt=3, max_completion_length=7)
    sampled = largest_batch(prompts, module)
    assert sampled.tokens.completion_mask.sum().item() == 2 * 3 * 7
    assert sampled.groups == [0, 0, 0, 1, 1, 1]


def plan(cli: Cli, *arguments: str) -> dict[str, Any]:
    result = cli("plan", "--json", *arguments)
    assert result.returncode in (0, 1), result.stderr
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def test_steps_and_calls_are_counted(config: Any, cli: Cli) -> None:
    arguments = ["--config", config("DPOModule", trainer={"max_epochs": 3, "accumulate_grad_batches": 2})]
    work = plan(cli, *arguments, "--data.batch_size", "2")["work"]
    assert (work["rows"], work["epochs"], work["steps"]) == (7, 3, 3 * 2)  # 4 batches, 2 a step
    assert work["evaluations"] == 3
    assert work["calls"] == 0  # of a judge that is a rule
    judge = ["--evaluation.reward", "lightning_modules.rewards.NemotronReward", "--evaluation.num_prompts", "10"]
    asked = plan(cli, *arguments, *judge)["work"]
    assert asked["calls"] == 10 * (3 + 1)  # the reference's once
    assert asked["minutes"] == 1.0
    limited = plan(cli, *arguments, "--trainer.max_steps", "4", "--data.batch_size", "2")["work"]
    assert (limited["steps"], limited["epochs"]) == (4, 2)
    few = plan(cli, *arguments, "--trainer.limit_train_batches", "2", "--data.batch_size", "2")["work"]
    assert (few["rows"], few["steps"]) == (4, 3)


def test_a_plan_says_what_fits_and_what_would(config: Any, cli: Cli) -> None:
    file = config("SFTModule", evaluation={"num_prompts": 0})
    result = cli("plan", "--config", file)
    assert result.returncode == 0, result.stderr
    assert "fits: " in result.stdout
    tight = plan(cli, "--config", file, "--trainer.accelerator", "gpu", "--memory", "1", "--data.batch_size", "7")
    peak = tight["peak"]["bytes"]
    assert tight["fits"]
    smaller = plan(cli, "--config", file, "--trainer.accelerator", "gpu", "--memory", "1", "--data.batch_size", "3")
    between = (peak + smaller["peak"]["bytes"]) / 2 / 0.92 / 1e9
    arguments = ["--trainer.accelerator", "gpu", "--data.batch_size", "7", "--memory", f"{between:.9f}"]
    refused = cli("plan", "--config", file, *arguments)
    assert refused.returncode == 1, refused.stderr
    assert "does not fit" in refused.stdout
    assert "it would with --data.batch_size 3" in refused.stdout
    nothing = cli("plan", "--config", file, "--trainer.accelerator", "gpu", "--memory", "0.0000001")
    assert "an adapter" in nothing.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--memory", "0"], "--memory must be positive, got 0"),
        (["--trainer.accelerator", "gpu"], "torch sees no GPU here: say how much memory"),
        (["--data.dataset_name", "nowhere/at/all"], "nowhere/at/all does not exist"),
        (["--data.max_length", "9999"], "reads at most 256 tokens"),
        (["--data.max_length", "3"], "none of the first rows"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    arguments: list[str], told: str, config: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(cli("plan", "--config", config("SFTModule"), *arguments), told)


def test_no_weight_is_read(config: Any, cli: Cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "weightless"
    shutil.copytree(tiny_model_dir, model)
    (model / "model.safetensors").unlink()
    found = plan(cli, "--config", config("DPOModule"), "--model.model_name", str(model))
    assert found["parameters"] > 1000


def test_a_run_says_what_was_planned_and_what_it_took(
    config: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config("DPOModule", evaluation={"num_prompts": 0}, trainer={"log_every_n_steps": 1})
    assert cli("fit", "--config", file).returncode == 0
    assert "memory" not in json.loads((tmp_path / "run" / "environment.json").read_text())  # of a short run
    wandb.finish()
    monkeypatch.setattr("commands.run_record.SHORTEST_S", 0.0)
    assert cli("fit", "--config", file, "--overwrite", "true").returncode == 0
    found = json.loads((tmp_path / "run" / "environment.json").read_text())
    expected = plan(cli, "--config", file)["peak"]
    assert (found["memory"]["moment"], found["memory"]["planned"]) == (expected["moment"], expected["bytes"])
    assert found["memory"]["measured"] > 0
    assert found["packages"]


@pytest.mark.filterwarnings("ignore")
def test_a_plan_that_fails_costs_a_finished_run_nothing(
    config: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("commands.run_record.SHORTEST_S", 0.0)
    monkeypatch.setattr("commands.planning.plan.largest_batch", lambda *_: 1 / 0)
    assert cli("fit", "--config", config("SFTModule", evaluation={"num_prompts": 0})).returncode == 0
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert "memory" not in json.loads((tmp_path / "run" / "environment.json").read_text())


COUNTS = {0: "0", 23_456.4: "23,456", 99_999: "99,999", 560_000: "0.6 million", 1.26e9: "1,260.0 million"}


@pytest.mark.parametrize(("count", "told"), list(COUNTS.items()))
def test_a_count_is_told_in_millions_where_it_has_some(count: float, told: str) -> None:
    assert rounded(count) == told
