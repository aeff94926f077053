"""One optimiser step of each method against a brute-force computation, and its independence of how a batch is split."""

import copy
import itertools
import math
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import Gemma3ForConditionalGeneration

from core.errors import ConfigurationError
from datamodules.batches import PreferenceBatch, PromptBatch, TokenBatch, pad
from datamodules.messages import Message
from lightning_modules import DPOModule, RewardModule, RLOOModule, SFTModule
from lightning_modules.forward.completions import completion_tokens, sequence_scores
from lightning_modules.models.adapter_files import LoraOptions
from lightning_modules.models.loading import load_causal_lm
from lightning_modules.optimiser_step import unmoved
from tests.command_line import Cli, assert_refused
from tests.conftest import tiny_tokenizer
from tests.test_decode import made, seeing

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = [[1, 2, 3, 4, 5, 6], [9, 8, 7], [4, 4, 4, 4], [7, 1, 2, 2, 3]]
MASKS = [[False, False, True, True, False, True], [False, True, True], [False] * 3 + [True], [False] * 2 + [True] * 3]


def first_gradients(
    module: LightningModule,
    batches: Sequence[Any],
    *,
    accumulate: int = 1,
    clip: float | None = None,
    precision: Any = None,
) -> dict[str, torch.Tensor]:
    """The gradients that the optimiser's first step takes, by parameter name."""
    seen: dict[str, torch.Tensor] = {}

    clip_gradients = module.configure_gradient_clipping

    def remembering(*args: Any, **kwargs: Any) -> None:
        clip_gradients(*args, **kwargs)
        if not seen:
            seen.update({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})

    module.configure_gradient_clipping = remembering  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as root:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            default_root_dir=Path(root) / "run",
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        trainer.fit(module, DataLoader(list(batches), batch_size=None))
    assert seen
    return seen


def tokens(rows: Sequence[int]) -> TokenBatch:
    return pad([ROWS[row] for row in rows], [MASKS[row] for row in rows], pad_token_id=4)


def pairs(rows: Sequence[tuple[int, int]]) -> PreferenceBatch:
    return PreferenceBatch(tokens([chosen for chosen, _ in rows] + [rejected for _, rejected in rows]))


def exact_log_prob(model: Any, row: Sequence[int], mask: Sequence[bool]) -> torch.Tensor:
    """Sum of the masked tokens' log-probabilities, of one unpadded row."""
    log_probs = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
    return torch.stack([log_probs[t - 1, row[t]] for t in range(1, len(row)) if mask[t]]).sum()


def gradients_of(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {f"model.{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, tolerance: float = 1e-5) -> None:
    """Equal but for a share of the largest entry of each tensor, so that small gradients are compared as well."""
    assert set(ours) == set(expected)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-4
    for name, gradient in expected.items():
        within = tolerance * max(gradient.abs().max().item(), 0.01 * largest)
        torch.testing.assert_close(ours[name], gradient, atol=within, rtol=tolerance, msg=name)


def test_the_comparison_of_gradients_sees_a_flipped_one_however_small() -> None:
    gradients = {"a": torch.tensor([2e-3, -1e-3]), "b": torch.tensor([1e-4])}
    for name in gradients:
        with pytest.raises(AssertionError):
            assert_equal({**gradients, name: -gradients[name]}, gradients, tolerance=0.1)


@pytest.fixture
def model(tiny_model_dir: Path) -> Any:
    from datamodules.chat import load_tokenizer

    return load_causal_lm(str(tiny_model_dir), load_tokenizer(str(tiny_model_dir)))


def test_sft_gradient_is_that_of_the_mean_over_supervised_tokens(tiny_model_dir: Path, model: Any) -> None:
    total = sum(sum(mask[1:]) for mask in MASKS)
    loss = -torch.stack([exact_log_prob(model, *row) for row in zip(ROWS, MASKS, strict=True)]).sum() / total
    ours = first_gradients(SFTModule(model_name=str(tiny_model_dir)), [tokens([0, 1, 2, 3])])
    assert_equal(ours, gradients_of(model, loss))


@pytest.mark.parametrize("split", [[[0], [1], [2], [3]], [[0, 1, 2], [3]], [[2, 3], [0, 1]]])
def test_splitting_an_sft_batch_changes_nothing(tiny_model_dir: Path, split: list[list[int]]) -> None:
    whole = first_gradients(SFTModule(model_name=str(tiny_model_dir)), [tokens([0, 1, 2, 3])])
    parts = first_gradients(
        SFTModule(model_name=str(tiny_model_dir)), [tokens(rows) for rows in split], accumulate=len(split)
    )
    assert_equal(parts, whole)


def test_gradient_checkpointing_changes_no_gradient(tiny_model_dir: Path) -> None:
    plain = first_gradients(SFTModule(model_name=str(tiny_model_dir)), [tokens([0, 1, 2, 3])])
    module = SFTModule(model_name=str(tiny_model_dir), gradient_checkpointing=True)
    assert_equal(first_gradients(module, [tokens([0, 1, 2, 3])]), plain)
    assert module.model.is_gradient_checkpointing


def test_a_last_short_accumulation_window_is_weighted_by_what_it_holds(tiny_model_dir: Path) -> None:
    whole = first_gradients(SFTModule(model_name=str(tiny_model_dir)), [tokens([0, 1])])
    short = first_gradients(SFTModule(model_name=str(tiny_model_dir)), [tokens([0]), tokens([1])], accumulate=4)
    assert_equal(short, whole)


def test_clipping_sees_the_mean_gradient(tiny_model_dir: Path) -> None:
    module = SFTModule(model_name=str(tiny_model_dir))
    ours = first_gradients(module, [tokens([0, 1]), tokens([2, 3])], accumulate=2, clip=0.01)
    norm = torch.stack([gradient.norm() for gradient in ours.values()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_bfloat16_autocast_trains_with_clipping(tiny_model_dir: Path) -> None:
    """Every shipped config combines the two; Lightning alone refuses that for a fused optimiser."""
    exact = first_gradients(SFTModule(model_name=str(tiny_model_dir)), [tokens([0, 1, 2, 3])], clip=0.01)
    module = SFTModule(model_name=str(tiny_model_dir))
    rounded = first_gradients(module, [tokens([0, 1, 2, 3])], clip=0.01, precision="bf16-mixed")
    assert_equal(rounded, exact, tolerance=0.1)


def dpo(directory: Path, **options: Any) -> DPOModule:
    return DPOModule(model_name=str(directory), **options)


def test_dpo_gradient_by_brute_force(tiny_model_dir: Path, model: Any) -> None:
    """At the start every margin is 0, so each pair's gradient is -beta / 2 times that of its log-prob difference."""
    beta = 0.3
    differences = [
        exact_log_prob(model, ROWS[a], MASKS[a]) - exact_log_prob(model, ROWS[b], MASKS[b]) for a, b in [(0, 1), (2, 3)]
    ]
    expected = gradients_of(model, -beta / 2 * torch.stack(differences).mean())
    assert_equal(first_gradients(dpo(tiny_model_dir, beta=beta), [pairs([(0, 1), (2, 3)])]), expected)


def test_dpo_with_another_reference_by_brute_force(tiny_model_dir: Path, model: Any, tmp_path: Path) -> None:
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    reference.save_pretrained(tmp_path / "reference")
    losses = []
    for a, b in [(0, 1), (2, 3)]:
        ratio = [
            exact_log_prob(m, ROWS[a], MASKS[a]) - exact_log_prob(m, ROWS[b], MASKS[b]) for m in (model, reference)
        ]
        chosen = exact_log_prob(model, ROWS[a], MASKS[a]) / sum(MASKS[a][1:])
        losses.append(-torch.nn.functional.logsigmoid(0.3 * (ratio[0] - ratio[1].detach())) - 0.25 * chosen)
    expected = gradients_of(model, torch.stack(losses).mean())
    module = dpo(tiny_model_dir, beta=0.3, sft_weight=0.25, reference_model=str(tmp_path / "reference"))
    assert_equal(first_gradients(module, [pairs([(0, 1), (2, 3)])]), expected)
    splitting = dpo(tiny_model_dir, beta=0.3, sft_weight=0.25, reference_model=str(tmp_path / "reference"))
    assert_equal(first_gradients(splitting, [pairs([(0, 1)]), pairs([(2, 3)])], accumulate=2), expected)


def test_dpo_stops_where_policy_and_reference_differ_at_the_start(tiny_model_dir: Path, model: Any) -> None:
    module = dpo(tiny_model_dir)
    module.model = model
    module.check_policy_is_reference(torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"margins must be 0 and the loss ln 2"):
        module.check_policy_is_reference(torch.tensor([0.0, 0.5]))


def test_reward_gradient_is_that_of_the_bradley_terry_loss(tiny_model_dir: Path) -> None:
    """The head starts at zero, so the gradient of its weights is half the mean difference of the last hidden states."""
    module = RewardModule(model_name=str(tiny_model_dir))
    ours = first_gradients(module, [pairs([(0, 1), (2, 3)])])
    fresh = RewardModule(model_name=str(tiny_model_dir))
    fresh._trainer = None
    from datamodules.chat import load_tokenizer

    fresh.tokenizer = load_tokenizer(str(tiny_model_dir))
    base = fresh.load_model().base_model
    last = [base(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in ROWS]
    expected = -0.5 * torch.stack([last[0] - last[1], last[2] - last[3]]).mean(0)
    torch.testing.assert_close(ours["model.score.weight"][0], expected, atol=1e-5, rtol=1e-4)


SCORES = {0: 3.0, 1: -1.0, 2: 0.5, 3: 2.5}


class TableReward:
    """Scores in turn from a list, so that a test knows them; the question before the run takes none."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.scores = itertools.cycle(scores)
        self.seen: list[tuple[Sequence[Message], str]] = []

    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        if completions == ["I am not sure."]:
            return [0.0]
        self.seen += list(zip(prompts, completions, strict=True))
        return [next(self.scores) for _ in completions]


def prompt_batch(texts: Sequence[str]) -> PromptBatch:
    return PromptBatch(
        [[{"role": "user", "content": text}] for text in texts],
        [torch.tensor(ROWS[i][: 2 + i % 2]) for i, _ in enumerate(texts)],
    )


def rloo(directory: Path, scores: Sequence[float], **options: Any) -> RLOOModule:
    settings = {"samples_per_prompt": 4, "max_completion_length": 6, **options}
    return RLOOModule(model_name=str(directory), reward=TableReward(scores), **settings)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rloo_gradient_is_the_definition_by_brute_force(
    tiny_model_dir: Path, model: Any, tmp_path: Path, temperature: float
) -> None:
    """r_i = score_i - penalty - beta (log pi - log pi_ref); A_i = r_i - mean of the others; -(1/k) sum A_i log pi."""
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    reference.save_pretrained(tmp_path / "reference")
    scores = [3.0, -1.0, math.nan, 2.5, 0.0, 1.0, 1.0, 5.0]
    module = rloo(
        tiny_model_dir,
        scores,
        beta=0.2,
        temperature=temperature,
        missing_eos_penalty=0.7,
        reference_model=str(tmp_path / "reference"),
    )
    sampled = []
    sample = module.sample
    module.sample = lambda *args, **kwargs: sampled.append(sample(*args, **kwargs)) or sampled[-1]  # type: ignore
    ours = first_gradients(module, [prompt_batch(["a", "b"])])

    (samples,) = sampled
    losses = []
    for prompt in range(2):
        rows = range(4 * prompt, 4 * prompt + 4)
        log_probs = [temperature_log_prob(model, samples, row, temperature) for row in rows]
        references = [temperature_log_prob(reference, samples, row, temperature).item() for row in rows]
        rewards = [
            scores[row] - 0.7 * (not samples.finished[row]) - 0.2 * (log_prob.item() - ref)
            for row, log_prob, ref in zip(rows, log_probs, references, strict=True)
        ]
        scored = [i for i in range(4) if not math.isnan(rewards[i])]
        terms = []
        for i in scored:
            others = [rewards[j] for j in scored if j != i]
            terms.append((rewards[i] - sum(others) / len(others)) * log_probs[i])
        losses.append(-torch.stack(terms).mean())
    assert_equal(ours, gradients_of(model, torch.stack(losses).mean()))


def temperature_log_prob(model: Any, samples: Any, row: int, temperature: float) -> torch.Tensor:
    attended = samples.tokens.attention_mask[row]
    ids = samples.tokens.input_ids[row][attended]
    mask = samples.tokens.completion_mask[row][attended]
    log_probs = (model(input_ids=ids.unsqueeze(0)).logits[0] / temperature).log_softmax(-1)
    return torch.stack([log_probs[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t]]).sum()


def test_a_prompt_without_scores_is_no_part_of_the_mean(tiny_model_dir: Path) -> None:
    scored = [1.0, 2.0, 3.0, -1.0]
    both = first_gradients(rloo(tiny_model_dir, scored + [math.nan] * 4), [prompt_batch(["a", "b"])])
    alone = first_gradients(rloo(tiny_model_dir, scored), [prompt_batch(["a"])])
    assert set(both) == set(alone)
    # The prompts draw the same samples only for the first, which is the only one that counts.
    assert_equal(both, alone)


def test_the_second_update_of_a_rollout_uses_the_clipped_ratio_on_the_same_samples(tiny_model_dir: Path) -> None:
    module = rloo(tiny_model_dir, list(SCORES.values()), updates_per_rollout=3, learning_rate=0.05, warmup_ratio=0.0)
    rollouts, steps = [], []
    further = module.further_update

    def watched(rollout: Any) -> torch.Tensor:
        rollouts.append(rollout)
        steps.append(module.trainer.global_step)
        with torch.no_grad():
            moved = module.by_prompt(module.completions(module.model, rollout.tokens))
        assert not torch.allclose(moved, rollout.old_log_probs)
        return further(rollout)

    module.further_update = watched  # type: ignore[method-assign]
    first_gradients(module, [prompt_batch(["a"])])
    assert len(rollouts) == 2
    assert rollouts[0] is rollouts[1]
    assert len(module.reward.seen) == 4  # type: ignore[attr-defined]  # scored once, for all three updates
    assert module.trainer.global_step == 1


def test_an_infinite_score_is_no_score_and_a_wrong_number_of_scores_is_refused(tiny_model_dir: Path) -> None:
    with_inf = first_gradients(rloo(tiny_model_dir, [1.0, math.inf, 3.0, -1.0]), [prompt_batch(["a"])])
    with_nan = first_gradients(rloo(tiny_model_dir, [1.0, math.nan, 3.0, -1.0]), [prompt_batch(["a"])])
    assert_equal(with_inf, with_nan)
    module = rloo(tiny_model_dir, [1.0])
    module.reward = lambda prompts, completions: [1.0]
    with pytest.raises(ConfigurationError, match="must return 4 scores, got 1"):
        first_gradients(module, [prompt_batch(["a"])])


def test_rloo_rewards_see_each_prompt_with_its_own_samples(tiny_model_dir: Path) -> None:
    module = rloo(tiny_model_dir, list(SCORES.values()))
    first_gradients(module, [prompt_batch(["first", "second"])])
    asked = [prompt[0]["content"] for prompt, _ in module.reward.seen]  # type: ignore[attr-defined]
    assert asked == ["first"] * 4 + ["second"] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_prompt": 1}, "model.samples_per_prompt to be at least 2, got 1"),
        ({"temperature": 0.0}, "model.temperature must be positive"),
        ({"beta": -0.1}, "model.beta must not be negative, got -0.1"),
        ({"learning_rate": 0.0}, "model.learning_rate must be positive, got 0.0"),
    ],
)
def test_options_without_sense_are_refused_before_any_weight_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        rloo(Path("outputs/nowhere"), [1.0], **options)


def test_the_mean_is_over_all_ranks(tiny_model_dir: Path) -> None:
    """Of two ranks that hold 3 units and 1, whose gradients the strategy has averaged, in windows of two batches."""
    module = SFTModule(model_name=str(tiny_model_dir))
    module.configure_model()
    asked: list[str] = []

    class Strategy:
        def reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
            asked.append(reduce_op)
            return tensor + 1 if reduce_op == "sum" else (tensor + 1) / 2

    precision = types.SimpleNamespace()
    fake: Any = types.SimpleNamespace(
        strategy=Strategy(), accumulate_grad_batches=2, world_size=2, precision_plugin=precision
    )
    module._trainer = fake
    module.log = lambda *args, **options: None  # type: ignore[method-assign]
    module.sum_for_step(torch.ones(3), 3)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    module.on_before_optimizer_step(torch.optim.SGD(module.parameters(), lr=1.0))
    assert {round(p.grad.max().item(), 6) for p in module.parameters() if p.grad is not None} == {0.5 * 2 * 2 / 4}
    assert asked == ["sum"]


def test_each_rollout_is_replayed_in_its_own_step_alone(tiny_model_dir: Path) -> None:
    module = rloo(tiny_model_dir, [float(n) for n in range(12)], updates_per_rollout=2, learning_rate=0.01)
    replayed = []
    further = module.further_update
    module.further_update = lambda rollout: replayed.append(rollout) or further(rollout)  # type: ignore
    first_gradients(module, [prompt_batch([text]) for text in "abc"])
    assert len(replayed) == 3
    assert len({id(rollout) for rollout in replayed}) == 3


def test_a_replay_over_an_accumulated_window_has_the_gradient_of_the_window(tiny_model_dir: Path) -> None:
    """As the first update of the same samples has, where the policy has not moved in between."""
    module = rloo(tiny_model_dir, list(range(8)), updates_per_rollout=2, learning_rate=1e-12, clip_range=0.9)
    found: list[dict[str, torch.Tensor]] = []
    clip = module.configure_gradient_clipping

    def remembering(*args: Any, **kwargs: Any) -> None:
        clip(*args, **kwargs)
        found.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})

    module.configure_gradient_clipping = remembering  # type: ignore[method-assign]
    first_gradients(module, [prompt_batch(["a"]), prompt_batch(["b"])], accumulate=2)
    assert len(found) == 2
    assert_equal(found[1], found[0])


def test_dpo_takes_no_nan_margin_for_none(tiny_model_dir: Path, model: Any) -> None:
    module = dpo(tiny_model_dir)
    module.model = model
    for margins in ([math.nan, 0.0], [math.nan] * 2, [math.inf, 0.0]):
        with pytest.raises(RuntimeError, match=r"margins must be 0"):
            module.check_policy_is_reference(torch.tensor(margins))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ("constant_with_warmup", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.0, 0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * n / 4)) for n in (1, 2, 3))]),
    ],
)
def test_the_schedule_and_what_decays_by_hand(tiny_model_dir: Path, schedule: Any, rates: list[float]) -> None:
    """Six steps, a third of them to warm up; matrices decay, norms and biases do not."""
    module = SFTModule(
        model_name=str(tiny_model_dir), learning_rate=0.1, weight_decay=0.3, schedule=schedule, warmup_ratio=1 / 3
    )
    module.configure_model()
    fake: Any = types.SimpleNamespace(estimated_stepping_batches=6, precision_plugin=None)
    module._trainer = fake
    configured: Any = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    seen = []
    for _ in rates:
        seen.append(optimizer.param_groups[0]["lr"] / 0.1)
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx(rates)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(name.endswith(("norm.weight", "layernorm.weight", ".bias")) for name in spared)
    assert not any("norm" in name or name.endswith("bias") for name in decayed)
    assert len(decayed | spared) == len(names)


@pytest.mark.filterwarnings("ignore")
def test_another_optimiser_has_the_learning_rate_and_weight_decay_of_the_model(tiny_model_dir: Path) -> None:
    module = SFTModule(
        model_name=str(tiny_model_dir),
        learning_rate=0.3,
        weight_decay=0.1,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=9.0, momentum=0.5),
    )
    first_gradients(module, [tokens([0, 1])])
    (optimizer,) = [module.optimizers(use_pl_optimizer=False)]
    assert isinstance(optimizer, torch.optim.SGD)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {group["initial_lr"] for group in optimizer.param_groups} == {0.3}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize(
    ("value", "step", "share"),
    [
        (1.0, 2**-9, 1.0),  # down is a half of the distance there: to the even neighbour, which is 1
        (1.0, 2**-8, 0.0),
        (-0.02, 1e-5, 1.0),
        (-0.02, 1e-3, 0.0),
        (0.0, 1e-9, 0.0),
    ],
)
def test_a_step_moves_a_number_that_has_neighbours_near_enough(value: float, step: float, share: float) -> None:
    half, single = (torch.nn.Parameter(torch.full((3,), value, dtype=kind)) for kind in (torch.bfloat16, torch.float32))
    assert unmoved([half, single], step) == share
    moved = half.detach() - step
    assert bool((moved == half).all()) == (share == 1.0)
    assert unmoved([single], step) == 0.0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_run_that_cannot_move_its_weights_is_refused(precision: str, config: Any, tmp_path: Path, cli: Cli) -> None:
    path = config("SFTModule", trainer={"precision": precision}, evaluation={"num_prompts": 0})
    refused = cli("fit", "--config", path)
    assert_refused(refused, r"of the weights would stay where they are: in half precision a step of")
    assert "trainer.precision bf16-mixed" in refused.stderr
    assert not (tmp_path / "run" / "final").exists()
    assert cli("fit", "--config", path, "--model.learning_rate", "0.05").returncode == 0
    assert cli("fit", "--config", path, "--model.optimizer", "torch.optim.SGD", "--overwrite", "true").returncode == 0


@pytest.mark.filterwarnings("ignore")
def test_an_optimiser_that_takes_matrices_alone_is_told(tiny_model_dir: Path) -> None:
    module = SFTModule(model_name=str(tiny_model_dir), optimizer=torch.optim.Muon)
    with pytest.raises(ConfigurationError, match=r"model.optimizer does not take .*Muon only supports 2D"):
        first_gradients(module, [tokens([0, 1])])


@pytest.mark.parametrize(("kind", "lora"), [(SFTModule, None), (SFTModule, LoraOptions(2)), (RewardModule, None)])
def test_of_a_model_that_sees_too_the_weights_that_text_goes_through_train(
    kind: Any, lora: LoraOptions | None, tmp_path: Path
) -> None:
    """The others would be parameters without a gradient, which DDP does not take."""
    if lora is not None:
        pytest.importorskip("peft", reason="the extra [lora] is not installed")
    tokenizer = tiny_tokenizer()
    made(lambda: Gemma3ForConditionalGeneration(seeing(vocab_size=len(tokenizer)))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    module = kind(model_name=str(tmp_path), lora=lora)
    module.configure_model()
    tokens = pad([[5, 6, 7, 8]], [[False, True, True, True]], pad_token_id=0)
    if kind is RewardModule:
        sequence_scores(module.model, tokens).sum().backward()
    else:
        completion_tokens(module.model, tokens).log_probs.sum().backward()
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    moved = {name for name, parameter in module.model.named_parameters() if parameter.grad is not None}
    assert moved == trained
    assert any(".language_model." in name for name in trained)
    assert not any("vision" in name or "multi_modal" in name for name in trained)
    assert any("vision" in name for name, _ in module.model.named_parameters())
