"""The suite's side: a fit as a user runs it, without evaluation and checkpoints."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from typing_extensions import override

from benchmarks.job import Job
from datamodules import SmolTalkDataModule, UltraFeedbackDataModule
from datamodules.chat import encode_conversation, load_tokenizer, stop_token_ids
from lightning_modules import DPOModule, RLOOModule, SFTModule
from lightning_modules.generation.sampler import sample_completions
from lightning_modules.models.adapter_files import LoraOptions
from lightning_modules.models.loading import load_causal_lm
from lightning_modules.rewards.rules import brevity

Tick = Callable[[], None]
MAX_LENGTH = 16_384


class StepClock(Callback):
    """Ticks when an optimiser step is over."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick
        self.steps = 0

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            self.tick()


def sft(job: Job, tick: Tick) -> None:
    """Supervised fine-tuning."""
    module = SFTModule(job.model_dir, **_model_options(job))
    _fit(job, tick, module, SmolTalkDataModule(**_data_options(job)))


def dpo(job: Job, tick: Tick) -> None:
    """Direct preference optimisation."""
    module = DPOModule(model_name=job.model_dir, **_model_options(job))
    _fit(job, tick, module, UltraFeedbackDataModule(**_data_options(job)))


def rloo(job: Job, tick: Tick) -> None:
    """REINFORCE leave-one-out."""
    options = {"samples_per_prompt": job.samples, "max_completion_length": job.length, **_model_options(job)}
    module = RLOOModule(brevity, model_name=job.model_dir, **options)
    trainer = _fit(job, tick, module, SmolTalkDataModule(task="prompts", **_data_options(job)))
    job.check("the mean completion", float(trainer.callback_metrics["train/completion_length"]), job.length)


def generation(job: Job, tick: Tick) -> None:
    """Sampling alone."""
    tokenizer = load_tokenizer(job.model_dir)
    model = load_causal_lm(job.model_dir, tokenizer)
    model.to(device=job.device, dtype=torch.bfloat16 if job.bf16 else torch.float32)  # type: ignore[call-overload]
    prompts = [
        torch.tensor(encode_conversation(tokenizer, row["messages"], add_generation_prompt=True).input_ids)
        for row in job.read_rows()
    ]
    for step in range(job.all_steps):
        samples = sample_completions(
            model,
            prompts,
            max_completion_length=job.length,
            stop_token_ids=stop_token_ids(tokenizer),
            seeds=range(step * len(prompts), (step + 1) * len(prompts)),
            **job.variant.get("sampler", {}),
        )
        tick()
        job.check("sampled tokens", int(samples.completion_lengths().sum()), job.units)


def _model_options(job: Job) -> dict[str, Any]:
    lora = {"lora": LoraOptions(job.variant["lora"])} if "lora" in job.variant else {}
    return {**job.variant.get("model", {}), **lora}


def _data_options(job: Job) -> dict[str, Any]:
    return {
        "model_name": job.model_dir,
        "dataset_name": job.data_dir,
        "batch_size": job.rows // job.processes,
        "max_length": MAX_LENGTH,
        **job.variant.get("data", {}),
    }


def _fit(job: Job, tick: Tick, module: LightningModule, data: LightningDataModule) -> Trainer:
    options = {
        "accelerator": "gpu" if job.device == "cuda" else "cpu",
        "devices": job.processes,
        "precision": "bf16-mixed" if job.bf16 else "32-true",
        "gradient_clip_val": 1.0,
        "max_steps": job.all_steps,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": f"{job.scratch_dir}/run",  # caches go beside it
        "callbacks": [StepClock(tick)],
        **({"strategy": "ddp"} if job.processes > 1 else {}),
        **job.variant.get("trainer", {}),
    }
    trainer = Trainer(**options)
    trainer.fit(module, datamodule=data)
    job.check("batches of an epoch", trainer.num_training_batches, trainer.accumulate_grad_batches)
    return trainer
