"""LoRA: equal to plain peft, the policy its own reference, merged elsewhere alone, and nothing of the base on disk."""

import contextlib
import copy
import functools
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from callbacks.evaluation.cache import EvaluationCache
from callbacks.evaluation.completions import Decoding, completers, is_start
from core.errors import ConfigurationError
from core.ranks import Ranks
from datamodules.batches import PromptBatch, TokenBatch, pad
from datamodules.chat import load_tokenizer
from datamodules.messages import Message
from lightning_modules import DPOModule, RewardModule, RLOOModule, SFTModule
from lightning_modules.forward.capabilities import capabilities
from lightning_modules.forward.completions import completion_tokens, sequence_scores
from lightning_modules.generation import decoders
from lightning_modules.generation.decoders import copied_bytes, decodes
from lightning_modules.generation.family_decoder import FamilyDecoder
from lightning_modules.generation.sampler import sample_completions
from lightning_modules.generation.transformers_decoder import TransformersDecoder
from lightning_modules.models.adapter_files import LoraOptions, save_adapter
from lightning_modules.models.adapters import add_adapter, at_start, halve_frozen, merged_weight, merged_weights
from lightning_modules.models.identity import saved_tensors, tensors_digest, weights_digest
from lightning_modules.models.loading import load_causal_lm, load_reward_model
from lightning_modules.rewards import ModelReward
from lightning_modules.rewards.rules import brevity
from tests.command_line import Cli, assert_refused
from tests.conftest import make_tiny_model, tiny_tokenizer

peft = pytest.importorskip("peft", reason="the extra [lora] is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own, and Lightning's in the fits
ROWS = [[5, 6, 7, 8, 9], [5, 6, 7, 10], [11, 12, 13, 14, 15, 16]]


def batch() -> TokenBatch:
    return pad(ROWS, [[False, False] + [True] * (len(row) - 2) for row in ROWS], pad_token_id=0)


def plain(directory: Path) -> PreTrainedModel:
    return load_causal_lm(str(directory), load_tokenizer(str(directory)))


def stir(model: torch.nn.Module) -> None:
    """Give the adapter weights that change something."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name and ".reference." not in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def adapted(directory: Path, *, stirred: bool = True, **options: Any) -> PreTrainedModel:
    model = plain(directory)
    add_adapter(model, LoraOptions(**{"rank": 4, **options}), start=str(directory), seed=3)
    if stirred:
        stir(model)
    return model.eval()


def of_peft(directory: Path, model: PreTrainedModel) -> Any:
    """The same adapter by transformers and peft alone."""
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=32, target_modules=linears))
    ours = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.copy_(ours[name.removeprefix("base_model.model.")])
    return theirs.eval()


def test_log_probs_and_gradients_are_those_of_plain_peft(tiny_model_dir: Path) -> None:
    """Flat rows, shared prefixes and the head in chunks stay in use."""
    model = adapted(tiny_model_dir)
    assert capabilities(model) == capabilities(plain(tiny_model_dir)) == (float("inf"), True)
    theirs = of_peft(tiny_model_dir, model)
    tokens = batch()
    ours = completion_tokens(model, tokens, groups=[0, 0, 1])
    logits = theirs(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask.long()).logits
    log_probs = logits.log_softmax(-1)[:, :-1].gather(2, tokens.input_ids[:, 1:, None])[..., 0]
    expected = log_probs[tokens.completion_mask[:, 1:]]
    torch.testing.assert_close(ours.log_probs, expected, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(-1, 2, len(expected))
    (ours.log_probs * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) == 2 * 7 * 2
    for name, parameter in model.named_parameters():
        theirs_of_it = gradients.get(f"base_model.model.{name}")
        assert (parameter.grad is None) == (theirs_of_it is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs_of_it, atol=1e-5, rtol=1e-5)


def test_an_adapter_changes_nothing_before_it_is_trained_and_the_same_seed_makes_the_same(tiny_model_dir: Path) -> None:
    before = completion_tokens(plain(tiny_model_dir).eval(), batch()).log_probs
    new = adapted(tiny_model_dir, stirred=False)
    assert torch.equal(completion_tokens(new, batch()).log_probs, before)
    torch.rand(3)
    other = dict(adapted(tiny_model_dir, stirred=False).named_parameters())
    assert all(torch.equal(parameter, other[name]) for name, parameter in new.named_parameters())
    assert any(parameter.requires_grad and parameter.abs().sum() > 0 for parameter in new.parameters())


def test_the_reference_is_the_policy_without_its_adapter(tiny_model_dir: Path) -> None:
    model, base = adapted(tiny_model_dir), plain(tiny_model_dir).eval()
    expected = completion_tokens(base, batch()).log_probs
    with_adapter = completion_tokens(model, batch()).log_probs
    with at_start(model) as start, torch.no_grad():
        assert torch.equal(completion_tokens(start, batch()).log_probs, expected)
        assert weights_digest(start) == weights_digest(base), "so caches know it as the base"
    assert torch.equal(completion_tokens(model, batch()).log_probs, with_adapter)
    assert not torch.allclose(with_adapter, expected)
    assert weights_digest(model) != weights_digest(base)
    assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("method", [DPOModule, RLOOModule])
def test_no_second_model_is_loaded(method: Any, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"reward": brevity} if method is RLOOModule else {}
    module = method(model_name=str(tiny_model_dir), lora=LoraOptions(4), **options)
    module.configure_model()
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("a copy"))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a second model"))
    with module.reference.beside(module.model) as reference:
        assert reference is module.model


def asked(
    module: SFTModule, reference_model: str | None, file: Path, *, which: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], int]:
    """What the evaluation's policy (0) or reference (1) answers, and how many models were loaded for it."""
    loaded: list[weakref.ref[Any]] = []

    def load(*given: Any, **options: Any) -> PreTrainedModel:
        model = load_causal_lm(*given, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("callbacks.evaluation.completions.load_causal_lm", load)
    monkeypatch.setattr("lightning_modules.models.reference.load_causal_lm", load)
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    prompts: dict[int, list[Message]] = {number: [{"role": "user", "content": f"q {number}"}] for number in range(3)}
    with contextlib.closing(EvaluationCache(file)) as cache:
        how: dict[str, Any] = {"ranks": Ranks(1.0), "decoding": Decoding(8, 1.0, 1.0, 42), "batch_size": 2}
        both = completers(trainer, module, reference_model, cache=cache, **how)
        found = [side.completion for side in both[which](prompts)]
        gc.collect()
        assert [model() for model in loaded] == [None] * len(loaded), "a judge that comes next would lack its memory"
        return found, len(loaded)


def test_an_evaluation_loads_no_second_model_where_the_reference_is_the_policy_before_its_adapter(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers, and where they are kept, are those of the model loaded anew; so a policy named beside it ties."""
    name = str(tiny_model_dir)
    full, module = SFTModule(model_name=name), SFTModule(model_name=name, lora=LoraOptions(4))
    for each in (full, module):
        each.configure_model()
    stir(module.model)
    ask = functools.partial(asked, monkeypatch=monkeypatch)
    expected = ask(full, None, tmp_path / "full.sqlite", which=1)
    assert expected[1] == 1
    changed = ask(module, None, tmp_path / "changed.sqlite", which=0)
    assert changed[0] != expected[0]
    for named in (None, name):
        assert ask(module, named, tmp_path / f"of {bool(named)}.sqlite", which=1) == (expected[0], 0)
    assert ask(module, None, tmp_path / "again.sqlite", which=0) == changed, "the adapter is on again"
    own_template = module.tokenizer.chat_template
    module.tokenizer.chat_template = f"{own_template}{{# another's tokens may be others #}}"
    assert ask(module, name, tmp_path / "template.sqlite", which=1) == (expected[0], 1)
    module.tokenizer.chat_template = own_template
    another = tmp_path / "another"
    make_tiny_model(another, rms_norm_eps=0.1)
    assert ask(module, str(another), tmp_path / "another.sqlite", which=1)[1] == 1
    monkeypatch.setattr("callbacks.evaluation.completions.sample_completions", lambda *_, **__: 1 / 0)
    assert ask(module, None, tmp_path / "full.sqlite", which=1) == (expected[0], 0), "kept for every method's run"


def test_the_own_decode_step_samples_what_peft_and_transformers_do(tiny_model_dir: Path) -> None:
    model = adapted(tiny_model_dir)
    assert decodes(model)
    theirs = of_peft(tiny_model_dir, model)
    prompts = [torch.tensor(ids) for ids in ([5, 6, 7], [9, 8], [20, 21, 22, 23])]
    samples = sample_completions(
        model, prompts, max_completion_length=12, stop_token_ids=[], seeds=[1, 2, 3], temperature=0.0
    )
    for row, prompt in enumerate(prompts):
        generated = theirs.generate(
            input_ids=prompt[None], max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
        )
        ours = samples.tokens.input_ids[row][samples.tokens.completion_mask[row]]
        assert ours.tolist() == generated[0, len(prompt) :].tolist()


def test_without_room_for_merged_copies_sampling_goes_another_way_to_the_same_tokens(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny_model_dir)
    config: Any = model.config
    widths = [config.hidden_size] * 2 + [config.hidden_size // config.num_attention_heads] * 2  # q o, k v
    one_layer = config.hidden_size * (sum(widths) + 3 * config.intermediate_size)
    numbers = config.num_hidden_layers * one_layer
    assert copied_bytes(model) == 4 * numbers
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert copied_bytes(model) == 2 * (numbers + config.vocab_size * config.hidden_size)
    assert copied_bytes(plain(tiny_model_dir)) == 0
    limits = {"samples_per_prompt": 1, "max_completion_length": 6}
    prompt = [torch.tensor([5, 6, 7])]

    def greedy() -> list[int]:
        options: dict[str, Any] = {"stop_token_ids": [], "seeds": [1], "temperature": 0.0}
        ids: list[int] = sample_completions(model, prompt, **limits, **options).tokens.input_ids[0].tolist()
        return ids

    expected = greedy()
    monkeypatch.setattr(decoders, "free_bytes", lambda _: float(4 * numbers))
    assert isinstance(decoders.decoder(model, prompt, **limits), FamilyDecoder)
    monkeypatch.setattr(decoders, "free_bytes", lambda _: 4.0 * numbers - 1)
    with pytest.warns(UserWarning, match="sampling goes through transformers' forward"):
        assert isinstance(decoders.decoder(model, prompt, **limits), TransformersDecoder)
    with pytest.warns(UserWarning, match="a smaller data.batch_size makes room"):
        assert greedy() == expected


def test_merging_leaves_the_weights_as_they_are(tiny_model_dir: Path) -> None:
    model = adapted(tiny_model_dir)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layer = model.model.layers[0].self_attn.q_proj  # type: ignore[union-attr]
    first = merged_weight(layer)
    for _ in range(1000):
        again = merged_weight(layer)
    assert torch.equal(first, again)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merged = plain(tiny_model_dir).eval()
    merged.load_state_dict(dict(merged_weights(model)), strict=False)
    expected = completion_tokens(model, batch()).log_probs
    torch.testing.assert_close(completion_tokens(merged, batch()).log_probs, expected, atol=1e-5, rtol=1e-5)


def test_a_layer_that_is_not_there_is_named(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)nowhere.*change model.lora.target_modules"):
        adapted(tiny_model_dir, target_modules=["nowhere"])


@pytest.mark.parametrize(("option", "value"), [("rank", 0), ("alpha", 0), ("dropout", 1.0)])
def test_an_option_without_sense_is_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"model.lora.{option} must"):
        LoraOptions(**{"rank": 4, option: value})  # type: ignore[arg-type]


def first_metrics(module: Any, made: Any) -> Tensor:
    """The margin, or the log-ratio, of a batch before the first step."""
    if isinstance(module, DPOModule):
        tokens = module.reference_log_probs(made)
        policy = completion_tokens(module.model, made.tokens, groups=made.pairs())
        return policy.sum_by_sequence(policy.log_probs) - tokens
    samples = module.sample(made, [1, 2, 3, 4])
    return module.log_ratios(
        module.by_prompt(module.completions(module.model, samples.tokens, count=2), count=2), samples
    )


def test_before_the_first_step_rloo_s_log_ratios_are_exactly_zero(tiny_model_dir: Path) -> None:
    module = RLOOModule(
        model_name=str(tiny_model_dir),
        lora=LoraOptions(4),
        reward=brevity,
        samples_per_prompt=2,
        max_completion_length=6,
    )
    module.configure_model()
    made = PromptBatch([[{"role": "user", "content": "a"}]] * 2, [torch.tensor([5, 6]), torch.tensor([7, 8, 9])])
    assert first_metrics(module, made).count_nonzero() == 0
    stir(module.model)
    assert first_metrics(module, made).count_nonzero() > 0


@pytest.fixture
def lora_run(cli: Cli, config: Any, tmp_path: Path) -> Any:
    """Fits a method with an adapter, and gives its folder."""

    def fit(method: str, name: str = "run", *options: str, model: Any = None, **changes: Any) -> Path:
        started = {"lora": {"rank": 4}, "learning_rate": 1e-2, **(model or {})}
        root = {"default_root_dir": str(tmp_path / name), **changes.pop("trainer", {})}
        path = config(method, model=started, trainer=root, **changes)
        result = cli("fit", "--config", path, *options)
        assert result.returncode == 0, result.stderr
        return tmp_path / name

    return fit


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.tensor([ROWS[0]])).logits
    return found


@pytest.mark.parametrize("method", ["SFTModule", "DPOModule", "RLOOModule"])
def test_a_run_leaves_an_adapter_and_the_model_that_it_is_merged_into(
    method: str, lora_run: Any, tiny_model_dir: Path
) -> None:
    run = lora_run(method)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    before = logits(base)
    theirs = peft.PeftModel.from_pretrained(base, run / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(run / "final", dtype="auto")
    torch.testing.assert_close(logits(merged), logits(theirs), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, logits(merged))
    torch.testing.assert_close(logits(plain(run / "adapter")), logits(theirs), atol=1e-5, rtol=1e-5)
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    trained = {name for name, parameter in adapted(tiny_model_dir).named_parameters() if parameter.requires_grad}
    assert set(saved["state_dict"]) == {f"model.{name}" for name in trained}
    assert all(".lora_" in name for name in saved["state_dict"])
    evaluated = json.loads((run / "eval" / "epoch=0" / "metrics.json").read_text())
    assert evaluated["model_digest"] == tensors_digest(saved_tensors(run / "final")), "it is final/ that was judged"
    for name, library in (("final", "transformers"), ("adapter", "peft")):
        card = (run / name / "README.md").read_text()
        assert f"library_name: {library}" in card
        assert "| adapter | LoRA of rank 4, alpha 32 |" in card


def test_a_merged_model_is_in_the_dtype_of_its_base_and_need_not_be_written(
    lora_run: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).save_pretrained(half)
    load_tokenizer(str(tiny_model_dir)).save_pretrained(half)
    run = lora_run("SFTModule", model={"model_name": str(half)})
    assert {tensor.dtype for tensor in saved_tensors(run / "final")} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(run / "final", dtype="auto").dtype == torch.bfloat16
    evaluated = json.loads((run / "eval" / "epoch=0" / "metrics.json").read_text())
    assert evaluated["model_digest"] == tensors_digest(saved_tensors(run / "final"))
    other = lora_run("SFTModule", "other", "--export.merged", "false", model={"model_name": str(half)})
    assert (other / "adapter" / "adapter_model.safetensors").is_file()
    assert not (other / "final").exists()


def test_training_goes_on_with_an_adapter_whose_start_is_the_reference(
    lora_run: Any, tiny_model_dir: Path, cli: Cli, config: Any, tmp_path: Path
) -> None:
    """The first step's check holds the margin to 0, which it is against the adapter at its start alone."""
    sft = lora_run("SFTModule", "sft")
    start = str(sft / "adapter")
    dpo = lora_run("DPOModule", "dpo", model={"model_name": start, "precompute_reference": False})
    lines = [json.loads(line) for line in (dpo / "metrics.jsonl").read_text().splitlines()]
    assert any("val/margin" in line for line in lines)
    module = DPOModule(model_name=start, lora=LoraOptions(4))
    module.configure_model()
    expected = completion_tokens(plain(sft / "adapter").eval(), batch()).log_probs
    stir(module.model)
    with module.reference.beside(module.model) as reference, torch.no_grad():
        found = completion_tokens(reference, batch()).log_probs
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(completion_tokens(module.model, batch()).log_probs, expected)
    result = cli("fit", "--config", config("SFTModule", model={"model_name": start, "lora": {"rank": 8}}))
    assert_refused(result, "holds an adapter of rank 4")


def test_a_checkpoint_of_another_base_is_refused(lora_run: Any, cli: Cli, config: Any, tmp_path: Path) -> None:
    run = lora_run("SFTModule")
    last = run / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    content["base"] = "another"
    last.unlink()
    torch.save(content, last)
    path = config("SFTModule", model={"lora": {"rank": 4}, "learning_rate": 1e-2})
    assert_refused(cli("fit", "--config", path, "--ckpt_path", str(last)), "belongs to other weights than those of")


def test_a_reward_model_scores_alike_once_it_is_loaded_again(lora_run: Any, tiny_model_dir: Path) -> None:
    """Its head is trained in full, beside the adapter."""
    run = lora_run("RewardModule")
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert saved["model.score.weight"].count_nonzero() > 0
    module = RewardModule(model_name=str(tiny_model_dir), lora=LoraOptions(4))
    module.configure_model()
    module.load_state_dict(saved, strict=False)
    expected = sequence_scores(module.model.eval(), batch())
    prompts = [[{"role": "user", "content": "a"}]]
    whole, adapter = (ModelReward(str(run / name))(prompts, ["yes"]) for name in ("final", "adapter"))
    assert whole == pytest.approx(adapter, abs=1e-5)
    assert whole[0] != 0
    for name in ("final", "adapter"):
        again = load_reward_model(str(run / name), module.tokenizer, new_head=False).eval()
        torch.testing.assert_close(sequence_scores(again, batch()), expected, atol=1e-5, rtol=1e-5)
    going_on = RewardModule(model_name=str(run / "adapter"), lora=LoraOptions(4))
    going_on.configure_model()
    assert torch.equal(sequence_scores(going_on.model.eval(), batch()), expected), "bit for bit"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_part_of_an_adapter_moves(checkpointing: bool, lora_run: Any) -> None:
    run = lora_run("SFTModule", model={"gradient_checkpointing": checkpointing}, data={"batch_size": 2})
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    b = {name: value for name, value in weights.items() if "lora_B" in name}
    assert len(b) == 14
    assert all(value.count_nonzero() > 0 for value in b.values())


def test_an_adapter_s_dropout_is_sft_s_alone(tiny_model_dir: Path) -> None:
    methods: dict[Any, float] = {SFTModule: 0.5, DPOModule: 0.0, RewardModule: 0.0, RLOOModule: 0.0}
    for method, p in methods.items():
        options = {"reward": brevity} if method is RLOOModule else {}
        module = method(model_name=str(tiny_model_dir), lora=LoraOptions(4, dropout=0.5), **options)
        module.configure_model()
        found = {part.p for name, part in module.model.named_modules() if name.endswith("lora_dropout.default")}
        assert found == {p}, method


def test_validate_judges_an_adapter(lora_run: Any, cli: Cli, config: Any) -> None:
    run = lora_run("SFTModule")
    path = config("SFTModule", evaluation={"reference_model": str(run / "final")})
    assert cli("validate", "--config", path, "--model.model_name", str(run / "adapter")).returncode == 0
    told = json.loads((run / "eval" / "final" / "metrics.json").read_text())
    assert told["ties"] == told["prompts"], "the adapter on its base is the merged model"


def test_without_peft_the_option_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_modules.models.adapter_files.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"model.lora needs the package peft.* extra \[lora\]"):
        LoraOptions(4)


def test_a_reward_model_s_run_goes_on_with_its_head(lora_run: Any) -> None:
    """The head is trained, so it is no part of what must be the same."""
    run = lora_run("RewardModule")
    before = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["model.score.weight"]
    lora_run("RewardModule", "run", "--ckpt_path", "last", trainer={"max_epochs": 2})
    after = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["model.score.weight"]
    assert not torch.equal(before, after)


def wide_model(directory: Path) -> Path:
    """A model with matrices of whole blocks of quantisation."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(7)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **ids, tie_word_embeddings=True)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("method", ["SFTModule", "RewardModule", "DPOModule", "RLOOModule"])
def test_weights_of_few_bits_are_trained_beside_and_are_in_no_checkpoint(
    method: str, lora_run: Any, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra [quantized] is not installed")
    base = wide_model(tmp_path / "wide")
    run = lora_run(method, model={"model_name": str(base), "quantization": "nf4"})
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(".lora_" in name or name.endswith("score.weight") for name in saved)
    assert all(value.count_nonzero() > 0 for name, value in saved.items() if "lora_B" in name)
    config = json.loads((run / "final" / "config.json").read_text())
    assert "quantization_config" not in config
    assert {tensor.dtype for tensor in saved_tensors(run / "final")} == {torch.float32}
    if method == "SFTModule":
        module = SFTModule(model_name=str(base), lora=LoraOptions(4), quantization="nf4")
        assert is_start(module, None)
        assert not is_start(module, str(base)), "which is not in few bits"
        module.configure_model()
        module.load_state_dict(saved, strict=False)
        module.cpu()  # a GPU is where they are loaded, if there is one
        found = completion_tokens(module.model.eval(), batch()).log_probs
        merged = completion_tokens(plain(run / "final").eval(), batch()).log_probs
        torch.testing.assert_close(found, merged, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(
            completion_tokens(plain(run / "adapter").eval(), batch()).log_probs, merged, atol=1e-4
        )


def test_weights_of_few_bits_cannot_be_trained(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"model.quantization keeps weights .* set model.lora.rank too"):
        SFTModule(model_name=str(tiny_model_dir), quantization="nf4")
    pytest.importorskip("bitsandbytes", reason="the extra [quantized] is not installed")
    if not torch.cuda.is_available():
        module = SFTModule(model_name=str(tiny_model_dir), lora=LoraOptions(4), quantization="int8")
        with pytest.raises(ConfigurationError, match=r"model.quantization int8 is for GPUs"):
            module.configure_model()


def test_under_bfloat16_the_frozen_matrices_take_half_the_memory_and_give_the_same(
    lora_run: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).save_pretrained(half)
    load_tokenizer(str(tiny_model_dir)).save_pretrained(half)
    whole, halved = adapted(half), adapted(half)
    halve_frozen(halved)
    kept = [p.dtype for name, p in halved.named_parameters() if name.endswith("base_layer.weight")]
    assert set(kept) == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (completion_tokens(model, batch()).log_probs for model in (halved, whole))
    assert torch.equal(found, expected)
    assert all(torch.equal(value, dict(merged_weights(whole))[name]) for name, value in merged_weights(halved))
    run = lora_run("RLOOModule", model={"model_name": str(half)}, trainer={"precision": "bf16-mixed"})
    assert (run / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank_pattern": {"q_proj": 8}}, r"another kind than plain LoRA \(rank_pattern\)"),
        ({"use_rslora": True}, r"another kind than plain LoRA \(use_rslora\)"),
        ({"r": "4"}, r"names no base model, layers, rank or alpha"),
        ({"target_modules": [1]}, r"names no base model, layers, rank or alpha"),
        ({"broken weights": 1}, r"adapter_model.safetensors cannot be read"),
        ({"other weights": 1}, r"does not fit its base"),
    ],
)
def test_a_foreign_adapter_is_refused_or_told(
    change: dict[str, Any], message: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """What would be merged or trained as something else than it is."""
    options = LoraOptions(4)
    model = adapted(tiny_model_dir)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, options, tmp_path, base=str(tiny_model_dir), trained=trained)
    load_tokenizer(str(tiny_model_dir)).save_pretrained(tmp_path)
    assert plain(tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    if "broken weights" in change:
        weights.write_bytes(b"no tensors")
    if "other weights" in change:
        save_file({"base_model.model.nowhere.lora_A.weight": torch.ones(4, 4)}, weights)
    with pytest.raises(ConfigurationError, match=message):
        plain(tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        add_adapter(plain(tiny_model_dir), options, start=str(tmp_path), seed=1)
