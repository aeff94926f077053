"""TRL's side, and transformers' ``generate``: the same rows, settings beside the fastest that measuring found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback
from trl.data_utils import pack_dataset
from trl.trainer import dpo_trainer, rloo_trainer, sft_trainer  # noqa: F401  # what TRL imports late belongs to the base
from typing_extensions import override

from benchmarks.job import Job
from datamodules.encoders import encode_conversation_rows
from datamodules.encoding import rows_of
from datamodules.formats import read_messages

Tick = Callable[[], None]
MAX_LENGTH = 16_384


class StepClock(TrainerCallback):
    """Ticks when an optimiser step is over."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    @override
    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.tick()


def sft(job: Job, tick: Tick) -> None:
    """Supervised fine-tuning on rows that are tokenised already, shortest first.

    The step is one batch, or as many smaller ones as the rows, or the blocks that they are packed into, fill.
    """
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
    given = job.read_rows()
    limits = {"read": read_messages, "tokenizer": tokenizer, "max_length": MAX_LENGTH}
    encoded = encode_conversation_rows(given, range(len(given)), **limits)
    rows = rows_of({name: encoded[name] for name in ("input_ids", "completion_mask")})
    rows.sort(key=lambda row: len(row["input_ids"]))
    job.check("tokens of a step", sum(len(row["input_ids"]) for row in rows), job.units)
    dataset = Dataset.from_list(rows)
    options = {"completion_only_loss": True, "train_sampling_strategy": "sequential"}
    packed = pack_dataset(dataset, job.variant["max_length"], "bfd") if job.variant.get("packing") else dataset
    options["per_device_train_batch_size"] = job.variant.get("per_device_train_batch_size", len(packed))
    options["gradient_accumulation_steps"] = len(packed) // options["per_device_train_batch_size"]
    trainer = trl.SFTTrainer(
        model=_model(job),
        args=trl.SFTConfig(**_options(job, **options)),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[StepClock(tick)],
        peft_config=_adapter(job),
    )
    _train(job, trainer)


def dpo(job: Job, tick: Tick) -> None:
    """Direct preference optimisation."""
    rows = [
        {"prompt": row["chosen"][:1], "chosen": row["chosen"][1:], "rejected": row["rejected"][1:]}
        for row in job.read_rows()
    ]
    trainer = trl.DPOTrainer(
        model=_model(job),
        args=trl.DPOConfig(**_options(job, per_device_train_batch_size=job.rows, beta=0.1)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model_dir),
        callbacks=[StepClock(tick)],
        peft_config=_adapter(job),
    )
    columns = {"prompt_ids": 2, "chosen_ids": 1, "rejected_ids": 1}
    tokens = sum(count * len(row[column]) for row in trainer.train_dataset for column, count in columns.items())
    job.check("tokens of a step", tokens, job.units)
    _train(job, trainer)


def rloo(job: Job, tick: Tick) -> None:
    """REINFORCE leave-one-out, with the rule that the suite's side has for a reward."""

    def brevity(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
        return [-float(len(completion[0]["content"])) for completion in completions]

    trainer = trl.RLOOTrainer(
        model=_model(job),
        reward_funcs=brevity,
        args=trl.RLOOConfig(
            **_options(
                job,
                per_device_train_batch_size=job.rows * job.samples,
                num_generations=job.samples,
                max_completion_length=job.length,
                beta=0.05,
            )
        ),
        train_dataset=Dataset.from_list([{"prompt": row["messages"][:1]} for row in job.read_rows()]),
        processing_class=AutoTokenizer.from_pretrained(job.model_dir),
        callbacks=[StepClock(tick)],
        peft_config=_adapter(job),
    )
    _train(job, trainer)
    job.check("the mean completion", trainer.state.log_history[0]["completions/mean_length"], job.length)


def generation(job: Job, tick: Tick) -> None:
    """``generate`` alone, sampling from the whole distribution as the suite's side does."""
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir, padding_side="left")
    model = _model(job).to(torch.bfloat16 if job.bf16 else torch.float32).eval()  # type: ignore[arg-type]
    prompts = [row["messages"] for row in job.read_rows()]
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    ).to(job.device)
    for _ in range(job.all_steps):
        written = model.generate(  # type: ignore[operator]
            **batch, max_new_tokens=job.length, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **job.variant
        )
        tick()
        job.check("sampled tokens", written[:, batch["input_ids"].shape[1] :].numel(), job.units)


def _model(job: Job) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=torch.float32)
    return model.to(job.device)  # type: ignore[arg-type]


def _adapter(job: Job) -> LoraConfig | None:
    """The suite's, as TRL takes it."""
    if "lora" not in job.variant:
        return None
    return LoraConfig(r=job.variant["lora"], lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def _options(job: Job, **own: Any) -> dict[str, Any]:
    """The suite's precision, clipping and optimiser, a method's own options, and at last the variant's."""
    return {
        **({} if job.workload == "rloo" else {"max_length": MAX_LENGTH}),
        "output_dir": str(Path(job.scratch_dir) / "trl"),
        "use_cpu": job.device == "cpu",
        "bf16": job.bf16,
        "gradient_checkpointing": False,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "max_steps": job.all_steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": job.device == "cuda",
        **own,
        **{name: value for name, value in job.variant.items() if name != "lora"},
    }


def _train(job: Job, trainer: Any) -> None:
    job.check("batches of an epoch", len(trainer.get_train_dataloader()), trainer.args.gradient_accumulation_steps)
    trainer.train()
