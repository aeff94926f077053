"""An evaluation on bad days: hostile and dead servers, a kill half way, limits, and what callbacks make of it."""

import json
import math
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from callbacks.evaluation import completions as evaluation_completions
from callbacks.evaluation import metrics as evaluation_metrics
from callbacks.nemotron_evaluation import NemotronEvaluation
from core.errors import ConfigurationError
from datamodules.messages import Message
from lightning_modules.functional.length_control import LengthControlled
from lightning_modules.functional.statistics import Interval
from lightning_modules.rewards import NemotronReward
from lightning_modules.rewards.preflight import judge_preflight, time_plan
from lightning_modules.rewards.rules import Mentions, brevity
from tests.evaluation_run import evaluation, read, run, write_rows
from tests.reward_server import Asked, Reply, RewardServer, text_reply

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[1]


def honest(asked: Asked) -> Reply:
    """A judge that likes the probe's good answer and scores anything else by its characters."""
    text = asked.body["messages"][-1]["content"]
    return text_reply(f"reward:{-100.0 if text == 'No idea.' else sum(map(ord, text)) % 97 - 48.5}")


def judge(server: RewardServer, **options: Any) -> NemotronReward:
    return NemotronReward(**{"base_url": server.url, "requests_per_minute": 0, **options})


def asked_about(server: RewardServer) -> Counter[str]:
    """How often each conversation was asked about, the preflight's aside."""
    texts = (json.dumps(asked.body["messages"]) for asked in server.asked)
    return Counter(text for text in texts if "one more than" not in text)


# A hostile server


@pytest.mark.slow
def test_a_hostile_server_changes_no_score_and_loses_none_in_silence(
    server: RewardServer, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A tenth throttled, a tenth failing, 5 % hanging, 5 % garbage, 2 % cut off: as of a clean server, within time."""
    write_rows(tmp_path / "test.jsonl", 200)
    options = {"num_prompts": 200, "batch_size": 200, "reference_model": str(tiny_model_dir), "temperature": 1.5}
    luck = random.Random(5)

    def hostile(asked: Asked) -> Reply:
        with server.lock:
            throw = luck.random()
        if throw < 0.10:
            return Reply(status=429, headers={"Retry-After": "0.2"})
        if throw < 0.20:
            return Reply(status=500)
        if throw < 0.25:
            time.sleep(1.5)
            return Reply(status=None)
        if throw < 0.30:
            return Reply(b"reward: maybe")
        if throw < 0.32:
            return Reply(b'{"choices"', missing_bytes=20)
        return honest(asked)

    results = []
    for name, respond, time_limit_s in (("clean", honest, 600.0), ("hostile", hostile, 60.0)):
        server.respond = respond
        reward = judge(server, parallel_requests=32, timeout_s=0.7, time_limit_s=time_limit_s)
        judged = evaluation(tmp_path, reward, **options, seed=1, cache_dir=str(tmp_path / name))
        started = time.monotonic()
        run_on_model(judged, tiny_model_dir, tmp_path / name)
        assert time.monotonic() - started < time_limit_s
        results.append(read(tmp_path / name / "eval" / "final"))
    (clean_metrics, clean), (metrics, pairs) = results
    assert clean_metrics["failed"] == 0
    assert len(pairs) == 200
    assert metrics["wins"] + metrics["ties"] + metrics["losses"] + metrics["failed"] == 200
    assert metrics["failed"] == sum(p["outcome"] == "failed" for p in pairs) <= 10
    for known, got in zip(clean, pairs, strict=True):
        for side in ("reward", "reference_reward"):
            assert got[side] in (known[side], None)
        assert got["outcome"] == ("failed" if None in (got["reward"], got["reference_reward"]) else known["outcome"])
    scored = [p["reward"] for p, q in zip(clean, pairs, strict=True) if q["outcome"] != "failed"]
    assert metrics["average_reward"] == pytest.approx(sum(scored) / len(scored))
    assert set(metrics["calls"]["reasons"]) == {"429", "500", "timeout", "no score", "connection"}
    assert metrics["calls"]["failed_requests"] == sum(metrics["calls"]["reasons"].values())


def run_on_model(judged: NemotronEvaluation, model_dir: Path, root: Path) -> None:
    """Validate a model on the evaluation's prompts alone."""
    from torch.utils.data import DataLoader

    from lightning_modules import EvaluationModule
    from lightning_modules.untrained import NoRows

    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=root, callbacks=[judged]
    )
    trainer.validate(EvaluationModule(str(model_dir)), dataloaders=DataLoader(NoRows()), verbose=False)


# Nothing is paid for twice


def test_methods_share_the_reference_and_a_second_evaluation_is_free(
    server: RewardServer, talks: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    server.respond = honest
    for name in ("sft", "dpo"):
        judged = evaluation(talks, judge(server), reference_model=str(tiny_model_dir))
        run(talks, tiny_model_dir, judged, root=tmp_path / "runs" / name, max_epochs=1)
    once = asked_about(server)
    assert set(once.values()) == {1}, "the reference's answers to the same prompts, and the same policy's"
    assert len(once) == 10
    judged = evaluation(talks, judge(server), num_prompts=7, reference_model=str(tiny_model_dir))
    run(talks, tiny_model_dir, judged, root=tmp_path / "runs" / "more", max_epochs=1)
    assert len(asked_about(server) - once) == 4, "two more prompts, two sides"
    metrics, _ = read(tmp_path / "runs" / "more" / "eval" / "epoch=0")
    assert (metrics["calls"]["asked"], metrics["calls"]["cached"]) == (4, 10)


@pytest.mark.parametrize("change", ["temperature", "max_completion_length", "seed", "judge"])
def test_what_was_made_otherwise_is_not_taken_from_the_cache(
    server: RewardServer, talks: Path, tiny_model_dir: Path, tmp_path: Path, change: str
) -> None:
    server.respond = honest
    options: dict[str, Any] = {"reference_model": str(tiny_model_dir), "cache_dir": str(tmp_path / "cache")}
    run_on_model(evaluation(talks, judge(server), **options), tiny_model_dir, tmp_path / "one")
    before = asked_about(server)
    other = {"temperature": 1.3, "max_completion_length": 5, "seed": 7}
    options |= {change: other[change]} if change in other else {}
    reward = judge(server, model="another/judge") if change == "judge" else judge(server)
    run_on_model(evaluation(talks, reward, **options), tiny_model_dir, tmp_path / "two")
    assert asked_about(server) - before


def test_another_model_under_the_same_name_is_completed_anew(talks: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    model_dir = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model_dir)
    completions = []
    for _ in range(2):
        judged = evaluation(talks, brevity, reference_model=str(model_dir), cache_dir=str(tmp_path / "cache"))
        run_on_model(judged, tiny_model_dir, tmp_path / "run")
        completions.append([p["reference_completion"] for p in read(tmp_path / "run" / "eval" / "final")[1]])
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(-1.0)
        model.save_pretrained(model_dir)
    assert completions[0] != completions[1]


@pytest.mark.slow
def test_killed_half_way_and_started_again_no_scored_answer_is_asked_about_again(
    server: RewardServer, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """What the cache held at the kill is exactly what the second start does not ask about."""
    write_rows(tmp_path / "prompts.jsonl", 60)

    def slow(asked: Asked) -> Reply:
        time.sleep(0.02)
        return honest(asked)

    server.respond = slow
    reward = {
        "class_path": "lightning_modules.rewards.NemotronReward",
        "init_args": {"base_url": server.url, "requests_per_minute": 0, "parallel_requests": 2},
    }
    options = {
        "--model.model_name": str(tiny_model_dir),
        "--trainer.default_root_dir": str(tmp_path / "run"),
        "--trainer.accelerator": "cpu",
        "--evaluation.reference_model": str(tiny_model_dir),
        "--evaluation.dataset_name": str(tmp_path / "prompts.jsonl"),
        "--evaluation.num_prompts": "60",
        "--evaluation.max_completion_length": "8",
        "--evaluation.temperature": "1.5",
        "--evaluation.reward": json.dumps(reward),
    }
    command = [sys.executable, "cli.py", "validate", *(part for option in options.items() for part in option)]
    environment = {**os.environ, "WANDB_MODE": "disabled", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and sum(asked_about(server).values()) < 25:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = asked_about(server)
    with sqlite3.connect(tmp_path / "cache" / "evaluation.sqlite") as cache:
        (kept,) = cache.execute("SELECT count(*) FROM scores").fetchone()
    # Two under way, and where the machine is busy some answered and not yet written.
    assert sum(before.values()) - 6 <= kept <= sum(before.values()), "what was under way aside, all is kept"
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    metrics, pairs = read(tmp_path / "run" / "eval" / "final")
    assert (metrics["failed"], len(pairs)) == (0, 60)
    different = len(asked_about(server))
    assert sum((asked_about(server) - before).values()) == different - kept


def test_an_evaluation_that_ran_into_its_call_budget_goes_on_where_it_stopped(
    server: RewardServer, talks: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Two probes and eight scores, pair by pair, so four whole pairs; then the rest."""
    server.respond = honest
    options: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), "max_failed_share": 0.1, "temperature": 1.5}
    reference = tmp_path / "reference"
    perturbed(tiny_model_dir, reference)
    failed = []
    for _ in range(2):
        reward = judge(server, max_calls=10, parallel_requests=1)
        judged = evaluation(talks, reward, reference_model=str(reference), **options)
        run_on_model(judged, tiny_model_dir, tmp_path / "run")
        metrics, _ = read(tmp_path / "run" / "eval" / "final")
        failed.append(metrics["failed"])
        assert metrics["valid"] is (metrics["failed"] == 0)
    assert failed == [1, 0], "ten calls are two for the probes and four pairs"
    assert set(asked_about(server).values()) == {1}


def perturbed(model_dir: Path, target: Path) -> None:
    """A model like another, and not the same."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(model_dir, target)
    model = AutoModelForCausalLM.from_pretrained(target)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.1)
    model.save_pretrained(target)


# Before any training


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            Reply(status=401),
            r"401: the key is not accepted, check REWARD_API_KEY, sent where REWARD_API_HOST is 127",
        ),
        (Reply(status=402), r"402: the account has no credits left"),
        (Reply(status=404), r"404: the model .*70b-reward is not there for this account; name another model"),
        (Reply(status=410), r"410: the model .*70b-reward was retired; name another model, a server of your own"),
        (text_reply("reward:-3.28"), r"cannot tell a good answer to 'What is one more than \d\d\?' from a bad one"),
    ],
)
def test_a_judge_that_cannot_judge_stops_the_run_in_one_line_before_a_model_is_loaded(
    server: RewardServer, talks: Path, tiny_model_dir: Path, tmp_path: Path, reply: Reply, message: str
) -> None:
    server.answers(reply)
    with pytest.raises(ConfigurationError, match=message) as caught:
        run(talks, tiny_model_dir, evaluation(talks, judge(server)), root=tmp_path / "run")
    assert "evaluation.reward" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "eval").exists()


def test_a_rule_need_not_like_the_good_answer(talks: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    run(talks, tiny_model_dir, evaluation(talks, Mentions("idea")), root=tmp_path / "run", max_epochs=1)
    assert (tmp_path / "run" / "eval" / "epoch=0" / "metrics.json").is_file()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "5 prompts x 2 sides = 10 calls, about 1 s the first time"),
        ({"requests_per_minute": 40}, "10 calls at 40 a minute, about 15 s the first time and 8 s for each further"),
        ({"requests_per_minute": 4, "time_limit_s": 60.0}, "about 2.5 min .* beyond time_limit_s=60, so what is left"),
        ({"max_calls": 9}, "beyond max_calls=9, so what is left then counts as failed, and another evaluation goes on"),
    ],
)
def test_the_preflight_says_how_long_an_evaluation_takes_and_what_limits_it(
    server: RewardServer, options: dict[str, Any], told: str
) -> None:
    server.respond = honest
    reward = judge(server, **options)
    judge_preflight(reward, option="evaluation.reward")
    assert len(server.asked) == 2
    assert re.search(told, time_plan(reward, 5))


# With training under way


def test_a_server_that_dies_leaves_the_epoch_not_evaluated_and_the_training_going(
    server: RewardServer, talks: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The first epoch is judged, the second is not, the third is again: neither callback takes the gap for a number."""
    best = ModelCheckpoint(dirpath=tmp_path / "checkpoints", monitor="eval/reward_improvement", mode="max")
    stopping = EarlyStopping(monitor="eval/win_rate", mode="max", patience=3)
    epochs: list[int] = []

    class DyingReward(NemotronReward):
        def stream(self, prompts: Any, completions: Any) -> Any:
            if completions and "one more" not in prompts[0][-1]["content"]:
                epochs.append(len(epochs))
                if len(epochs) == 2:
                    server.answers(Reply(status=503))
                else:
                    server.respond = honest
            return super().stream(prompts, completions)

    server.respond = honest
    reward = DyingReward(base_url=server.url, requests_per_minute=0, max_attempts=1)
    judged = evaluation(talks, reward, reference_model=str(tiny_model_dir), temperature=1.5)
    trainer = run(talks, tiny_model_dir, judged, root=tmp_path / "run", max_epochs=3, callbacks=[best, stopping])
    assert trainer.current_epoch == 3
    evaluated = [read(tmp_path / "run" / "eval" / f"epoch={epoch}")[0] for epoch in range(3)]
    assert [metrics["valid"] for metrics in evaluated] == [True, False, True]
    improved = evaluated[2]["win_rate"] > evaluated[0]["win_rate"]
    assert stopping.wait_count == (0 if improved else 1), "the second epoch counts for nothing"
    improvements = [evaluated[epoch]["reward_improvement"] for epoch in (0, 2)]
    assert best.best_model_score is not None
    assert best.best_model_score.item() == pytest.approx(max(improvements))


def test_early_stopping_counts_evaluated_epochs_alone(talks: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """With a constant judge nothing improves after the first evaluation, which is that of the second epoch."""

    def constant(prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        return [1.0] * len(completions)

    stopping = EarlyStopping(monitor="eval/win_rate", mode="max", patience=2)
    judged = evaluation(talks, constant, every_n_epochs=2)
    trainer = run(talks, tiny_model_dir, judged, root=tmp_path / "run", max_epochs=20, callbacks=[stopping])
    assert trainer.current_epoch == 6, "evaluated after epochs 2, 4 and 6; the latter two without improvement"


def test_early_stopping_is_not_asked_where_the_evaluation_lacks_its_number(
    talks: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal length may be beyond the data of an epoch; early stopping would take the NaN for the end of training."""
    unknown = LengthControlled(math.nan, Interval(math.nan, math.nan), "unknown here")
    monkeypatch.setattr(evaluation_metrics, "length_controlled_win_rate", lambda *_: unknown)
    stopping = EarlyStopping(monitor="eval/length_controlled_win_rate", mode="max", patience=1)
    judged = evaluation(talks, brevity, num_prompts=2)
    trainer = run(talks, tiny_model_dir, judged, root=tmp_path / "run", max_epochs=4, callbacks=[stopping])
    assert trainer.current_epoch == 4
    assert read(tmp_path / "run" / "eval" / "epoch=3")[0]["length_controlled_note"] == "unknown here"


def test_a_checkpoint_monitor_needs_no_evaluation_at_every_validation(
    talks: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    best = ModelCheckpoint(dirpath=tmp_path / "checkpoints", monitor="eval/win_rate", mode="max", filename="{epoch}")
    judged = evaluation(talks, brevity, every_n_epochs=2)
    trainer = run(
        talks, tiny_model_dir, judged, root=tmp_path / "run", max_epochs=4, callbacks=[best], val_check_interval=0.5
    )
    rates = {epoch: read(tmp_path / "run" / "eval" / f"epoch={epoch}")[0]["win_rate"] for epoch in (1, 3)}
    assert trainer.current_epoch == 4
    assert best.best_model_score is not None
    assert best.best_model_score.item() == pytest.approx(max(rates.values()))
    assert not math.isinf(best.best_model_score.item())


@pytest.mark.parametrize("callback", [ModelCheckpoint, EarlyStopping])
def test_keeping_the_worst_is_refused(callback: Any, talks: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    worst = callback(monitor="eval/win_rate")
    with pytest.raises(ConfigurationError, match=r"eval/win_rate is better when it is higher; set the mode"):
        run(talks, tiny_model_dir, evaluation(talks, brevity), root=tmp_path / "run", callbacks=[worst])
    best = callback(monitor="eval/win_rate", mode="max")
    misspelt = callback(monitor="eval/winrate", mode="max")
    with pytest.raises(ConfigurationError, match=r"no evaluation logs eval/winrate; monitor one of .*eval/win_rate"):
        run(talks, tiny_model_dir, evaluation(talks, brevity), root=tmp_path / "run", callbacks=[misspelt])
    with pytest.raises(ConfigurationError, match=r"monitored but never evaluated; raise evaluation.num_prompts"):
        run(talks, tiny_model_dir, evaluation(talks, brevity, num_prompts=0), root=tmp_path, callbacks=[best])


def test_a_judge_that_raises_ends_no_training(talks: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    calls = 0

    def failing(prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise KeyError("refused: nvapi-a-key-that-no-warning-may-hold")
        return brevity(prompts, completions)

    with pytest.warns(UserWarning, match="the evaluation is not valid: 5 of 5 pairs .*KeyError: 'refused") as told:
        trainer = run(talks, tiny_model_dir, evaluation(talks, failing), root=tmp_path / "run")
    assert not any("nvapi-a-key" in str(warning.message) for warning in told)
    assert trainer.current_epoch == 2
    metrics, pairs = read(tmp_path / "run" / "eval" / "epoch=1")
    assert (metrics["valid"], metrics["failed"], metrics["win_rate"]) == (False, 5, None)
    assert all(p["reward"] is None for p in pairs)


def test_under_another_precision_both_sides_are_completed_anew(
    talks: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[int] = []
    sample = evaluation_completions.sample_completions

    def counting(model: Any, prompt_ids: Any, **options: Any) -> Any:
        sampled.append(len(prompt_ids))
        return sample(model, prompt_ids, **options)

    monkeypatch.setattr(evaluation_completions, "sample_completions", counting)
    counts = []
    for precision in ("32-true", "bf16-mixed", "32-true"):
        judged = evaluation(talks, brevity, reference_model=str(tiny_model_dir), cache_dir=str(tmp_path / "cache"))
        run(talks, tiny_model_dir, judged, root=tmp_path / precision, fit=False, precision=precision)
        counts.append(sum(sampled))
    assert counts == [10, 20, 20]


def test_a_share_of_failures_at_the_limit_is_valid_and_one_beyond_is_not(
    talks: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    def without(*texts: str) -> Any:
        return lambda prompts, completions: [math.nan if p[-1]["content"] in texts else 1.0 for p in prompts]

    for reward, valid in ((without("q0"), True), (without("q0", "q1"), False)):
        judged = evaluation(talks, reward, reference_model=str(tiny_model_dir), max_failed_share=0.2)
        run(talks, tiny_model_dir, judged, root=tmp_path / str(valid), fit=False)
        assert read(tmp_path / str(valid) / "eval" / "final")[0]["valid"] is valid
