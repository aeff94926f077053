"""The numbers of an evaluation by hand, and the callback in a run: its files, seeds, failures and reference."""

import contextlib
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from transformers import AutoConfig, AutoModelForCausalLM
from typing_extensions import override

from callbacks.evaluation import completions as evaluation_completions
from callbacks.evaluation.cache import EvaluationCache
from callbacks.evaluation.completions import Decoding
from callbacks.evaluation.metrics import Pair, Side, cannot_tell
from core.errors import ConfigurationError
from core.ranks import Ranks
from datamodules.chat import load_tokenizer
from datamodules.chat_template import CHATML_TEMPLATE
from datamodules.messages import Message
from lightning_modules.functional.statistics import prompts_needed
from lightning_modules.models.identity import weights_digest
from lightning_modules.models.loading import load_causal_lm
from lightning_modules.rewards import WeightedReward
from lightning_modules.rewards.base import reward_identity
from lightning_modules.rewards.keys import keeps_a_secret
from lightning_modules.rewards.nemotron import NemotronReward
from lightning_modules.rewards.rules import Mentions, brevity
from tests.evaluation_run import evaluation, read, result_of, run

PROMPT: list[Message] = [{"role": "user", "content": "q"}]


def pair(reward: float, reference: float, tokens: tuple[int, int] = (4, 4)) -> Pair:
    return Pair.of(PROMPT, Side("a", tokens[0]), Side("b", tokens[1]), reward, reference)


def test_metrics_by_hand() -> None:
    """Two wins, a tie, a loss, two failures: (2 + 1/2) / 4; differences 2, 1, 0, -5."""
    pairs = [
        pair(-1.0, -3.0, (6, 4)),
        pair(2.0, 1.0, (2, 4)),
        pair(0.5, 0.5, (4, 4)),
        pair(-5.0, 0.0, (8, 4)),
        pair(math.nan, -9.0, (100, 1)),
        pair(7.0, math.nan, (100, 1)),
    ]
    metrics = result_of(pairs)
    assert [p.outcome for p in pairs] == ["win", "win", "tie", "loss", "failed", "failed"]
    assert metrics.win_rate == 2.5 / 4
    assert metrics.average_reward == pytest.approx((-1 + 2 + 0.5 - 5) / 4)
    assert metrics.average_reference_reward == pytest.approx((-3 + 1 + 0.5 + 0) / 4)
    assert metrics.reward_improvement == pytest.approx((2 + 1 + 0 - 5) / 4)
    assert metrics.length_ratio == pytest.approx((6 + 2 + 4 + 8) / (4 * 4))
    counted = {name: getattr(metrics, name) for name in ("wins", "ties", "losses", "failed", "prompts")}
    assert counted == {"wins": 2, "ties": 1, "losses": 1, "failed": 2, "prompts": 6}
    low, high = metrics.win_rate_ci
    assert 0 < low < 2.5 / 4 < high < 1
    low, high = metrics.reward_improvement_ci
    assert low < metrics.reward_improvement < high


def test_the_further_statistics_by_hand() -> None:
    """Three wins and a loss; differences 3 2 1 -1 of the rewards and 6 4 2 1 of the lengths go exactly together."""
    rewards, lengths = (3.0, 2.0, 1.0, -1.0), (10, 8, 6, 5)
    pairs = [pair(reward, 0.0, (tokens, 4)) for reward, tokens in zip(rewards, lengths, strict=True)]
    metrics = result_of([*pairs, pair(math.nan, 0.0)])
    assert metrics.sign_test_p == pytest.approx(2 * 5 / 16)
    assert metrics.reward_length_correlation == pytest.approx(1.0)
    assert metrics.prompts_needed == pytest.approx(prompts_needed(0.75))
    assert cannot_tell(metrics).startswith("4 prompts cannot tell a win rate of 75.0 % from 50 %; that takes about ")
    certain = result_of([pair(1.0, 0.0)] * 20)
    assert cannot_tell(certain) == ""
    assert cannot_tell(result_of([pair(0.0, 0.0)] * 3)).endswith("from 50 %")


def test_win_rates_by_source_leave_failed_pairs_out_and_name_what_has_no_source() -> None:
    pairs = [
        pair(1.0, 0.0)._replace(source="maths"),
        pair(0.0, 1.0)._replace(source="maths"),
        pair(math.nan, 1.0)._replace(source="maths"),
        pair(1.0, 0.0),
    ]
    groups = result_of(pairs).win_rate_by_source
    assert [(group.label, group.prompts, group.win_rate) for group in groups] == [
        ("maths", 2, 0.5),
        ("unknown", 1, 1.0),
    ]
    assert result_of([pair(1.0, 0.0)]).win_rate_by_source == []


def test_an_evaluation_without_a_score_has_no_numbers() -> None:
    metrics = result_of([pair(math.nan, 1.0)])
    assert math.isnan(metrics.win_rate)
    assert math.isnan(metrics.average_reward)
    assert (metrics.failed, metrics.wins) == (1, 0)
    assert pair(math.nan, 1.0).record()["reward"] is None


@pytest.mark.filterwarnings("ignore")
def test_a_fit_writes_every_epoch_and_asks_the_reference_once(
    talks: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    asked: list[tuple[str, str]] = []

    def counting(prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        asked.extend(zip([prompt[-1]["content"] for prompt in prompts], completions, strict=True))
        return brevity(prompts, completions)

    trainer = run(talks, tiny_model_dir, evaluation(talks, counting), root=tmp_path / "run")
    answers: set[tuple[str, str]] = set()
    for epoch in range(2):
        metrics, pairs = read(tmp_path / "run" / "eval" / f"epoch={epoch}")
        for side in ("completion", "reference_completion"):
            answers |= {(p["prompt"][-1]["content"], p[side]) for p in pairs}
        assert [p["prompt"][-1]["content"] for p in pairs] == [f"q{i}" for i in range(5)]
        wins = sum(p["reward"] > p["reference_reward"] for p in pairs)
        ties = sum(p["reward"] == p["reference_reward"] for p in pairs)
        assert metrics["win_rate"] == (wins + ties / 2) / 5
        assert metrics["valid"] is True
        assert all(p["reward"] == -len(p["completion"]) for p in pairs)
    assert sorted(asked[1:]) == sorted(answers), "after the preflight, each answer is asked about once"
    assert trainer.callback_metrics["eval/win_rate"].item() == pytest.approx(metrics["win_rate"])
    assert trainer.callback_metrics["eval/length_ratio"].item() == pytest.approx(metrics["length_ratio"], rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_policy_against_itself_ties_everywhere_and_twice_alike(
    talks: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    completions = []
    for name in ("one", "two"):
        against_itself = evaluation(talks, brevity, reference_model=str(tiny_model_dir))
        run(talks, tiny_model_dir, against_itself, root=tmp_path / name, fit=False)
        metrics, pairs = read(tmp_path / name / "eval" / "final")
        assert (metrics["ties"], metrics["win_rate"], metrics["reward_improvement"]) == (5, 0.5, 0.0)
        completions.append([p["completion"] for p in pairs])
    assert completions[0] == completions[1]


@pytest.mark.filterwarnings("ignore")
def test_missing_scores_are_counted_and_mark_the_evaluation_invalid(
    talks: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    def only_q1(prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        return [2.0 if prompt[-1]["content"] == "q1" else math.nan for prompt in prompts]

    against_itself = evaluation(talks, only_q1, reference_model=str(tiny_model_dir))
    run(talks, tiny_model_dir, against_itself, root=tmp_path / "run", fit=False)
    metrics, pairs = read(tmp_path / "run" / "eval" / "final")
    assert (metrics["failed"], metrics["ties"], metrics["average_reward"]) == (4, 1, 2.0)
    assert metrics["valid"] is False
    assert [p["reward"] for p in pairs] == [None, 2.0, None, None, None]
    assert [p["outcome"] for p in pairs] == ["failed", "tie", "failed", "failed", "failed"]


@pytest.mark.filterwarnings("ignore")
def test_a_dead_reward_server_stops_the_run_before_the_model_is_loaded(
    talks: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    dead = NemotronReward(base_url="http://127.0.0.1:9/v1", max_attempts=1)
    with pytest.raises(ConfigurationError, match=r"cannot be reached .* change evaluation\.reward"):
        run(talks, tiny_model_dir, evaluation(talks, dead), root=tmp_path / "run")


def test_no_key_for_the_hosted_api_is_told_before_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_API_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="NVIDIA_API_KEY is not set"):
        NemotronReward()([PROMPT], ["answer"])


@pytest.mark.filterwarnings("ignore")
def test_several_validations_an_epoch_make_one_evaluation_after_the_last(
    talks: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Seven batches, checked after the third and the sixth: the sixth is the epoch's last check, if not its end."""
    asked: list[str] = []

    def counting(prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        asked.extend(f"{prompt[-1]['content']} {text}" for prompt, text in zip(prompts, completions, strict=True))
        return brevity(prompts, completions)

    run(talks, tiny_model_dir, evaluation(talks, counting), root=tmp_path / "run", val_check_interval=0.5)
    assert len(asked) == len(set(asked)), "and no answer is asked about twice"
    assert {path.name for path in (tmp_path / "run" / "eval").glob("epoch=*")} == {"epoch=0", "epoch=1"}


class Slotted:
    """A reward without a dictionary of attributes."""

    __slots__ = ()

    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        return brevity(prompts, completions)


@pytest.mark.filterwarnings("ignore")
def test_parts_of_a_sum_that_have_no_identity_keep_their_scores_apart(
    talks: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    parts = [lambda prompts, completions, score=score: [score] * len(completions) for score in (1.0, 100.0)]
    judged = evaluation(talks, WeightedReward(list(parts), [1.0, 1.0]))
    run(talks, tiny_model_dir, judged, root=tmp_path / "run", max_epochs=1)
    _, pairs = read(tmp_path / "run" / "eval" / "epoch=0")
    assert {p["reward"] for p in pairs} == {101.0}


def test_outcomes_are_decided_as_finely_as_scores_are_written() -> None:
    close = pair(-25.6250001, -25.625)
    assert close.outcome == "loss"
    assert result_of([close]).win_rate == 0.0


@pytest.mark.filterwarnings("ignore")
def test_a_configuration_that_changes_no_weight_makes_another_model(tiny_model_dir: Path) -> None:
    digests = []
    for theta in (1e4, 1e4, 3.0):
        config = AutoConfig.from_pretrained(tiny_model_dir)
        config.rope_parameters["rope_theta"] = theta
        digests.append(weights_digest(AutoModelForCausalLM.from_pretrained(tiny_model_dir, config=config)))
    assert digests[0] == digests[1] != digests[2]


def test_reference_scores_are_kept_apart_by_judge_and_its_options() -> None:
    identities = [reward_identity(reward) for reward in (brevity, Mentions("a"), Mentions("b"))]
    identities += [
        NemotronReward(model=model, base_url=url).identity
        for model, url in (("a", "http://one"), ("b", "http://one"), ("a", "http://two"))
    ]
    assert len({str(identity) for identity in identities}) == 6
    assert reward_identity(lambda prompts, completions: []) is None
    assert reward_identity(functools.partial(brevity)) is None
    assert reward_identity(Mentions("a").__call__) is None
    slotted = Slotted()
    assert reward_identity(slotted) is None
    mentions = Mentions("a")
    before = reward_identity(mentions)
    mentions._asked = 5  # type: ignore[attr-defined]
    assert reward_identity(mentions) == before, "what is private does not make another judge"
    assert reward_identity(WeightedReward([brevity], [1.0])) is None  # its parts' scores are kept, not their sum
    waits_longer = NemotronReward(model="a", base_url="http://one", timeout_s=99.0, requests_per_minute=1)
    assert waits_longer.identity == NemotronReward(model="a", base_url="http://one").identity


@pytest.mark.parametrize(
    ("url", "may"),
    [
        ("https://integrate.api.nvidia.com/v1", True),
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://reward.example.org/v1", False),
        ("http://10.0.0.7:8000/v1", False),
    ],
)
def test_the_key_goes_over_tls_or_stays_on_this_machine(url: str, may: bool) -> None:
    assert keeps_a_secret(url) is may


def without_tokenizer(directory: Path) -> str:
    for file in directory.glob("*token*"):
        file.unlink()
    return r"no tokenizer in .*; change evaluation.reference_model"


def of_few_positions(directory: Path) -> str:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 10}))
    return r"reads at most 10 tokens, the evaluation's prompts .* may have 27; lower evaluation.max_prompt_length or"


def without_questions(directory: Path) -> str:
    refusal = "{% if messages[0].content[0] == 'q' %}{{ raise_exception('no questions') }}{% endif %}"
    (directory / "chat_template.jinja").write_text(refusal + CHATML_TEMPLATE)
    return r"cannot be asked the evaluation's prompts: .*no questions.*; change evaluation.reference_model$"


def without_what_is_said(directory: Path) -> str:
    (directory / "chat_template.jinja").write_text("<|im_end|>")
    return r"prompts: the chat template leaves out what a turn says.*; change evaluation.reference_model$"


@pytest.mark.parametrize("spoil", [without_tokenizer, of_few_positions, without_questions, without_what_is_said])
def test_a_reference_that_cannot_answer_is_refused_before_a_model_is_loaded(
    spoil: Callable[[Path], str], talks: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_modules.base.load_causal_lm", lambda *_, **__: pytest.fail("a model was loaded"))
    reference = tmp_path / "reference"
    shutil.copytree(tiny_model_dir, reference)
    message = spoil(reference)
    with pytest.raises(ConfigurationError, match=message):
        run(talks, tiny_model_dir, evaluation(talks, brevity, reference_model=str(reference)), root=tmp_path)


class WithAnother(Ranks[Any]):
    """One process, and another that says of everything that it has or lacks it as well."""

    def __init__(self, *, lacks: bool) -> None:
        super().__init__(1.0)
        self.lacks = lacks

    @override
    def gather(self, work: Callable[[], Any]) -> list[Any]:
        return [work(), self.lacks]


@pytest.mark.parametrize("lacks", [True, False])
def test_a_model_is_opened_where_another_process_lacks_a_completion(
    lacks: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Or that one would wait for its part of a model that they share."""
    opened: list[str] = []

    @contextlib.contextmanager
    def model() -> Iterator[Any]:
        opened.append("a model")
        yield load_causal_lm(str(tiny_model_dir), load_tokenizer(str(tiny_model_dir)))

    with contextlib.closing(EvaluationCache(tmp_path / "evaluation.sqlite")) as cache:
        complete = evaluation_completions.Completer(
            Trainer(logger=False, accelerator="cpu", enable_checkpointing=False),
            model,
            load_tokenizer(str(tiny_model_dir)),
            ranks=WithAnother(lacks=lacks),
            digest="a",
            title="policy completions",
            decoding=Decoding(8, 1.0, 1.0, 42),
            batch_size=1,
            cache=cache,
        )
        assert complete({}) == []
    assert len(opened) == lacks


def test_whatever_changes_a_completion_is_in_its_key(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the tokens that would have ended it."""
    tokenizer = load_tokenizer(str(tiny_model_dir))

    def key(*, digest: str = "a", stops: Sequence[int] = (1,), text: str = "q", **changes: Any) -> str:
        monkeypatch.setattr(evaluation_completions, "stop_token_ids", lambda _: list(stops))
        decoding = Decoding(8, 1.0, 1.0, 42)._replace(**changes)
        prompts: dict[int, Any] = {0: [{"role": "user", "content": text}]}
        found: str = evaluation_completions.encode(tokenizer, prompts, model_digest=digest, decoding=decoding)[0].key
        return found

    changes: list[dict[str, Any]] = [{}, {"digest": "b"}, {"stops": (1, 2)}, {"text": "r"}]
    changes += [{"max_completion_length": 9}, {"temperature": 0.5}, {"top_p": 0.5}, {"seed": 1}]
    assert len({key(**change) for change in changes}) == len(changes)
    assert key() == key()
