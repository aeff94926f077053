"""Says when training is sick and what to try, and ends it where it cannot go on."""

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from typing_extensions import override

from callbacks.lightning_internals import at_step_boundary
from core.errors import ConfigurationError
from lightning_modules.base import FineTuningModule, require
from lightning_modules.models.parts import local

WINDOW = 10
"""Steps that a metric's mean is taken over before it is held against its bound."""


class Sign(NamedTuple):
    """A metric that says something beyond a bound."""

    metric: str
    above: bool
    """Whether it is the values above the bound that say so."""
    told: str
    """What it means, around the mean and the bound."""
    remedy: str


SIGNS = {
    "max_alike": Sign(
        "train/alike",
        True,
        "{mean:.0%} of the prompts have samples that all score alike, which teaches nothing",
        "raise model.temperature or model.samples_per_prompt, or take a reward that tells the samples apart",
    ),
    "max_truncated": Sign(
        "train/truncated",
        True,
        "{mean:.0%} of the samples are cut at the length limit",
        "raise model.max_completion_length or model.missing_eos_penalty, or begin with a model that ends its turns",
    ),
    "max_kl": Sign(
        "train/kl",
        True,
        "the policy is {mean:.1f} nats a completion from its reference, beyond {bound:g}",
        "raise model.beta or lower model.learning_rate; the reward may be exploited, so read train/completions",
    ),
    "min_entropy": Sign(
        "train/entropy",
        False,
        "the policy's entropy is {mean:.3f} nats a token, below {bound:g}: it says one thing alone",
        "raise model.beta, lower model.learning_rate or raise model.temperature",
    ),
    "max_sampler_drift": Sign(
        "train/sampler_drift",
        True,
        "sampler and training forward differ by {mean:.3f} nats a token, beyond {bound:g}, so samples are off-policy",
        "take trainer.precision 32-true to see whether it is rounding; in bfloat16 some 0.05 are normal",
    ),
}
"""By the option with the bound."""


class TrainingHealth(Callback):
    """Ends a run whose steps are not sound, and warns once of each sign that RLOO is going wrong.

    A step whose loss or gradient is not finite, or in which nothing could be scored, is skipped and leaves the weights
    as they were. The signs are means over ten steps. A checkpoint with weights that are not finite is never written, so
    the one before it is kept.

    Args:
        max_bad_steps: End the run after so many such steps in a row; null to go on whatever comes.
        max_alike: Share of RLOO's prompts whose samples all score alike; null, here and below, for no bound.
        max_truncated: Share of its samples that are cut at the length limit.
        max_kl: Its log-ratio to the reference, in nats a completion.
        min_entropy: Of its policy, in nats a token.
        max_sampler_drift: Between its sampler and the training forward, in nats a token.
        stop: Whether to end the run where a bound is passed, in the place of a warning.
    """

    def __init__(
        self,
        max_bad_steps: int | None = 3,
        max_alike: float | None = 0.9,
        max_truncated: float | None = 0.9,
        max_kl: float | None = 50.0,
        min_entropy: float | None = 0.05,
        max_sampler_drift: float | None = 0.2,
        stop: bool = False,
    ) -> None:
        require(max_bad_steps is None or max_bad_steps >= 1, "health.max_bad_steps must be at least 1", max_bad_steps)
        self.max_bad_steps = max_bad_steps
        self.stop = stop
        given = (max_alike, max_truncated, max_kl, min_entropy, max_sampler_drift)
        self.bounds = {option: bound for option, bound in zip(SIGNS, given, strict=True) if bound is not None}
        for option, bound in self.bounds.items():
            require(bound >= 0, f"health.{option} must not be negative", bound)
        self._recent = {option: deque[float](maxlen=WINDOW) for option in self.bounds}
        self._warned: set[str] = set()
        self._skipped = self._in_a_row = 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(pl_module, FineTuningModule) and at_step_boundary(trainer):
            self._check_step(trainer, pl_module)
            self._check_signs(trainer.callback_metrics)

    def _check_step(self, trainer: Trainer, module: FineTuningModule) -> None:
        flaw = module.step_flaw
        self._in_a_row = self._in_a_row + 1 if flaw else 0
        self._skipped += bool(flaw)
        if self._skipped:
            module.log("train/skipped_steps", float(self._skipped), batch_size=1)
        if not flaw:
            return
        said = f"step {trainer.global_step} was skipped: {flaw}"
        if self.max_bad_steps is not None and self._in_a_row >= self.max_bad_steps:
            raise ConfigurationError(
                f"{said}; that is {self._in_a_row} in a row, so the run ends with the weights that it had before them. "
                "Lower model.learning_rate or set trainer.gradient_clip_val, look at the data and the reward, or raise "
                "health.max_bad_steps; --ckpt_path last goes on from the last checkpoint"
            )
        rank_zero_warn(said)

    @rank_zero_only
    def _check_signs(self, metrics: Mapping[str, Any]) -> None:
        for option, bound in self.bounds.items():
            sign, recent = SIGNS[option], self._recent[option]
            if sign.metric not in metrics or option in self._warned:
                continue
            recent.append(float(metrics[sign.metric]))
            mean = sum(recent) / len(recent)
            if len(recent) < WINDOW or (mean <= bound if sign.above else mean >= bound):
                continue
            said = f"in the last {WINDOW} steps {sign.told.format(mean=mean, bound=bound)}; {sign.remedy}"
            if self.stop:
                raise ConfigurationError(f"{said}. The run ends as health.stop is true; the bound is health.{option}")
            rank_zero_warn(f"{said} (health.{option})")
            self._warned.add(option)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        own = (local(parameter.detach()) for parameter in pl_module.parameters() if parameter.is_floating_point())
        weights = [part for part in own if part.numel()]  # of a sharded one a process may have none
        finite = not weights or bool(torch.nn.utils.get_total_norm(weights, torch.inf).isfinite())
        if not trainer.strategy.reduce_boolean_decision(finite, all=True):
            raise ConfigurationError(
                f"after step {trainer.global_step} the weights are not finite, so no checkpoint is written and the run "
                "ends; lower model.learning_rate or set trainer.gradient_clip_val, then go on with --ckpt_path last"
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self._skipped,
            "in_a_row": self._in_a_row,
            "warned": sorted(self._warned),
            "recent": {option: list(values) for option, values in self._recent.items()},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        self._warned = set(state_dict["warned"])
        for option, recent in self._recent.items():
            recent.extend(state_dict["recent"].get(option, ()))
