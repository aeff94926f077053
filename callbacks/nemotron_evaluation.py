"""Asks a reward model, at epoch end, whether the policy answers held-out prompts better than a reference model."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from callbacks.evaluation_cache import EvaluationCache
from callbacks.evaluation_completions import Decoding, complete
from callbacks.evaluation_files import write
from callbacks.evaluation_metrics import Pair, Side, evaluation_metrics
from callbacks.evaluation_monitors import Monitors
from callbacks.evaluation_report import calls_told, log_pairs, logged_numbers, report
from callbacks.evaluation_scores import Scorer
from datamodules.chat import load_tokenizer, stop_token_ids
from datamodules.errors import ConfigurationError
from datamodules.prompts import Prompt, load_prompts
from lightning_modules.base import FineTuningModule, require
from lightning_modules.generation import Samples, sample_completions
from lightning_modules.identity import directory_digest, weights_digest
from lightning_modules.loading import load_causal_lm, load_config
from lightning_modules.rewards import NemotronReward, Reward, resolve_reward
from lightning_modules.rewards.base import reward_name
from lightning_modules.rewards.preflight import is_model, judge_preflight, preflight, remote_parts, time_plan


class NemotronEvaluation(Callback):
    """Win rate against a reference model, average rewards, reward improvement and length ratio on held-out prompts.

    Both models complete the same prompts with the same seeds, so the policy compared with itself ties everywhere.
    Completions and scores are kept on disk and never paid for twice: not by another epoch, method or process, nor
    after a kill.

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
        cache_dir: Where completions and scores are kept for whoever asks again; ``cache`` beside the run's folder
            where not given.
        check_judge: Before training, have a reward model score a clearly good and a clearly bad answer.
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
        cache_dir: str | None = None,
        check_judge: bool = True,
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
        self.decoding = Decoding(max_completion_length, temperature, top_p, seed)
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.max_failed_share = max_failed_share
        self.cache_dir = cache_dir
        self.check_judge = check_judge
        self._prompts: list[Prompt] = []
        self._digests: dict[str, str] = {}
        self._memory = EvaluationCache(Path(":memory:"))
        self._monitors = Monitors()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the prompts and try the reward source, before any model is loaded."""
        if stage == "fit":
            self._monitors.watch(trainer, evaluates=self._evaluates(pl_module))
        if self._prompts or not self._evaluates(pl_module) or stage not in ("fit", "validate"):
            return
        assert isinstance(pl_module, FineTuningModule)
        if self.reference_model is not None:
            load_config(self.reference_model, option="evaluation.reference_model")
        elif stage == "validate":
            raise ConfigurationError("validate compares with evaluation.reference_model, which is not given")
        data = getattr(trainer, "datamodule", None)
        self._prompts = load_prompts(
            self.dataset_name,
            self.split,
            tokenizer=load_tokenizer(pl_module.model_name),
            count=self.num_prompts,
            max_length=self.max_prompt_length,
            held_out=True if self.dataset_name == getattr(data, "dataset_name", None) else None,
        )
        self._open_cache(trainer).close()
        for part in remote_parts(self.reward):
            part.share_budget(processes=trainer.world_size, machines=trainer.num_nodes)
        told = self._preflight() if trainer.is_global_zero else None
        told = trainer.strategy.broadcast(told)
        if told is not None:
            raise ConfigurationError(told)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._monitors.evaluated = False

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or getattr(trainer, "fast_dev_run", False) or not self._evaluates(pl_module):
            return
        assert isinstance(pl_module, FineTuningModule)
        self._monitors.evaluated = False
        numbers: dict[str, float] = {}
        if self._is_due(trainer):
            metrics = self.evaluate(trainer, pl_module, self._folder(trainer))
            self._monitors.evaluated = metrics["valid"]
            numbers = logged_numbers(metrics)
            for name, value in numbers.items():
                pl_module.log(name, value, rank_zero_only=False, batch_size=1)
        for name in self._monitors.names - set(numbers):  # a checkpoint callback expects a value at every validation
            pl_module.log(name, math.nan, rank_zero_only=False, batch_size=1)

    def evaluate(self, trainer: Trainer, module: FineTuningModule, directory: Path) -> dict[str, Any]:
        """Complete, score, and write ``metrics.json`` and ``pairs.jsonl``; the same metrics on every rank."""
        mine = list(range(trainer.global_rank, len(self._prompts), trainer.world_size))
        before = sum((part.calls for part in remote_parts(self.reward)), Counter())
        with self._open_cache(trainer) as cache:
            policy = self._policy_completions(trainer, module, mine, cache)
            reference = self._reference_completions(trainer, module, mine, cache)
            scorer, scores = self._scores(trainer, mine, policy, reference, cache)
        rows = {
            number: Pair.of(
                prompt.messages,
                policy_side,
                reference_side,
                *scores[2 * i : 2 * i + 2],
                prompt_tokens=prompt.tokens,
                source=prompt.source,
            )
            for i, (number, policy_side, reference_side) in enumerate(zip(mine, policy, reference, strict=True))
            if (prompt := self._prompts[number])
        }
        requests = sum((part.calls for part in remote_parts(self.reward)), Counter()) - before
        calls = Counter(asked=scorer.asked, cached=scorer.cached) + requests
        pairs, calls, reasons = gathered(rows, calls, scorer.error or getattr(self.reward, "last_error", ""))
        metrics = {
            **evaluation_metrics(pairs),
            "reward_source": reward_name(self.reward),
            "reference": self.reference_model or module.model_name,
            "calls": calls_told(calls),
        }
        metrics["valid"] = metrics["failed"] <= self.max_failed_share * metrics["prompts"]
        if trainer.is_global_zero:
            write(directory, metrics, pairs)
            report(metrics, reasons)
            log_pairs(trainer.loggers, pairs)
        return metrics

    def _evaluates(self, module: LightningModule) -> bool:
        return self.num_prompts > 0 and isinstance(module, FineTuningModule) and module.can_generate

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether this is a validation on its own, or the last of an epoch that is to be evaluated."""
        if trainer.state.fn != "fit":
            return True
        left = trainer.num_training_batches - trainer.fit_loop.batch_idx - 1
        later_check = left >= (trainer.val_check_batch or 1)
        return not later_check and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _folder(self, trainer: Trainer) -> Path:
        """``eval/epoch=N`` of a fit, ``eval/final`` of a model, ``eval/<name>`` of a checkpoint."""
        name = f"epoch={trainer.current_epoch}" if trainer.state.fn == "fit" else "final"
        if trainer.state.fn != "fit" and trainer.ckpt_path is not None:
            name = Path(trainer.ckpt_path).stem
        return Path(trainer.default_root_dir) / "eval" / name

    def _preflight(self) -> str | None:
        """Try the reward source and say how long an evaluation takes; the reason if it cannot be had."""
        try:
            answer_s = 0.0
            if self.check_judge and is_model(self.reward):
                answer_s = judge_preflight(self.reward, option="evaluation.reward")
            else:
                preflight(self.reward, self._prompts[0].messages, option="evaluation.reward")
            for part in remote_parts(self.reward):
                rank_zero_info(time_plan(part, len(self._prompts), answer_s))
        except ConfigurationError as error:
            return str(error)
        return None

    def _open_cache(self, trainer: Trainer) -> EvaluationCache:
        """One file for the runs beside this one; one more for each further machine, as SQLite's locks end there."""
        directory = Path(self.cache_dir) if self.cache_dir else Path(trainer.default_root_dir).parent / "cache"
        machine = f"-{trainer.node_rank}" if trainer.node_rank else ""
        return EvaluationCache(directory / f"evaluation{machine}.sqlite")

    def _policy_completions(
        self, trainer: Trainer, module: FineTuningModule, mine: Sequence[int], cache: EvaluationCache
    ) -> list[Side]:
        return self._complete(
            trainer,
            lambda: module.model,
            module.tokenizer,
            mine,
            cache,
            digest=weights_digest(module.model),
            title="policy completions",
        )

    def _reference_completions(
        self, trainer: Trainer, module: FineTuningModule, mine: Sequence[int], cache: EvaluationCache
    ) -> list[Side]:
        name = self.reference_model or module.model_name
        tokenizer = load_tokenizer(name)

        def load() -> PreTrainedModel:
            model = load_causal_lm(name, tokenizer, option="evaluation.reference_model").eval()
            return model.to(device=module.device, dtype=module.model.dtype)  # type: ignore[arg-type, no-any-return]

        return self._complete(
            trainer, load, tokenizer, mine, cache, digest=self._reference_digest(name), title="reference completions"
        )

    def _complete(
        self,
        trainer: Trainer,
        load: Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        mine: Sequence[int],
        cache: EvaluationCache,
        *,
        digest: str,
        title: str,
    ) -> list[Side]:
        loaded = functools.cache(load)

        def sample(prompt_ids: list[Tensor], seeds: list[int]) -> Samples:
            model = loaded()
            with trainer.precision_plugin.forward_context():
                return sample_completions(  # type: ignore[no-any-return]
                    model,
                    prompt_ids,
                    max_completion_length=self.decoding.max_completion_length,
                    stop_token_ids=stop_token_ids(tokenizer),
                    seeds=seeds,
                    temperature=self.decoding.temperature,
                    top_p=self.decoding.top_p,
                )

        arithmetic = f"{trainer.precision} {trainer.strategy.root_device.type}"
        with progress(trainer, title, len(mine), "prompt") as bar:
            return complete(
                sample,
                tokenizer,
                {number: self._prompts[number].messages for number in mine},
                model_digest=f"{digest} {arithmetic}",
                decoding=self.decoding,
                batch_size=self.batch_size,
                cache=cache,
                on_completion=bar.update,
            )

    def _scores(
        self,
        trainer: Trainer,
        mine: Sequence[int],
        policy: Sequence[Side],
        reference: Sequence[Side],
        cache: EvaluationCache,
    ) -> tuple[Scorer, list[float]]:
        """The scores pair by pair, policy first, so that what is scored before a limit is whole pairs."""
        prompts = [self._prompts[number].messages for number in mine for _ in range(2)]
        completions = [side.completion for pair in zip(policy, reference, strict=True) for side in pair]
        with progress(trainer, "scores", len(completions), "score") as bar:
            scorer = Scorer(self.reward, cache, self._memory, bar.update)
            return scorer, scorer(prompts, completions)

    def _reference_digest(self, name: str) -> str:
        if name not in self._digests:
            self._digests[name] = directory_digest(name)
        return self._digests[name]


def progress(trainer: Trainer, title: str, total: int, unit: str) -> Any:
    """A bar on the first process."""
    return tqdm(total=total, desc=title, unit=unit, disable=not trainer.is_global_zero, mininterval=1)


def gathered(pairs: dict[int, Pair], calls: Counter[str], reason: str) -> tuple[list[Pair], Counter[str], list[str]]:
    """Every rank's pairs in the order of the prompts, the sum of the calls, and the reasons for missing scores."""
    mine = (pairs, calls, reason)
    parts: list[Any] = [mine]
    if dist.is_available() and dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
    merged = {number: pair for part, _, _ in parts for number, pair in part.items()}
    reasons = list(dict.fromkeys(reason for _, _, reason in parts if reason))
    return [merged[number] for number in sorted(merged)], sum((count for _, count, _ in parts), Counter()), reasons
