"""Asks a reward model, at epoch end, whether the policy answers held-out prompts better than a reference model."""

import contextlib
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from callbacks.evaluation.cache import ScoreMemory, open_cache
from callbacks.evaluation.completions import REFERENCE, Decoding, check_reader, completers
from callbacks.evaluation.evaluate import evaluate
from callbacks.evaluation.monitors import Monitors
from callbacks.evaluation.report import keep, report
from callbacks.evaluation.result import EvaluationResult
from callbacks.evaluation.result_record import read_result
from callbacks.evaluation.schedule import ends_here, folder, is_due, judged
from callbacks.evaluation.scores import Scorer
from callbacks.lightning_internals import epochs_begun
from core.errors import ConfigurationError
from core.progress import bar
from datamodules.base import ChatDataModule
from datamodules.chat import load_tokenizer
from datamodules.prompts import Prompt, load_prompts
from lightning_modules.base import FineTuningModule, require
from lightning_modules.models.identity import tensors_digest
from lightning_modules.models.loading import load_config
from lightning_modules.rewards import NemotronReward, Reward, resolve_reward
from lightning_modules.rewards.base import reward_name
from lightning_modules.rewards.preflight import before_evaluation, processes_for, remote_parts


class NemotronEvaluation(Callback):
    """Win rate against a reference model, average rewards, reward improvement and length ratio on held-out prompts.

    Both models complete the same prompts with the same seeds, so the policy compared with itself ties everywhere.
    Completions and scores are kept on disk and not paid for again: not by another epoch, method or process, nor
    after a kill. (Two processes that ask about the same at the same moment both do.)

    Args:
        reward: Who judges: the hosted Nemotron model unless another ``lightning_modules.rewards.Reward``, or the
            directory of a reward model, is named.
        reference_model: Hub id or directory of the model to compare with; the starting policy where not given.
        dataset_name: Where the prompts come from: hub id, directory, or a file with ``messages`` or ``prompt``.
        split: Of a dataset with several.
        columns: What the dataset calls the columns that have other names there: ``{prompt: question}``. Not for the
            dataset that is trained on, whose ``data.columns`` count.
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
        columns: dict[str, str] | None = None,
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
        self.reward = NemotronReward() if reward is None else resolve_reward(reward, option="evaluation.reward")
        self.reference_model = reference_model
        self.dataset_name = dataset_name
        self.split = split
        self.columns = columns
        self.num_prompts = num_prompts
        self.max_prompt_length = max_prompt_length
        self.decoding = Decoding(max_completion_length, temperature, top_p, seed)
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.max_failed_share = max_failed_share
        self.cache_dir = cache_dir
        self.check_judge = check_judge
        self._prompts: list[Prompt] = []
        self._memory = ScoreMemory()
        self._last: tuple[int, EvaluationResult] | None = None  # the step and the result of the last evaluation
        self._headline: Callable[[], None] | None = None  # prints that of the last evaluation, until it has been
        self._monitors = Monitors()
        self._ranks = processes_for(self.reward)
        self._check_options()

    def _check_options(self) -> None:
        decoding = self.decoding
        require(self.num_prompts >= 0, "evaluation.num_prompts must not be negative", self.num_prompts)
        require(decoding.temperature >= 0, "evaluation.temperature must not be negative", decoding.temperature)
        require(0 < decoding.top_p <= 1, "evaluation.top_p must be within 0..1", decoding.top_p)
        share = self.max_failed_share
        require(0 <= share <= 1, "evaluation.max_failed_share must be within 0..1", share)
        require(decoding.max_completion_length >= 1, "evaluation.max_completion_length must be at least 1", decoding[0])
        for option in ("max_prompt_length", "batch_size", "every_n_epochs"):
            require(getattr(self, option) >= 1, f"evaluation.{option} must be at least 1", getattr(self, option))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the prompts and try the reward source, before any model is loaded."""
        if stage == "fit":
            self._monitors.watch(trainer, evaluates=self._evaluates(pl_module))
        if self._prompts or not self._evaluates(pl_module) or stage not in ("fit", "validate"):
            return
        assert isinstance(pl_module, FineTuningModule)
        if self.reference_model is not None:
            load_config(self.reference_model, option=REFERENCE)
        elif stage == "validate":
            raise ConfigurationError("validate compares with evaluation.reference_model, which is not given")
        sources = remote_parts(self.reward)
        self._ranks = processes_for(self.reward)

        def prepare() -> None:
            tokenizer = pl_module.load_tokenizer()
            self._prompts = self._held_out(trainer, tokenizer)
            self._check_readers(pl_module.model_name, tokenizer)
            open_cache(trainer, self.cache_dir).close()
            for source in sources:
                source.share_budget(processes=trainer.world_size, rank=trainer.global_rank, machines=trainer.num_nodes)
            if trainer.is_global_zero:
                before_evaluation(
                    self.reward, self._prompts, judges=self.check_judge, option="evaluation.reward", told=rank_zero_info
                )

        self._ranks.gather(prepare)

    def _held_out(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        data = getattr(trainer, "datamodule", None)
        data = data if isinstance(data, ChatDataModule) and data.dataset_name == self.dataset_name else None
        if data is not None and self.columns:
            raise ConfigurationError(
                f"the prompts are held-out rows of {self.dataset_name}, which is trained on: unset "
                "evaluation.columns, and name its columns in data.columns"
            )
        return load_prompts(
            self.dataset_name,
            self.split,
            tokenizer=tokenizer,
            count=self.num_prompts,
            max_length=self.max_prompt_length,
            columns=self.columns,
            held_out=data.prompt_rows(self.split) if data else None,
        )

    def _check_readers(self, policy: str, tokenizer: PreTrainedTokenizerBase) -> None:
        messages = [prompt.messages for prompt in self._prompts]
        check_reader(policy, tokenizer, messages, self.decoding, option="model.model_name")
        if self.reference_model is not None:
            own = load_tokenizer(self.reference_model, option=REFERENCE)
            check_reader(self.reference_model, own, messages, self.decoding, option=REFERENCE)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The last evaluation, for the model card of a run that is resumed behind it."""
        return {} if self._last is None else {"step": self._last[0], "result": self._last[1].record()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._last = state_dict["step"], read_result(state_dict["result"])

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._monitors.release()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._evaluates(pl_module) and not trainer.enable_validation:
            rank_zero_warn(
                "this run evaluates nothing, as there is no validation (trainer.limit_val_batches is 0, or no rows are "
                "held out); validate judges the final model afterwards"
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Have Lightning validate where the run ends, also within an epoch, where it would end without."""
        if self._evaluates(pl_module) and ends_here(trainer):
            trainer.should_stop = True

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate a run that ended without a validation: where none was due, or its last had early stopping end it."""
        self._evaluate_end(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for a run that was killed after its last step, so that there was nothing left to train."""
        if trainer.global_step > 0:
            self._evaluate_end(trainer, pl_module)

    def _evaluate_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluates = self._evaluates(pl_module) and trainer.enable_validation and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if evaluates and self.result_at(trainer.global_step) is None:
            assert isinstance(pl_module, FineTuningModule)
            pl_module.to(trainer.strategy.root_device)  # in on_fit_end Lightning has taken it off already
            place = folder(trainer, epoch=epochs_begun(trainer) - 1)
            numbers = self.evaluate(trainer, pl_module, place).logged()
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)
            self._tell()

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
        if is_due(trainer, every_n_epochs=self.every_n_epochs):
            result = self.evaluate(trainer, pl_module, folder(trainer, epoch=trainer.current_epoch))
            self._monitors.evaluated = result.valid
            numbers = result.logged()
            for name, value in numbers.items():
                pl_module.log(name, value, rank_zero_only=False, batch_size=1)
        for name in self._monitors.names - set(numbers):  # a checkpoint callback expects a value at every validation
            pl_module.log(name, math.nan, rank_zero_only=False, batch_size=1)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The headline is the last that is said of a validation."""
        self._tell()

    def _tell(self) -> None:
        if self._headline is not None:
            self._headline()
        self._headline = None

    def evaluate(self, trainer: Trainer, module: FineTuningModule, directory: Path) -> EvaluationResult:
        """Evaluate the module's model and write ``metrics.json`` and ``pairs.jsonl``; the same result on every rank."""
        asking = functools.partial(bar, trainer, "asking the judge")
        options = {"decoding": self.decoding, "batch_size": self.batch_size}
        opened = self._ranks.own(lambda: open_cache(trainer, self.cache_dir))
        with contextlib.closing(opened) as cache:
            both = functools.partial(completers, trainer, module, self.reference_model, ranks=self._ranks, **options)
            found = evaluate(
                self._prompts,
                *self._ranks.own(lambda: both(cache=cache)),
                scorer=Scorer(self.reward, cache, self._memory, asking),
                ranks=self._ranks,
                reward_source=reward_name(self.reward),
                reference=self.reference_model or module.model_name,
                model=judged(trainer, module),
                model_digest=tensors_digest(weight for _, weight in module.exported_weights()),
                max_failed_share=self.max_failed_share,
            )
        self._ranks.gather(lambda: keep(trainer, found, directory) if trainer.is_global_zero else None)
        named = None if trainer.state.fn == "fit" else directory
        self._headline = functools.partial(report, found.result, found.reasons, named)
        self._last = trainer.global_step, found.result
        return found.result

    def result_at(self, step: int) -> EvaluationResult | None:
        """The result of the last evaluation, if it was of the model after so many steps."""
        return self._last[1] if self._last is not None and self._last[0] == step else None

    def _evaluates(self, module: LightningModule) -> bool:
        return self.num_prompts > 0 and isinstance(module, FineTuningModule) and module.can_generate
