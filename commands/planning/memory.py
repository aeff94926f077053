"""Which memory a run needs at its moments, and of what it is made up: from the configuration, without a weight."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from callbacks.evaluation.completions import REFERENCE, is_start
from commands.planning.batch import Largest
from commands.planning.trace import Passes, Size, Traced, added, counted, sized, trace
from lightning_modules.base import FineTuningModule
from lightning_modules.dpo import DPOModule
from lightning_modules.forward.completions import KL_TENSORS
from lightning_modules.functional.head import CHUNK_BYTES
from lightning_modules.generation.family_decoder import BLOCK
from lightning_modules.models.adapter_files import base_of
from lightning_modules.models.loading import load_config, without_weights
from lightning_modules.optimiser_step import make_optimizer
from lightning_modules.rewards import ModelReward
from lightning_modules.rloo import RLOOModule

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
FOUR_BITS = 0.5 + 1 / 64 + 1 / 4096
"""Bytes of a weight in NF4, its constants in eight bits included."""
HEADS = {"sft": "known", "reward": "", "rloo": "entropy"}
"""How a method reads the output head, where that is not as DPO does."""
LIBRARIES, SAMPLING, WORD = 45_000_000, 45_000_000, 330
"""On a CPU: what libraries and tables take once a run is under way, what the kernels of a sampler take beside that, and
a word of each of the two tokenizers."""
SLACK = 1.1
"""What glibc's heap holds over what stands in it at most, between allocations of many sizes, as it was seen."""
PROBE = 128


class Moment(NamedTuple):
    """A time of a run, and the bytes of each kind that stand then."""

    name: str
    parts: dict[str, Size]

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(size.all for size in self.parts.values())

    @property
    def small(self) -> int:
        """What of them is in the heap."""
        return sum(size.small for size in self.parts.values())


class Run(NamedTuple):
    """What decides a run's memory."""

    module: FineTuningModule
    batch: Largest
    precision: str
    device: str
    """``cpu`` or ``cuda``."""
    accumulates: bool
    """Whether gradients stand beside later forward passes of a step."""
    distributed: bool
    evaluation: Any
    """The evaluation callback; None where nothing is evaluated."""
    shards: int = 1
    """How many processes share the weights."""


def moments(run: Run) -> list[Moment]:
    """The run's moments; the largest is its peak."""
    return Account(run).moments()


def peak(found: list[Moment]) -> Moment:
    """The moment of most memory."""
    return max(found, key=lambda moment: moment.total)


class Account:
    """Adds up what stands when; all figures in bytes of one process."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.module = run.module
        self.config = load_config(self.module.loaded_name)
        self.traced = self.trace()
        self.vocabulary = int(self.config.get_text_config().vocab_size)
        self.chunk_bytes = CHUNK_BYTES[run.device]
        self.trained = self.traced.trained
        self.weight_bytes = 2 if run.precision in TRUE else 4
        self.compute_bytes = 2 if run.precision in (*HALF, *TRUE) else 4
        part = 1 / run.shards
        self.gradients = self.trained.times(self.weight_bytes * part)
        self.optimiser = self.trained.times(optimiser_bytes(self.module) * part)
        self.buckets = self.gradients if run.distributed and run.shards == 1 else Size(0)
        self.gathered = self.gathered_bytes() if run.shards > 1 else Size(0)
        self.weights = self.policy_bytes().times(part)
        self.reference = self.reference_bytes().times(part)
        self.reward = reward_bytes(getattr(self.module, "reward", None))

    def trace(self) -> Traced:
        """The passes of the largest batch."""
        precision = self.run.precision
        how = Passes(
            dtype=TRUE.get(precision, torch.float32),
            autocast=HALF.get(precision),
            checkpointing=self.module.gradient_checkpointing,
            lora=self.module.lora,
            head=HEADS.get(self.module.method, "unknown"),  # type: ignore[arg-type]
            chunk_bytes=CHUNK_BYTES[self.run.device],
        )
        return trace(self.config, self.run.batch.tokens, self.run.batch.groups, how)

    def moments(self) -> list[Moment]:
        """All moments of the run."""
        found = [self.loading(), self.forward(), self.backward(), self.step(), self.validation()]
        if isinstance(self.module, RLOOModule):
            found.append(self.sampling())
        if isinstance(self.module, DPOModule) and self.module.precompute_reference and self.module.lora is None:
            found.append(self.asking_the_reference())
        if self.evaluates():
            found += self.evaluating()
        if self.run.device == "cpu":
            most = max(moment.small for moment in found)
            for moment in found[1:]:  # before loading nothing has been freed
                moment.parts["freed, not given back"] = Size(round(SLACK * most) - moment.small)
        return found

    def evaluates(self) -> bool:
        """Whether a judge is asked about this run."""
        return self.run.evaluation is not None and self.module.can_generate and self.run.evaluation.num_prompts > 0

    def samples(self) -> bool:
        """Whether anything is sampled."""
        return isinstance(self.module, RLOOModule) or self.evaluates()

    def standing(self) -> dict[str, Size]:
        """What stands from the first step on."""
        parts = {"weights": self.weights, "optimiser": self.optimiser, "DDP's buckets": self.buckets}
        parts["gathered weights"] = self.gathered
        if self.run.device == "cpu":
            samples = SAMPLING if self.samples() else 0
            parts["tokenizers and libraries"] = Size(LIBRARIES + samples + 2 * WORD * self.vocabulary)
        if isinstance(self.module, RLOOModule):
            parts |= {"reference": self.reference, "reward model": self.reward}
        return parts

    def loading(self) -> Moment:
        """The files beside the weights that are made of them; processes that share a model load it in turns."""
        copies = 2 if isinstance(self.module, RLOOModule) and self.reference.all and self.run.shards == 1 else 1
        files = Size(file_bytes(self.module.loaded_name))
        return Moment("loading", {"weights": self.policy_bytes().times(copies), "files": files})

    def forward(self) -> Moment:
        """The forward pass at its largest, and an online reference's pass behind it."""
        parts = self.standing() | {"activations": self.traced.forward}
        parts["gradients"] = self.gradients if self.run.accumulates else Size(0)
        if isinstance(self.module, DPOModule) and not self.module.precompute_reference:
            parts |= {"reference": self.reference, "passing activations": self.traced.passing}
        return Moment("forward pass", parts)

    def backward(self) -> Moment:
        """The backward pass at its largest; gradients come as activations go."""
        parts = self.standing() | {"activations and gradients": self.backward_bytes()}
        parts["gradients"] = self.gradients if self.run.accumulates else Size(0)
        return Moment("backward pass", parts)

    def step(self) -> Moment:
        """The optimiser's step."""
        return Moment("optimiser step", self.standing() | {"gradients": self.gradients})

    def validation(self) -> Moment:
        """A forward pass that keeps nothing; DPO's needs the reference beside it."""
        parts = self.standing() | {"passing activations": self.traced.passing}
        if isinstance(self.module, DPOModule):
            predicted = int(self.run.batch.tokens.completion_mask.sum())
            logits = min(predicted * 4 * self.vocabulary, self.chunk_bytes // KL_TENSORS)
            parts |= {"reference": self.reference, "logits of both": sized(logits).times(KL_TENSORS)}
        return Moment("validation", parts)

    def asking_the_reference(self) -> Moment:
        """DPO's reference, before the first step."""
        parts = {"weights": self.weights, "reference": self.reference, "passing activations": self.traced.passing}
        return Moment("asking the reference", parts)

    def sampling(self) -> Moment:
        """RLOO's samples being written."""
        module, prompts = self.module, self.run.batch.prompts
        assert isinstance(module, RLOOModule)
        rows = len(prompts) * module.samples_per_prompt
        return Moment("sampling", self.standing() | self.sampler(rows, max(prompts) + module.max_completion_length))

    def evaluating(self) -> list[Moment]:
        """The policy's and the reference's answers to the judge's prompts."""
        evaluation = self.run.evaluation
        length = evaluation.max_prompt_length + evaluation.decoding.max_completion_length
        rows = min(evaluation.batch_size, evaluation.num_prompts)
        sampler, judge = self.sampler(rows, length), reward_bytes(evaluation.reward)
        policy = Moment("evaluation, policy", self.standing() | sampler | {"judge": judge})
        parts = {"judge": judge, "compared with": self.compared_bytes().times(1 / self.run.shards)}
        return [policy, Moment("evaluation, reference", self.standing() | sampler | parts)]

    def compared_bytes(self) -> Size:
        """Of the evaluation's reference; none where an adapter is switched off for it."""
        named = self.run.evaluation.reference_model
        if self.module.lora is not None and is_start(self.module, named):
            return Size(0)
        found = parameters(named or self.module.model_name, option=REFERENCE)
        return found.times(self.weight_bytes)

    def sampler(self, rows: int, length: int) -> dict[str, Size]:
        """The decoder's own weights, its cache, and a step's logits with what is drawn from them."""
        config = self.config.get_text_config()
        size = self.compute_bytes
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        capacity = math.ceil(length / BLOCK) * BLOCK
        copied = self.run.device == "cpu" or size == 2 or self.module.lora is not None
        copies = int(copied) + (self.run.shards > 1)
        if self.run.device == "cuda" and self.run.shards > 1:
            copies = 1  # what is gathered is in what the decoder computes in
        return {
            "sampler's weights": self.traced.parameters.times(size * copies),
            "sampler's cache": sized(2 * int(config.num_hidden_layers) * rows * heads * capacity * width * size),
            "logits": sized(rows * self.vocabulary * 4).times(3),
        }

    def gathered_bytes(self) -> Size:
        """Of a sharded model what stands whole in a pass: embeddings and head, a layer and the next one."""
        config = self.config.get_text_config()
        heads = 1 if getattr(config, "tie_word_embeddings", False) else 2
        layers = added([self.traced.parameters, self.traced.largest.times(-heads)]).times(1 / config.num_hidden_layers)
        gathered = added([self.traced.largest.times(heads), layers.times(2)]).times(self.compute_bytes)
        return added([gathered, layers.times(4)])  # and a layer's gradients, until they are sent

    def backward_bytes(self) -> Size:
        """Activations, and gradients as they come; of a sharded model no more than this process's part of those."""
        if self.run.shards == 1:
            return self.traced.backward
        sent = self.gradients.times(1 - self.run.shards)
        return max(self.traced.early, added([self.traced.late, sent]), key=lambda size: size.all)

    def policy_bytes(self) -> Size:
        """Of the model that is trained."""
        if self.module.quantization is None:
            return self.traced.parameters.times(self.weight_bytes)
        per_weight = FOUR_BITS if self.module.quantization == "nf4" else 1.0
        body = added([self.traced.parameters, self.traced.largest.times(-1)])
        return added([body.times(per_weight), self.traced.largest.times(self.weight_bytes)])

    def reference_bytes(self) -> Size:
        """Of the model that the policy is compared with in training; none where an adapter is switched off for it."""
        module = self.module
        if not isinstance(module, (RLOOModule, DPOModule)) or (isinstance(module, RLOOModule) and not module.beta):
            return Size(0)
        if module.reference_model is not None:
            return parameters(module.reference_model, option="model.reference_model").times(self.weight_bytes)
        return Size(0) if module.lora is not None else self.traced.parameters.times(self.weight_bytes)


def parameters(model_name: str, *, option: str = "model.model_name") -> Size:
    """Weights of a model, counted without any; the option is named where there is no such model."""
    return added([counted(parameter) for parameter in without_weights(model_name, option=option).parameters()])


def reward_bytes(reward: Any) -> Size:
    """Of the reward models that are in this process's memory."""
    if isinstance(reward, ModelReward):
        found = parameters(reward.model_name, option="model.reward")
        return found.times(2 if reward.dtype == "bfloat16" else 4)
    return added([reward_bytes(part) for part in getattr(reward, "rewards", ())])


def optimiser_bytes(module: FineTuningModule) -> float:
    """What the optimiser keeps of a weight, seen from a step with a small matrix."""
    weight = torch.nn.Parameter(torch.zeros(PROBE, PROBE))
    weight.grad = torch.ones_like(weight)
    optimizer = make_optimizer([weight], module.optimizer, learning_rate=1e-3, weight_decay=0.0, scaled=False)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in kept if value.numel() > 1) / weight.numel()


def file_bytes(model_name: str) -> int:
    """Of the weights' files of a local model."""
    folder = Path(base_of(model_name))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
