"""REINFORCE leave-one-out: sample k completions a prompt, and compare each with the others."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import LightningDataModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel
from typing_extensions import override

from core.progress import bar
from datamodules.batches import PromptBatch, TokenBatch
from lightning_modules.adapted import global_seed
from lightning_modules.base import FineTuningModule, require
from lightning_modules.forward.completions import CompletionTokens, completion_tokens
from lightning_modules.functional.reinforce import (
    clipped_policy_gradient_loss,
    kl_penalised_rewards,
    leave_one_out_advantages,
    policy_gradient_loss,
)
from lightning_modules.generation.rollouts import (
    Rollout,
    broken,
    check_advantages,
    log_completions,
    rollout_metrics,
    score_samples,
    seeds_of,
)
from lightning_modules.generation.sampler import Samples, sample_completions
from lightning_modules.models.loading import without_dropout
from lightning_modules.models.reference import make_reference
from lightning_modules.models.sharding import gathered, in_step
from lightning_modules.rewards import Reward, resolve_reward
from lightning_modules.rewards.preflight import preflight, processes_for, remote_parts


class RLOOModule(FineTuningModule):
    """Trains on prompts, with a reward source of choice and the KL penalty in the reward.

    Args:
        reward: Directory or hub id of a reward model, or the import path of a function or class that is a
            ``lightning_modules.rewards.Reward``; a weighted list is ``lightning_modules.rewards.WeightedReward``.
        beta: Weight of the log-ratio to the reference in the reward; 0 for no penalty, no reference in memory and no
            forward pass of it.
        samples_per_prompt: k, at least 2.
        max_completion_length: Longest sample in tokens, its end-of-turn token included.
        temperature: Of the sampling; log-probabilities are taken at the same one.
        missing_eos_penalty: Subtracted from the score of a sample that was cut at the length limit.
        updates_per_rollout: Optimiser steps on the same samples; more than 1 uses the clipped ratio.
        clip_range: How far the ratio may go from 1 where there is more than one update.
        reference_model: Hub id or directory of the reference; the starting policy where it is not given.
        log_completions_every: Steps between tables of prompts, completions and scores in the logs.
    """

    method = "rloo"
    method_name = "REINFORCE leave-one-out"
    task = "prompts"

    def __init__(
        self,
        reward: Reward | str,
        beta: float = 0.05,
        samples_per_prompt: int = 4,
        max_completion_length: int = 256,
        temperature: float = 1.0,
        missing_eos_penalty: float = 0.0,
        updates_per_rollout: int = 1,
        clip_range: float = 0.2,
        reference_model: str | None = None,
        log_completions_every: int = 50,
        learning_rate: float = 1e-6,
        **options: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, **options)
        require(beta >= 0, "model.beta must not be negative", beta)
        require(
            samples_per_prompt >= 2,
            "leave-one-out needs model.samples_per_prompt to be at least 2",
            samples_per_prompt,
        )
        require(max_completion_length >= 1, "model.max_completion_length must be at least 1", max_completion_length)
        require(temperature > 0, "model.temperature must be positive, or samples would not differ", temperature)
        require(missing_eos_penalty >= 0, "model.missing_eos_penalty must not be negative", missing_eos_penalty)
        require(updates_per_rollout >= 1, "model.updates_per_rollout must be at least 1", updates_per_rollout)
        require(0 < clip_range < 1, "model.clip_range must be within 0..1", clip_range)
        require(log_completions_every >= 1, "model.log_completions_every must be at least 1", log_completions_every)
        self.reward = resolve_reward(reward)
        self.beta = beta
        self.samples_per_prompt = samples_per_prompt
        self.max_completion_length = max_completion_length
        self.temperature = temperature
        self.missing_eos_penalty = missing_eos_penalty
        self.updates_per_rollout = updates_per_rollout
        self.clip_range = clip_range
        self.reference_model = reference_model
        self.log_completions_every = log_completions_every
        self._ranks = processes_for(self.reward)
        self._rollouts: list[Rollout] = []  # of this optimiser step, where it has more than one update

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._ranks = processes_for(self.reward)
        for source in remote_parts(self.reward):
            trainer = self.trainer
            source.share_budget(processes=trainer.world_size, rank=trainer.global_rank, machines=trainer.num_nodes)
        preflight(self.reward, [{"role": "user", "content": "Hello"}], option="model.reward")

    @override
    def load_model(self) -> PreTrainedModel:
        load = super().load_model
        policy = without_dropout(load())
        if self.beta:
            adapted = self.lora is not None
            # Of a model that is to be sharded no second copy beside the first: the memory may not hold both.
            kept = None if adapted or self.sharding is not None else copy.deepcopy(policy)
            self.reference = make_reference(
                self.reference_model,
                adapted=adapted,
                name=self.loaded_name,
                start=lambda: load() if kept is None else kept,
                tokenizer=lambda: self.tokenizer,
            )
        return policy

    @override
    def configure_model(self) -> None:
        super().configure_model()
        if self.beta and self.sharding is not None:
            with self.reference.beside(self.model):
                pass  # it is loaded now, while no other process waits within a step

    @override
    def longest_sequence(self, data: LightningDataModule | None) -> int:
        return super().longest_sequence(data) + self.max_completion_length

    @override
    def validation_metrics(self) -> tuple[str, ...]:
        return "score", "reward", *(("kl",) if self.beta else ()), "completion_length", "truncated"

    @override
    def training_step(self, batch: PromptBatch | Rollout, batch_idx: int) -> Tensor:
        if isinstance(batch, Rollout):
            return self.further_update(batch)
        words = (global_seed(), self.current_epoch, batch_idx, self.global_rank)
        samples = self.sample(batch, seeds_of(words, count=self.samples_per_prompt * len(batch.prompts)))
        score = functools.partial(score_samples, self.reward, batch.prompts, samples, self.tokenizer)
        scores = self._ranks.own(score)  # which may take one process long, or fail there
        completions = self.completions(self.model, samples.tokens, entropy=True)
        log_probs = self.by_prompt(completions)
        log_ratios = self.log_ratios(log_probs.detach(), samples)
        rewards = kl_penalised_rewards(self.penalised(scores, samples), log_ratios, beta=self.beta)
        advantages = leave_one_out_advantages(rewards)
        losses = policy_gradient_loss(log_probs, advantages) + broken(scores, rewards)

        if self.is_first_step:
            check_advantages(advantages, self.reward)
        if self.updates_per_rollout > 1:
            self._rollouts.append(Rollout(samples.tokens, log_probs.detach(), advantages))
        metrics = rollout_metrics(samples, scores, rewards, completions)
        self.log_step(metrics | ({"kl": log_ratios.mean()} if self.beta else {}), batch_size=scores.numel())
        log_completions(
            self.trainer, batch.prompts, samples, scores, self.tokenizer, every_n_steps=self.log_completions_every
        )
        return self.sum_for_step(losses, (~advantages.isnan()).any(1).sum())

    def further_update(self, rollout: Rollout) -> Tensor:
        """The clipped loss on samples of an earlier policy."""
        log_probs = self.by_prompt(self.completions(self.model, rollout.tokens))
        losses = clipped_policy_gradient_loss(
            log_probs, rollout.old_log_probs, rollout.advantages, clip_range=self.clip_range
        )
        return self.sum_for_step(losses, (~rollout.advantages.isnan()).any(1).sum())

    @override
    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        # by the prompt alone, so that the figures are the same on any number of processes
        seeds = [seeds_of((global_seed(), *ids.tolist()), count=1)[0] for ids in batch.prompt_ids]
        samples = self.sample(batch, seeds)
        scores = score_samples(self.reward, batch.prompts, samples, self.tokenizer)
        log_ratios = torch.zeros_like(scores)
        if self.beta:
            log_probs = self.by_prompt(self.completions(self.model, samples.tokens, count=1), count=1)
            log_ratios = self.log_ratios(log_probs, samples)
        rewards = kl_penalised_rewards(self.penalised(scores, samples), log_ratios, beta=self.beta)
        self.update_val(
            {
                "kl": log_ratios,
                "score": scores[~scores.isnan()],
                "reward": rewards[~rewards.isnan()],
                "completion_length": samples.completion_lengths().float(),
                "truncated": (~samples.finished).float(),
            }
        )

    @override
    def on_validation_epoch_end(self) -> None:
        self._ranks.gather(lambda: None)  # for whom the reward source takes longest
        super().on_validation_epoch_end()

    def sample(self, batch: PromptBatch, seeds: Sequence[int]) -> Samples:
        """A sample for each seed; those of a prompt are neighbours."""
        length = self.max_completion_length
        shown = bar(self._trainer, "sampling", length, after_s=1.0)
        with gathered(self.model) as model, in_step(model), shown as told:
            samples: Samples = sample_completions(
                model,
                batch.prompt_ids,
                max_completion_length=length,
                stop_token_ids=self.stop_token_ids(),
                seeds=seeds,
                samples_per_prompt=len(seeds) // len(batch.prompt_ids),
                temperature=self.temperature,
                on_tokens=lambda *_: told.update(1),
            )
        return samples

    def penalised(self, scores: Float[Tensor, "prompt sample"], samples: Samples) -> Float[Tensor, "prompt sample"]:
        """The scores, less the missing-EOS penalty of samples that were cut."""
        return scores - self.missing_eos_penalty * (~samples.finished).view_as(scores)

    @torch.no_grad()
    def log_ratios(self, log_probs: Float[Tensor, "prompt sample"], samples: Samples) -> Float[Tensor, "prompt sample"]:
        """Policy minus reference, of whole completions; 0 where nothing asks for the reference."""
        if not self.beta:
            return torch.zeros_like(log_probs)
        count = log_probs.shape[1]
        with self.reference.beside(self.model) as model:
            reference = self.completions(model, samples.tokens, count=count)
        return log_probs - self.by_prompt(reference, count=count)

    def completions(
        self, model: PreTrainedModel, tokens: TokenBatch, *, count: int | None = None, entropy: bool = False
    ) -> CompletionTokens:
        """Log-probabilities at the sampling temperature; a prompt is run once for its neighbouring samples."""
        prompts = [row // (count or self.samples_per_prompt) for row in range(len(tokens.input_ids))]
        completions: CompletionTokens = completion_tokens(
            model, tokens, temperature=self.temperature, entropy=entropy, groups=prompts
        )
        return completions

    def by_prompt(self, completions: CompletionTokens, *, count: int | None = None) -> Float[Tensor, "prompt sample"]:
        """Log-probability of each whole completion."""
        sums: Tensor = completions.sum_by_sequence(completions.log_probs)
        return sums.view(-1, count or self.samples_per_prompt)

    @override
    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for _ in range(self.updates_per_rollout - 1):
            super().optimizer_step(epoch, batch_idx, optimizer, lambda: self._replay(batch_idx, optimizer))
        self._rollouts.clear()

    def _replay(self, batch_idx: int, optimizer: Optimizer | LightningOptimizer) -> Tensor:
        optimizer.zero_grad()
        loss = torch.zeros(())
        for rollout in self._rollouts:
            output = self.trainer.strategy.training_step(rollout, batch_idx)
            assert isinstance(output, Tensor)
            loss = output
            raw = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
            self.trainer.strategy.backward(loss / self.trainer.accumulate_grad_batches, raw)
        return loss
