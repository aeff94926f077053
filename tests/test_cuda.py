"""What a GPU does is what the CPU does: training, packed attention, replayed decode steps, resumed runs."""

import copy
import functools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightning_modules.forward import attention
from lightning_modules.forward.completions import completion_tokens
from lightning_modules.generation import decoders
from lightning_modules.generation.family_decoder import FamilyDecoder
from lightning_modules.generation.sampler import Samples, sample_completions
from tests.command_line import Cli
from tests.kills import command, difference, make_material
from tests.test_decode import FAMILY, SMALL, made
from tests.test_fast_paths import GROUPS, ROWS, batch_of, weighted

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

PROMPTS = [torch.tensor(prompt) for prompt in ([5, 6, 7, 8, 9, 10], [11, 12], list(range(20, 60)))]
WIDE = {**SMALL, "hidden_size": 96, "head_dim": 16}
"""Heads of a width that packed attention takes."""


def on_gpu(model: PreTrainedModel) -> Any:
    return copy.deepcopy(model).to("cuda")  # type: ignore[arg-type]


def samples_of(model: PreTrainedModel, **options: Any) -> Samples:
    how = {"max_completion_length": 200, "stop_token_ids": [3, 4, 5, 6], "seeds": range(6), "samples_per_prompt": 2}
    return sample_completions(model, PROMPTS, **{**how, **options})


def gradients_of(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.float().cpu() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def away(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any gradient, as a share of its largest entry."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["SFTModule", "RewardModule", "DPOModule", "RLOOModule"])
def test_a_run_ends_as_on_the_cpu(method: str, config: Any, tmp_path: Path, cli: Cli) -> None:
    path = config(method, trainer={"log_every_n_steps": 1, "precision": "32-true"})
    found = {}
    for accelerator in ("cpu", "gpu"):
        assert cli("fit", "--config", path, "--trainer.accelerator", accelerator).returncode == 0
        shutil.move(tmp_path / "run", tmp_path / accelerator)
        found[accelerator] = load_file(tmp_path / accelerator / "final" / "model.safetensors")
        environment = json.loads((tmp_path / accelerator / "environment.json").read_text())
        assert (environment["cuda"] is None) == (accelerator == "cpu")
    for name, weights in found["cpu"].items():
        torch.testing.assert_close(found["gpu"][name], weights, atol=1e-4, rtol=1e-4, msg=name)
    logs = [(tmp_path / accelerator / "metrics.jsonl").read_text().splitlines() for accelerator in found]
    for ours, theirs in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        for name in ours:
            if name.startswith(("train/loss", "val/", "eval/")) and isinstance(ours[name], float):
                assert theirs[name] == pytest.approx(ours[name], abs=2e-4, rel=1e-3), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("method", ["SFTModule", "DPOModule", "RLOOModule"])
def test_half_precision_trains_samples_and_judges(
    method: str, precision: str, config: Any, tmp_path: Path, cli: Cli
) -> None:
    trainer = {"accelerator": "gpu", "precision": precision, "log_every_n_steps": 1}
    path = config(method, model={"learning_rate": 0.05}, trainer=trainer)
    result = cli("fit", "--config", path)
    assert result.returncode == 0, result.stderr
    assert "without a CUDA graph" not in result.stderr
    pairs = (tmp_path / "run" / "eval" / "epoch=0" / "pairs.jsonl").read_text().splitlines()
    assert len(pairs) == 4


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["unshared", "shared"])
def test_packed_attention_is_as_near_to_float32_as_a_call_for_each_segment(
    groups: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(lambda: LlamaForCausalLM(LlamaConfig(**WIDE)))
    attention.replace_attention(model)
    batch = batch_of(ROWS, left=False)
    expected = gradients_of(model, weighted(completion_tokens(model, batch, groups=groups).log_probs))
    exact = completion_tokens(model, batch, groups=groups).log_probs.detach()
    there, calls = on_gpu(model), []
    plain = attention.varlen_attn

    @functools.wraps(plain)
    def counted(*given: Any, **named: Any) -> Tensor:
        calls.append(1)
        output: Tensor = plain(*given, **named)
        return output

    monkeypatch.setattr(attention, "varlen_attn", counted)
    errors = {}
    for packed in (True, False):
        if not packed:
            monkeypatch.setattr(attention, "_varlen_can", lambda *_: False)
        with torch.autocast("cuda", torch.bfloat16):
            log_probs = completion_tokens(there, batch.to("cuda"), groups=groups).log_probs
        found = gradients_of(there, (log_probs * torch.linspace(-1, 2, len(log_probs), device="cuda")).sum())
        if packed:
            assert len(calls) % 3 == 0 < len(calls), "once a layer"
            packed_calls = len(calls)
        assert len(calls) == packed_calls
        errors[packed] = (float((log_probs.cpu() - exact).abs().max()), away(found, expected))
    print("packed, by segment:", errors)
    assert errors[True][0] < max(2 * errors[False][0], 0.02)
    assert errors[True][1] < max(2 * errors[False][1], 0.02)


@pytest.mark.parametrize("name", FAMILY)
def test_replayed_steps_draw_what_the_cpu_draws(name: str) -> None:
    model = made(FAMILY[name])
    expected = samples_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that no graph was captured, for one
        found = samples_of(on_gpu(model))
    assert torch.equal(found.tokens.input_ids.cpu(), expected.tokens.input_ids)
    assert torch.equal(found.finished.cpu(), expected.finished)
    torch.testing.assert_close(found.log_probs.cpu(), expected.log_probs, atol=1e-3, rtol=1e-3)


def test_steps_are_captured_and_give_the_logits_of_transformers() -> None:
    model = on_gpu(made(FAMILY["Qwen2, tied"]))
    both = [
        FamilyDecoder(model, PROMPTS, samples_per_prompt=2, max_completion_length=200),
        decoders.TransformersDecoder(model, PROMPTS, samples_per_prompt=2),
    ]
    with torch.no_grad():
        logits = [each.start() for each in both]
        torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)
        rows = torch.tensor([5, 1, 2, 3], device="cuda")
        for step in range(150):  # over the end of a block, which is another graph
            tokens = logits[0].argmax(-1)
            logits = [each.step(tokens).clone() for each in both]
            assert both[0].graphs.captured is not None
            torch.testing.assert_close(*logits, atol=2e-3, rtol=2e-3, msg=f"step {step}")
            if step == 20:
                for each in both:
                    each.keep(rows)
                logits = [values[rows] for values in logits]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reported_log_probs_are_those_of_a_forward_pass(dtype: torch.dtype) -> None:
    """Within what half precision rounds: this is the ratio that RLOO's first update must have at one."""
    model = on_gpu(made(lambda: LlamaForCausalLM(LlamaConfig(**WIDE))))
    attention.replace_attention(model)
    with torch.autocast("cuda", dtype):
        samples = samples_of(model, stop_token_ids=[])
        log_probs = completion_tokens(model, samples.tokens).log_probs
    difference = (log_probs.detach() - samples.log_probs).abs()
    print(f"{dtype}: mean {float(difference.mean()):.4f}, max {float(difference.max()):.4f} nats")
    assert difference.mean() < 0.05


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["SFTModule", "DPOModule", "RLOOModule"])
def test_a_run_that_is_killed_and_resumed_is_the_one_left_alone(method: str, tmp_path: Path, cli: Cli) -> None:
    """Bit for bit, in bfloat16, where PyTorch is told to be deterministic."""
    make_material(tmp_path / "material")
    assert cli(*command(tmp_path / "material", tmp_path / "alone", method, accelerator="gpu")).returncode == 0
    arguments = command(tmp_path / "material", tmp_path / "killed", method, accelerator="gpu")
    with (tmp_path / "log.txt").open("w") as log:
        started = subprocess.Popen([sys.executable, "cli.py", *arguments], cwd=ROOT, stdout=log, stderr=log)
    while started.poll() is None and len(list((tmp_path / "killed" / "checkpoints").glob("step=*.ckpt"))) < 3:
        time.sleep(0.002)
    started.kill()
    assert started.wait() == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "killed" / "final").exists()
    resumed = cli(*arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert difference(tmp_path / "alone", tmp_path / "killed") == ""


@pytest.mark.filterwarnings("ignore")
def test_a_sharded_model_of_one_process_ends_as_a_whole_one(config: Any, tmp_path: Path, cli: Cli) -> None:
    path = config("SFTModule", trainer={"accelerator": "gpu"}, evaluation={"num_prompts": 0})
    weights = []
    for strategy in (
        ["--config", "configs/trainer/fsdp.yaml", "--trainer.devices", "1", "--trainer.precision", "32-true"],
        [],
    ):
        result = cli("fit", "--config", path, *strategy)
        assert result.returncode == 0, result.stderr
        weights.append(load_file(tmp_path / "run" / "final" / "model.safetensors"))
        shutil.rmtree(tmp_path / "run")
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_adapters_on_weights_of_few_bits(quantization: str, config: Any, tmp_path: Path, cli: Cli) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra [quantized] is not installed")
    changes = {"quantization": quantization, "lora": {"rank": 4}, "learning_rate": 1e-2}
    path = config(
        "SFTModule", model=changes, trainer={"accelerator": "gpu", "precision": "bf16-mixed", "max_epochs": 3}
    )
    result = cli("fit", "--config", path)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val/loss"] for line in lines if "val/loss" in line]
    assert losses[-1] < 0.9 * losses[0], losses


def test_the_machine_is_described(cli: Cli) -> None:
    result = cli("doctor")
    assert re.search(r"NVIDIA|GPU", result.stdout), result.stdout
