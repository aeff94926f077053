"""Asks a reward model, at epoch end, whether the policy answers held-out prompts better than a reference model."""

import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from callbacks.evaluation_files import write, write_whole
from callbacks.evaluation_metrics import Pair, Side, evaluation_metrics
from callbacks.metrics_file import MetricsFile
from datamodules.chat import Message, encode_conversation, load_tokenizer, stop_token_ids
from datamodules.errors import ConfigurationError
from datamodules.prompts import load_prompts
from lightning_modules.base import FineTuningModule, require
from lightning_modules.generation import sample_completions
from lightning_modules.loading import load_causal_lm, load_config, model_identity
from lightning_modules.rewards import NemotronReward, Reward, resolve_reward
from lightning_modules.rewards.base import checked_scores, preflight, reward_identity, reward_name


class NemotronEvaluation(Callback):
    """Win rate against a reference model, average rewards, reward improvement and length ratio on held-out prompts.

    Both models complete the same prompts with the same seeds, so the policy compared with itself ties everywhere.
    The reference's completions and scores are made once and kept in the run's folder.

    Args:
        reward: Who judges: the hosted Nemotron model unless another ``lightning_modules.rewards.Reward``, or the
            directory of a reward model, is named.
        reference_model: Hub id or directory of the model to compare with; the starting policy where not given.
        dataset_name: Where the prompts come from: hub id, directory, or a file with ``messages`` or ``prompt``.
        split: Of a dataset with several.
        num_prompts: How many prompts; 0 switches the evaluation off.
        max_prompt_length: Prompts of more tokens are passed over.
        max_completion_length: Longest completion in tokens.
        temperature: Of the sampling; 0 for greedy.
        top_p: Sample from the likeliest tokens that hold this probability.
        batch_size: Prompts completed at once.
        every_n_epochs: Evaluate after every so many epochs.
        max_failed_share: Beyond this share of unscored pairs the evaluation is marked invalid.
        seed: Of the sampling.
    """

    def __init__(
        self,
        reward: Reward | str | None = None,
        reference_model: str | None = None,
        dataset_name: str = "HuggingFaceH4/ultrafeedback_binarized",
        split: str = "test_prefs",
        num_prompts: int = 100,
        max_prompt_length: int = 1024,
        max_completion_length: int = 256,
        temperature: float = 0.7,
        top_p: float = 1.0,
        batch_size: int = 32,
        every_n_epochs: int = 1,
        max_failed_share: float = 0.1,
        seed: int = 42,
    ) -> None:
        require(num_prompts >= 0, "evaluation.num_prompts must not be negative", num_prompts)
        require(temperature >= 0, "evaluation.temperature must not be negative", temperature)
        require(0 < top_p <= 1, "evaluation.top_p must be within 0..1", top_p)
        require(0 <= max_failed_share <= 1, "evaluation.max_failed_share must be within 0..1", max_failed_share)
        for option, value in (
            ("max_completion_length", max_completion_length),
            ("batch_size", batch_size),
            ("every_n_epochs", every_n_epochs),
        ):
            require(value >= 1, f"evaluation.{option} must be at least 1", value)
        self.reward = NemotronReward() if reward is None else resolve_reward(reward, option="evaluation.reward")
        self.reference_model = reference_model
        self.dataset_name = dataset_name
        self.split = split
        self.num_prompts = num_prompts
        self.max_prompt_length = max_prompt_length
        self.max_completion_length = max_completion_length
        self.temperature = temperature
        self.top_p = top_p
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.max_failed_share = max_failed_share
        self.seed = seed
        self._prompts: list[list[Message]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the prompts and ask the reward source for a first score, before any model is loaded."""
        if self._prompts or not self._evaluates(pl_module) or stage not in ("fit", "validate"):
            return
        assert isinstance(pl_module, FineTuningModule)
        if self.reference_model is not None:
            load_config(self.reference_model, option="evaluation.reference_model")
        elif stage == "validate":
            raise ConfigurationError("validate compares with evaluation.reference_model, which is not given")
        if isinstance(self.reward, NemotronReward):
            self.reward.share_budget(trainer.world_size)
        data = getattr(trainer, "datamodule", None)
        self._prompts = load_prompts(
            self.dataset_name,
            self.split,
            tokenizer=load_tokenizer(pl_module.model_name),
            count=self.num_prompts,
            max_length=self.max_prompt_length,
            held_out=True if self.dataset_name == getattr(data, "dataset_name", None) else None,
        )
        preflight(self.reward, self._prompts[0], option="evaluation.reward")

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or getattr(trainer, "fast_dev_run", False) or not self._evaluates(pl_module):
            return
        fitting = trainer.state.fn == "fit"
        if fitting:
            left = trainer.num_training_batches - trainer.fit_loop.batch_idx - 1
            later_check = left >= (trainer.val_check_batch or 1)
            if later_check or (trainer.current_epoch + 1) % self.every_n_epochs:
                return
        assert isinstance(pl_module, FineTuningModule)
        folder = f"epoch={trainer.current_epoch}" if fitting else "final"
        directory = Path(trainer.default_root_dir) / "eval" / folder
        metrics = self.evaluate(trainer, pl_module, directory)
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        for name in ("win_rate", "reward_improvement"):
            numbers[f"{name}_low"], numbers[f"{name}_high"] = metrics[f"{name}_ci"]
        for name, value in numbers.items():
            pl_module.log(f"eval/{name}", float(value), rank_zero_only=False, batch_size=1)

    def evaluate(self, trainer: Trainer, module: FineTuningModule, directory: Path) -> dict[str, Any]:
        """Complete, score, and write ``metrics.json`` and ``pairs.jsonl``; the same metrics on every rank."""
        mine = list(range(trainer.global_rank, len(self._prompts), trainer.world_size))
        show = trainer.is_global_zero
        with trainer.precision_plugin.forward_context():
            policy = self._complete(module.model, module.tokenizer, mine, "policy completions", show)
        rewards = self._score(mine, policy, "policy scores", show)
        reference, reference_rewards = self._reference(trainer, module, mine, show)
        rows = [
            Pair.of(self._prompts[i], side, reference_side, score, reference_score)
            for i, side, reference_side, score, reference_score in zip(
                mine, policy, reference, rewards, reference_rewards, strict=True
            )
        ]
        pairs = gathered(dict(zip(mine, rows, strict=True)))
        metrics = {
            **evaluation_metrics(pairs),
            "reward_source": reward_name(self.reward),
            "reference": self.reference_model or module.model_name,
        }
        metrics["valid"] = metrics["failed"] <= self.max_failed_share * metrics["prompts"]
        if trainer.is_global_zero:
            write(directory, metrics, pairs)
            self._report(trainer, metrics, pairs)
        return metrics

    def _evaluates(self, module: LightningModule) -> bool:
        return self.num_prompts > 0 and isinstance(module, FineTuningModule) and module.can_generate

    def _complete(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        indices: Sequence[int],
        title: str,
        show: bool,
    ) -> list[Side]:
        sides: list[Side] = []
        with tqdm(total=len(indices), desc=title, unit="prompt", disable=not show, mininterval=1) as bar:
            for start in range(0, len(indices), self.batch_size):
                rows = indices[start : start + self.batch_size]
                encoded = [
                    encode_conversation(tokenizer, self._prompts[row], add_generation_prompt=True) for row in rows
                ]
                samples = sample_completions(
                    model,
                    [torch.tensor(prompt.input_ids) for prompt in encoded],
                    max_completion_length=self.max_completion_length,
                    stop_token_ids=stop_token_ids(tokenizer),
                    seeds=[random.Random(f"{self.seed}-{row}").getrandbits(63) for row in rows],
                    temperature=self.temperature,
                    top_p=self.top_p,
                )
                lengths = samples.completion_lengths().tolist()
                sides.extend(Side(text, n) for text, n in zip(samples.texts(tokenizer), lengths, strict=True))
                bar.update(len(rows))
        return sides

    def _score(self, indices: Sequence[int], sides: Sequence[Side], title: str, show: bool) -> list[float]:
        prompts = [self._prompts[row] for row in indices]
        with tqdm(total=len(sides), desc=title, unit="score", disable=not show, mininterval=1) as bar:
            if isinstance(self.reward, NemotronReward):
                self.reward.on_progress = bar.update
            scores = checked_scores(self.reward, prompts, [side.completion for side in sides])
            bar.update(len(sides) - bar.n)
        return scores

    def _reference(
        self, trainer: Trainer, module: FineTuningModule, mine: Sequence[int], show: bool
    ) -> tuple[list[Side], list[float]]:
        """The reference's completions and scores: from the run's folder, or made and kept there."""
        name = self.reference_model or module.model_name
        path = Path(trainer.default_root_dir) / "eval" / f"reference-{trainer.global_rank}-{self._key(name, mine)}.json"
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            sides = [Side(*side) for side in kept["sides"]]
            scores = [math.nan if score is None else score for score in kept["scores"]]
        else:
            tokenizer = load_tokenizer(name)
            model = load_causal_lm(name, tokenizer, option="evaluation.reference_model").eval()
            model.to(device=module.device, dtype=module.model.dtype)  # type: ignore[arg-type]
            with trainer.precision_plugin.forward_context():
                sides = self._complete(model, tokenizer, mine, "reference completions", show)
            scores = [math.nan] * len(sides)
            del model
        unscored = [i for i, score in enumerate(scores) if math.isnan(score)]
        if unscored:
            new = self._score([mine[i] for i in unscored], [sides[i] for i in unscored], "reference scores", show)
            for i, score in zip(unscored, new, strict=True):
                scores[i] = score
            kept = {"sides": sides, "scores": [None if math.isnan(score) else score for score in scores]}
            write_whole(path, json.dumps(kept, ensure_ascii=False))
        return sides, scores

    def _key(self, reference: str, indices: Sequence[int]) -> str:
        facts = [
            model_identity(reference),
            [self._prompts[index] for index in indices],
            [self.max_completion_length, self.temperature, self.top_p, self.seed],
            reward_identity(self.reward),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def _report(self, trainer: Trainer, metrics: dict[str, Any], pairs: Sequence[Pair]) -> None:
        low, high = metrics["win_rate_ci"]
        rank_zero_info(
            f"evaluation on {metrics['prompts']} prompts: win rate {shown(metrics['win_rate'])} "
            f"[{shown(low)}, {shown(high)}], {metrics['wins']} wins, {metrics['ties']} ties, "
            f"{metrics['losses']} losses, {metrics['failed']} failed; "
            f"reward {shown(metrics['average_reward'])} against {shown(metrics['average_reference_reward'])}, "
            f"length ratio {shown(metrics['length_ratio'])}"
        )
        if not metrics["valid"]:
            reason = getattr(self.reward, "last_error", "") or "the reward source gave no score"
            rank_zero_warn(
                f"the evaluation is not valid: {metrics['failed']} of {metrics['prompts']} pairs have no score "
                f"({reason})"
            )
        columns = list(Pair.__annotations__)
        rows = [[json.dumps(value) if isinstance(value, list) else value for value in pair] for pair in pairs]
        for logger in trainer.loggers:
            if hasattr(logger, "log_table") and not isinstance(logger, MetricsFile):
                logger.log_table("eval/pairs", columns=columns, data=rows)


def gathered(mine: dict[int, Pair]) -> list[Pair]:
    """Every rank's pairs, in the order of the prompts."""
    parts: list[dict[int, Pair] | None] = [mine]
    if dist.is_available() and dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
    merged = {index: pair for part in parts if part is not None for index, pair in part.items()}
    return [merged[index] for index in sorted(merged)]


def shown(value: float) -> str:
    """A number for people; a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:.3f}"
