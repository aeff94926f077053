"""Plants small defects in copies of the suite, one at a time, and says which of them its tests do not notice.

    python -m tests.mutants                all of them, two at a time: about half an hour
    python -m tests.mutants rloo.py        those whose file or text holds a word
    python -m tests.mutants --check        only whether each still finds its place

A defect finds its place by text, so that it outlives edits around it. Each names the tests that should notice it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300


class Mutant(NamedTuple):
    """A defect: in the file the text, which is there once, becomes the replacement."""

    file: str
    text: str
    replacement: str
    tests: str
    """Arguments for pytest."""


SHARDS = "callbacks/checkpoints/sharded_checkpoint.py"
SHARD_FILES = "callbacks/checkpoints/sharded_files.py"
IO, BASE, RLOO, DPO = (
    "callbacks/checkpoints/checkpoint_io.py",
    "lightning_modules/base.py",
    "lightning_modules/rloo.py",
    "lightning_modules/dpo.py",
)
EVALUATION, ASKING, HTTP = (
    "callbacks/nemotron_evaluation.py",
    "lightning_modules/rewards/asking.py",
    "lightning_modules/rewards/http.py",
)
DATA, BOUNDARY, EXPORT = (
    "datamodules/base.py",
    "callbacks/checkpoints/boundary_checkpoint.py",
    "callbacks/hugging_face_export.py",
)
ENCODING, TOGETHER = "datamodules/encoding.py", "tests/test_datamodules.py -k together"
FOLDER, KEYS, CHAT = "commands/run_folder.py", "lightning_modules/rewards/keys.py", "datamodules/chat.py"

FORMATS, MIXTURE, CUSTOM = "datamodules/formats.py", "datamodules/mixture.py", "tests/test_custom_data.py"

PLANTED = [
    Mutant(SHARD_FILES, '"." in name or not', "not", "tests/test_hostile_input.py -k index"),
    Mutant(
        BASE,
        'self.trainer.strategy.reduce, reduce_op="sum")',
        'self.trainer.strategy.reduce, reduce_op="mean")',
        "tests/test_modules.py -k ranks",
    ),
    Mutant(
        "callbacks/checkpoints/exact_resume.py",
        "and not reaches_limit(trainer)",
        "",
        "tests/test_run_folder.py -k no_more",
    ),
    Mutant(
        "datamodules/position.py",
        "        self.epoch = start.epoch\n",
        "",
        "tests/test_exact_resume.py -k sampler",
    ),
    Mutant(
        "callbacks/checkpoints/exact_resume.py",
        "            trainer.should_stop = True\n",
        "            pass\n",
        "tests/test_exact_resume.py -k early_stopping",
    ),
    Mutant(RLOO, "        self._rollouts.clear()\n", "", "tests/test_modules.py -k rollout"),
    Mutant(
        RLOO,
        "backward(loss / self.trainer.accumulate_grad_batches, raw)",
        "backward(loss, raw)",
        "tests/test_modules.py -k replay",
    ),
    Mutant(
        KEYS, 'return host == "localhost"', 'return host.startswith("localhost")', "tests/test_boundaries.py -k owner"
    ),
    Mutant(
        "callbacks/evaluation/evaluate.py",
        "range(ranks.rank, len(prompts), ranks.count)",
        "range(len(prompts))",
        "tests/test_evaluate.py -k process",
    ),
    Mutant(
        "callbacks/evaluation/result.py",
        "tells = self.valid or known.counts",
        "tells = True",
        "tests/test_evaluate.py -k valid",
    ),
    Mutant(
        "callbacks/evaluation/evaluate.py",
        "zip(scores[::2], scores[1::2], strict=True)",
        "zip(scores[1::2], scores[::2], strict=True)",
        "tests/test_evaluate.py -k side",
    ),
    Mutant(DPO, "-{self.trainer.precision}-", "-", "tests/test_reference_cache.py -k precision"),
    Mutant(
        "lightning_modules/models/reference_cache.py",
        "with trainer.precision_plugin.train_step_context():",
        "if True:",
        "tests/test_reference_cache.py -k precision",
    ),
    Mutant(
        "callbacks/evaluation/completions.py",
        "if any(self.ranks.gather(lambda: len(missing) > 0)):",
        "if missing:",
        "tests/test_evaluation.py -k lacks",
    ),
    Mutant(
        "callbacks/evaluation/completions.py",
        "            opened.callback(reference.free)",
        "            pass",
        "tests/test_adapters.py -k loads_no_second",
    ),
    Mutant(
        "callbacks/evaluation/completions.py",
        "adapted=module.lora is not None,",
        "adapted=False,",
        "tests/test_adapters.py -k loads_no_second",
    ),
    Mutant(
        "callbacks/evaluation/completions.py",
        "return reference_model is None or (",
        "return (",
        "tests/test_adapters.py -k loads_no_second",
    ),
    Mutant(
        "callbacks/evaluation/completions.py",
        'arithmetic = f"{self.trainer.precision} ',
        'arithmetic = f"',
        "tests/test_evaluation_trust.py -k precision",
    ),
    Mutant(
        "callbacks/checkpoints/run_options.py",
        '"gradient_clip_algorithm", "precision")',
        '"gradient_clip_algorithm")',
        "tests/test_hostile_input.py -k precision",
    ),
    Mutant(
        RLOO,
        "(global_seed(), self.current_epoch, batch_idx, self.global_rank)",
        "(global_seed(), batch_idx, self.global_rank)",
        "tests/test_rloo_sampling.py -k seeds",
    ),
    Mutant(
        RLOO,
        "(global_seed(), self.current_epoch, batch_idx, self.global_rank)",
        "(global_seed(), self.current_epoch, batch_idx)",
        "tests/test_rloo_sampling.py -k seeds",
    ),
    Mutant(
        "lightning_modules/adapted.py",
        'return os.environ.get("PL_GLOBAL_SEED", "0")',
        'return "0"',
        "tests/test_rloo_sampling.py -k seeds",
    ),
    Mutant(
        DATA,
        '"rows_per_batch": self.batch_size, "seed": self.seed,',
        '"rows_per_batch": self.batch_size,',
        "tests/test_datamodules.py -k order",
    ),
    Mutant(
        DATA,
        "budget=self.tokens_per_batch, seed=self.seed,",
        "budget=self.tokens_per_batch, seed=1,",
        "tests/test_datamodules.py -k order",
    ),
    Mutant(
        "lightning_modules/forward/completions.py",
        "with torch.autocast(pooled.device.type, enabled=False):",
        "if True:",
        "tests/test_log_probs.py -k autocast",
    ),
    Mutant(
        "lightning_modules/rewards/local.py",
        "with torch.autocast(model.device.type, enabled=False):",
        "if True:",
        "tests/test_rewards.py -k autocast",
    ),
    Mutant(
        DPO,
        "pair_log_probs(read_tokens(policy)), pair_log_probs(read_tokens(reference))",
        "pair_log_probs(read_tokens(reference)), pair_log_probs(read_tokens(policy))",
        "tests/test_validation_figures.py",
    ),
    Mutant(
        "lightning_modules/reward.py",
        '"margin": margins}',
        '"margin": -margins}',
        "tests/test_validation_figures.py",
    ),
    Mutant(
        "lightning_modules/reward.py",
        "accuracy(margins)",
        "accuracy(-margins)",
        "tests/test_validation_figures.py",
    ),
    Mutant(
        RLOO,
        '"score": scores[~scores.isnan()]',
        '"score": scores.nan_to_num()',
        "tests/test_validation_figures.py",
    ),
    Mutant(
        DPO,
        "if not (margins.abs().max() <= tolerance and abs(loss - math.log(2)) <= tolerance):",
        "if margins.abs().max() > tolerance or abs(loss - math.log(2)) > tolerance:",
        "tests/test_modules.py -k margin",
    ),
    Mutant(
        "lightning_modules/optimiser_step.py",
        "(others, 0.0)",
        "(others, weight_decay)",
        "tests/test_modules.py -k decay",
    ),
    Mutant(BASE, "round(self.warmup_ratio * steps)", "round(self.warmup_ratio)", "tests/test_modules.py -k schedule"),
    Mutant(
        "core/ranks.py",
        "            if failure is not None:",
        "            if False:",
        "tests/test_ranks.py",
    ),
    Mutant(
        BOUNDARY,
        "if not at_step_boundary(trainer) or validation_follows(trainer):",
        "if False:",
        "tests/test_preemption.py -k clock",
    ),
    Mutant(
        BOUNDARY,
        "            self._save_validated(trainer, pl_module)\n        self._save_if_late",
        "            pass\n        self._save_if_late",
        "tests/test_preemption.py -k window",
    ),
    Mutant(IO, "            os.fsync(file.fileno())\n", "", "tests/test_checkpoint_io.py -k bytes_reach"),
    Mutant(IO, "        sync_directory(target.parent)\n", "", "tests/test_checkpoint_io.py -k bytes_reach"),
    Mutant(
        "core/terminal.py",
        "shown(redact(message))",
        "shown(message)",
        "tests/test_hostile_input.py -k echo",
    ),
    Mutant(
        "core/secrets.py",
        'text.replace(value, "***")',
        'text.replace(value, "***", 1)',
        "tests/test_hostile_input.py -k resembles",
    ),
    Mutant(
        CHAT,
        "dict.fromkeys([turn_end(tokenizer).token_id, tokenizer.eos_token_id])",
        "dict.fromkeys([turn_end(tokenizer).token_id])",
        "tests/test_chat.py -k end_of_text",
    ),
    Mutant(EXPORT, "    model.config.eos_token_id = stops[0]\n", "", "tests/test_cli.py -k promised"),
    Mutant(EXPORT, '"eos_token_id": stops,', '"eos_token_id": stops[:1],', "tests/test_cli.py -k promised"),
    Mutant(
        DATA,
        "sampler = ShardSampler(items, *self._ranks(), items_per_batch=1 if in_lists else self.batch_size)",
        "sampler = DistributedSampler(items, *self._ranks(), shuffle=False); sampler.counted = 99",
        "tests/test_datamodules.py -k shards",
    ),
    Mutant(
        DATA,
        "max_length=self.max_length - tail,",
        "max_length=self.max_length,",
        "tests/test_datamodules.py -k exact_limit",
    ),
    Mutant(
        "lightning_modules/forward/completions.py",
        "token_entropy(logits.detach(), temperature=temperature)",
        "token_entropy(logits.detach())",
        "tests/test_fast_paths.py -k entropy",
    ),
    Mutant("lightning_modules/functional/reinforce.py", ".clamp(-20, 20).exp()", ".exp()", "tests/test_reinforce.py"),
    Mutant(
        "lightning_modules/functional/head.py",
        "rtol=1e-5, atol=0",
        "rtol=0.1, atol=0",
        "tests/test_fast_paths.py -k weights",
    ),
    Mutant(
        "lightning_modules/rewards/local.py",
        "self.max_length, self.dtype]",
        "self.max_length]",
        "tests/test_rewards.py -k identity",
    ),
    Mutant(
        "callbacks/evaluation/completions.py",
        "cache_key(model_digest, input_ids, stops, seed",
        "cache_key(model_digest, input_ids, seed",
        "tests/test_evaluation.py -k key",
    ),
    Mutant(
        "lightning_modules/rewards/budget.py",
        "        with self._lock:\n            if self.left is None:",
        "        if True:\n            if self.left is None:",
        "tests/test_nemotron.py -k budget",
    ),
    Mutant(
        "lightning_modules/rewards/budget.py",
        "                self.left += 1\n",
        "                pass\n",
        "tests/test_nemotron.py -k budget",
    ),
    Mutant(
        "lightning_modules/rewards/replies.py",
        "            if len(body) > LARGEST_REPLY:",
        "            if False:",
        "tests/test_nemotron.py -k too_large",
    ),
    Mutant(
        "callbacks/evaluation/metrics.py",
        "failed <= max_failed_share",
        "failed < max_failed_share",
        "tests/test_evaluation_trust.py -k share",
    ),
    Mutant(
        "datamodules/prompts.py",
        "or tokens > max_length:",
        "or tokens >= max_length:",
        "tests/test_datamodules.py -k exact_limit",
    ),
    Mutant(
        "lightning_modules/functional/sampling.py",
        "probabilities.cumsum(-1) - probabilities >= top_p",
        "probabilities.cumsum(-1) - probabilities > top_p",
        "tests/test_draws.py",
    ),
    Mutant(
        "lightning_modules/generation/sampler.py", ", dtype=torch.float32)", ")", "tests/test_generation.py -k default"
    ),
    Mutant(
        "datamodules/prompts.py", "renamed(rows, columns)", "renamed(rows, {})", "tests/test_custom_data.py -k any_name"
    ),
    Mutant(
        "lightning_modules/adapted.py",
        "        freeze_unread(model)\n",
        "",
        "tests/test_modules.py -k sees_too",
    ),
    Mutant(
        "lightning_modules/generation/decoders.py",
        "if known or steps_as_whole_rows(model) else",
        "if True else",
        "tests/test_decode.py -k cache",
    ),
    Mutant(
        "lightning_modules/generation/transformers_decoder.py",
        "self.rows = [self.rows[number] for number in rows.tolist()]",
        "self.rows = self.rows[: len(rows)]",
        "tests/test_decode.py -k forward_too",
    ),
    Mutant(
        "lightning_modules/generation/family_decoder.py",
        "layer.key_norm(turned[:, queries:])",
        "layer.query_norm(turned[:, queries:])",
        "tests/test_decode.py",
    ),
    Mutant(
        "lightning_modules/generation/family_decoder.py",
        "places = (steps < own)",
        "places = (steps <= own)",
        "tests/test_decode.py -k together",
    ),
    Mutant(
        "lightning_modules/generation/family_decoder.py",
        "by_prompt[:, first + group.numbers",
        "by_prompt[:, group.numbers",
        "tests/test_decode.py",
    ),
    Mutant("core/turns.py", "max(1, int(room))", "max(1, round(room))", "tests/test_turns.py -k room"),
    Mutant(
        "lightning_modules/rloo.py",
        "if adapted or self.sharding is not None else copy",
        "if adapted else copy",
        "tests/test_turns.py",
    ),
    Mutant(
        "lightning_modules/base.py",
        "with turn_to_load(self.loaded_name, processes=processes) if sharding else nullcontext():",
        "with nullcontext():",
        "tests/test_turns.py",
    ),
    Mutant("core/memory.py", "limit - used + int(known.get(key, 0))", "limit - used", "tests/test_turns.py -k left"),
    Mutant("core/memory.py", "folder = folder.parent", "folder = None", "tests/test_turns.py -k left"),
    Mutant(
        "lightning_modules/optimiser_step.py",
        "(part + step == part) & (part - step == part)",
        "part + step == part",
        "tests/test_modules.py -k neighbours",
    ),
    Mutant(
        "lightning_modules/optimiser_step.py",
        "if other is None and (share",
        "if (share",
        "tests/test_modules.py -k cannot",
    ),
    Mutant(
        "lightning_modules/generation/sampler.py",
        "on_tokens(rows, drawn, ~ended)",
        "on_tokens(rows, drawn, ended == ended)",
        "tests/test_chat_command.py -k further",
    ),
    Mutant("commands/chat.py", "drawn[further].tolist()", "drawn.tolist()", "tests/test_chat_command.py -k stop"),
    Mutant(
        "callbacks/checkpoints/sharded_checkpoint.py",
        "metadata.storage_data = {part.index: part.storage_data for parts in results for part in parts}",
        "",
        "tests/test_checkpoint_io.py -k index",
    ),
    Mutant(
        "lightning_modules/generation/sampler.py",
        " if token < vocabulary]",
        "]",
        "tests/test_generation.py -k vocabulary",
    ),
    Mutant(
        "lightning_modules/generation/decoders.py",
        '        and rope.get("partial_rotary_factor", 1.0) == 1.0\n',
        "",
        "tests/test_decode.py -k exactly",
    ),
    Mutant(
        HTTP,
        "timeout=self.timeout_s, allow_redirects=False)",
        "timeout=self.timeout_s)",
        "tests/test_nemotron.py -k redirect",
    ),
    Mutant(
        "callbacks/evaluation/result_record.py",
        "isinstance(value, bool) and math.isfinite(value)\n\n\ndef is_count",
        "isinstance(value, bool)\n\n\ndef is_count",
        "tests/test_compare.py tests/test_broken_runs.py -k number",
    ),
]
"""Defects that once passed all tests (issue by issue, by their harm)."""

OWN = [
    Mutant(
        "lightning_modules/models/adapters.py",
        "        layer._active_adapter = [REFERENCE]",
        "        layer._active_adapter = [TRAINED]",
        "tests/test_adapters.py -k without_its_adapter",
    ),
    Mutant(
        "lightning_modules/models/adapters.py",
        "change = layer.scaling[name] * (b @ a)",
        "change = b @ a",
        "tests/test_adapters.py -k merging",
    ),
    Mutant(
        "lightning_modules/models/adapters.py",
        "            torch.manual_seed(seed)\n",
        "",
        "tests/test_adapters.py -k same_seed",
    ),
    Mutant(
        "lightning_modules/models/adapters.py",
        'parameter.requires_grad_(f".{TRAINED}." in name or name.startswith(HEADS))',
        'parameter.requires_grad_(f".{TRAINED}." in name)',
        "tests/test_adapters.py -k reward_model",
    ),
    Mutant(
        "lightning_modules/adapted.py",
        'if checkpoint.get("base") != self.base_digest:',
        "if False:",
        "tests/test_adapters.py -k another_base",
    ),
    Mutant(
        "lightning_modules/adapted.py",
        "return {name: value for name, value in state.items() if name in trained}",
        "return state",
        "tests/test_adapters.py -k leaves_an_adapter",
    ),
    Mutant(
        "lightning_modules/adapted.py",
        "yield name, value.to(self.base_dtype) if cast else value",
        "yield name, value",
        "tests/test_adapters.py -k dtype_of_its_base",
    ),
    Mutant(
        "lightning_modules/models/loading.py",
        'setattr(module, "support_avx512bf16_for_cpu", False)',
        "pass",
        "tests/test_adapters.py -k few_bits",
    ),
    Mutant(
        "lightning_modules/optimiser_step.py",
        "            parameter.grad = None\n",
        "            parameter.grad.zero_()\n",
        "tests/test_training_health.py -k changes_no_weight",
    ),
    Mutant(
        "lightning_modules/optimiser_step.py",
        "norm.isfinite() and not scaled",
        "norm.isfinite()",
        "tests/test_training_health.py -k scaler",
    ),
    Mutant(
        "lightning_modules/rloo.py",
        "policy_gradient_loss(log_probs, advantages) + broken(scores, rewards)",
        "policy_gradient_loss(log_probs, advantages)",
        "tests/test_training_health.py -k log_probs",
    ),
    Mutant(
        "callbacks/training_health.py",
        "self._in_a_row + 1 if flaw else 0",
        "self._in_a_row + bool(flaw)",
        "tests/test_training_health.py -k keep_the_checkpoint",
    ),
    Mutant(
        "datamodules/shards.py",
        "if self.counted < most else own",
        "if not own else own",
        "tests/test_ranks.py -k counts_once",
    ),
    Mutant(
        "callbacks/checkpoints/exact_resume.py",
        "            trainer.num_sanity_val_steps = 0",
        "            pass",
        "tests/test_exact_resume.py -k all_its_figures",
    ),
    Mutant(
        "callbacks/nemotron_evaluation.py",
        '            self._last = state_dict["step"], read_result(state_dict["result"])',
        "            pass",
        "tests/test_exact_resume.py -k all_its_figures",
    ),
    Mutant(
        "lightning_modules/rloo.py",
        "        scores = self._ranks.own(score)",
        "        scores = score()",
        "tests/test_ranks.py -k waited_for",
    ),
    Mutant(EXPORT, "if place.exists() and not is_export(place):", "if False:", "tests/test_run_folder.py -k export"),
    Mutant(
        EXPORT,
        "            shutil.rmtree(old, ignore_errors=True)\n            target.rename(old)\n",
        "            shutil.rmtree(target)\n",
        "tests/test_run_folder.py -k export",
    ),
    Mutant(
        EXPORT,
        "        shutil.rmtree(partial, ignore_errors=True)\n        told",
        "        told",
        "tests/test_run_folder.py -k export",
    ),
    Mutant(
        FOLDER,
        "            if self._owns(export) and is_export(export):",
        "            if export.exists():",
        "tests/test_run_folder.py -k starting_over",
    ),
    Mutant(
        FOLDER,
        "        if self._owns(self.checkpoints):\n",
        "        if True:\n",
        "tests/test_run_folder.py -k starting_over",
    ),
    Mutant(
        FOLDER,
        "    if path.is_dir() and not path.is_symlink():\n        shutil",
        "    if path.is_dir():\n        shutil",
        "tests/test_run_folder.py -k starting_over",
    ),
    Mutant(
        FOLDER,
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "tests/test_run_folder.py -k at_a_time",
    ),
    Mutant(FOLDER, "            if place.is_symlink():", "            if False:", "tests/test_run_folder.py -k link"),
    Mutant(
        BOUNDARY,
        "        return inside and super()",
        "        return super()",
        "tests/test_run_folder.py -k record_of_others",
    ),
    Mutant(
        BOUNDARY,
        "copies * checkpoint_bytes(pl_module)",
        "0 * checkpoint_bytes(pl_module)",
        "tests/test_run_folder.py -k room",
    ),
    Mutant(
        "core/files.py",
        "os.O_EXCL | getattr",
        "os.O_TRUNC | getattr",
        "tests/test_bad_days.py -k file",
    ),
    Mutant(
        "core/files.py",
        "        with suppress(OSError):\n            partial.unlink()\n",
        "        pass\n",
        "tests/test_bad_days.py -k whole_file",
    ),
    Mutant(
        KEYS,
        'return f".{urlsplit(url).hostname or \'\'}".endswith(".nvidia.com")',
        'return (urlsplit(url).hostname or "").endswith("nvidia.com")',
        "tests/test_boundaries.py -k owner",
    ),
    Mutant(
        KEYS,
        "asked.port or default,\n        )",
        "named.port or default,\n        )",
        "tests/test_boundaries.py -k owner",
    ),
    Mutant(KEYS, 'if "\\\\" in url or "@" in url or', "if", "tests/test_boundaries.py -k address"),
    Mutant(KEYS, "or (variable == OWN_KEY and not is_named(url))", "", "tests/test_boundaries.py -k owner"),
    Mutant(KEYS, "if not key or not keeps_a_secret(url) or", "if not key or", "tests/test_boundaries.py -k owner"),
    Mutant(
        "commands/boundaries.py",
        'if HOST.search(last) or "://" in value:',
        "if HOST.search(last):",
        "tests/test_boundaries.py -k host",
    ),
    Mutant(
        "commands/boundaries.py", '".." in re.split(r"[/\\\\]", value) or ', "", "tests/test_boundaries.py -k within"
    ),
    Mutant(
        "commands/boundaries.py",
        "path.resolve().is_relative_to(root.resolve())",
        "path.is_relative_to(root)",
        "tests/test_boundaries.py -k within",
    ),
    Mutant("core/plain.py", "        if depth > DEEPEST:", "        if False:", "tests/test_boundaries.py -k explode"),
    Mutant(
        "core/imports.py",
        "    if name not in _modules_in(Path.cwd()) or _found_in(name, Path.cwd()):",
        "    if True:",
        "tests/test_boundaries.py -k installed",
    ),
    Mutant(
        "cli.py",
        "sys.path.append(os.getcwd())",
        "sys.path.insert(0, os.getcwd())",
        "tests/test_boundaries.py -k current_directory",
    ),
    Mutant(
        "lightning_modules/models/loading.py",
        "    if attention not in ATTENTIONS:",
        "    if False:",
        "tests/test_foreign_models.py -k attention",
    ),
    Mutant(
        "lightning_modules/models/loading.py",
        "if Path(file).name != file or not file",
        "if not file",
        "tests/test_foreign_models.py -k index",
    ),
    Mutant(
        "datamodules/rendering.py",
        "    if longest > LARGEST_RENDERED:",
        "    if False:",
        "tests/test_foreign_models.py -k huge",
    ),
    Mutant(
        "core/limits.py",
        "            left_s = before_s - (time.monotonic() - started)",
        "            left_s = 0.0",
        "tests/test_foreign_models.py -k alarm",
    ),
    Mutant(
        "callbacks/model_card.py",
        'for name in ("method", "method_name", "dataset", "evaluation")},',
        "for name in stage},",
        "tests/test_foreign_models.py -k lineage",
    ),
    Mutant(
        "callbacks/evaluation/cache.py",
        "        if row is None or not isinstance(row[0], (int, float)) or not math.isfinite(row[0]):",
        "        if row is None:",
        "tests/test_bad_days.py -k values",
    ),
    Mutant(
        "callbacks/evaluation/cache.py",
        "            self._file = self._next(error)\n",
        "            raise\n",
        "tests/test_bad_days.py -k damaged",
    ),
    Mutant(
        "callbacks/logging/metrics_file.py",
        "                    os.ftruncate(descriptor, before)\n",
        "",
        "tests/test_bad_days.py -k full_disk",
    ),
    Mutant(
        "lightning_modules/models/reference_cache.py",
        "        file.add(found)\n",
        "",
        "tests/test_bad_days.py tests/test_reference_cache.py",
    ),
    Mutant(
        "callbacks/checkpoints/preemption.py",
        "(not fits or prepares or alone)",
        "(not fits or alone)",
        "tests/test_bad_days.py -k sigterm",
    ),
    Mutant(
        "lightning_modules/rewards/calling.py",
        "copy.deepcopy([list(prompt) for prompt in prompts])",
        "[list(prompt) for prompt in prompts]",
        "tests/test_rewards.py -k copies",
    ),
    Mutant("lightning_modules/rewards/calling.py", "        _worker.clear()\n", "", "tests/test_rewards.py -k hangs"),
    Mutant(
        "lightning_modules/rewards/rate_limit.py",
        "now = time.monotonic()",
        "now = time.time()",
        "tests/test_rate_limit.py -k clock",
    ),
    Mutant(
        "lightning_modules/rewards/rate_limit.py",
        " and not found.st_mode & 0o077",
        "",
        "tests/test_rate_limit.py -k alone",
    ),
    Mutant(
        "lightning_modules/rewards/server.py",
        "            if len(body) > LARGEST_BODY:",
        "            if False:",
        "tests/test_server.py -k too_large",
    ),
    Mutant(
        "lightning_modules/rewards/server.py",
        "        if self.cycle is None:\n            self.transport.close()",
        "        pass",
        "tests/test_server.py -k stalls",
    ),
    Mutant(
        "callbacks/evaluation/result_record.py",
        "            if field.default is MISSING and",
        "            if False and",
        "tests/test_broken_runs.py",
    ),
    Mutant("commands/compare.py", "    check_own(output)\n", "", "tests/test_broken_runs.py -k replaces"),
    Mutant(
        "core/text.py",
        "letter if letter.isprintable() else letter.encode",
        "letter if True else letter.encode",
        "tests/test_broken_runs.py -k markup",
    ),
    Mutant(FORMATS, 'return [*prompt, *side] if first == "assistant" else side', "return side", CUSTOM),
    Mutant(
        FORMATS,
        'filter(None, (as_text(row[name]) for name in ("instruction", "input")',
        'filter(None, (as_text(row[name]) for name in ("instruction",)',
        CUSTOM,
    ),
    Mutant(FORMATS, 'prompt = re.sub(r"\\S*$", "", common).rstrip()', "prompt = common", CUSTOM),
    Mutant("datamodules/splits.py", "np.flatnonzero(~shared)", "np.flatnonzero(shared)", CUSTOM),
    Mutant("datamodules/encoders.py", "[False] + [True] * (len(piece) - 1)", "[True] * len(piece)", CUSTOM),
    Mutant("datamodules/custom.py", "held_out=held_out, seed=self.split_seed", "held_out=held_out", CUSTOM),
    Mutant("datamodules/chat_template.py", "(calls and not known.calls) or", "", CUSTOM),
    Mutant(MIXTURE, "_order(size, seed, epoch, part, turn)", "_order(size, seed, part, turn)", "tests/test_mixture.py"),
    Mutant(MIXTURE, "batches[rank::world_size]]", "batches]", "tests/test_mixture.py"),
    Mutant(
        MIXTURE,
        "lambda name: counts[name] - exact[name]",
        "lambda name: exact[name] - counts[name]",
        "tests/test_mixture.py",
    ),
    Mutant(
        "datamodules/length_groups.py",
        "whole = len(order) // step * step",
        "whole = len(order)",
        "tests/test_length_groups.py",
    ),
    Mutant("commands/planning/trace.py", "self._sizes.pop(key, 0)).times(-1)", "0).times(-1)", "tests/test_plan.py"),
    Mutant("commands/push.py", "private=not public", "private=public", "tests/test_push.py"),
    Mutant(
        "lightning_modules/forward/completions.py",
        "states: Tensor = run(model, body, **model_inputs(flat)).last_hidden_state[0]",
        "states: Tensor = body(**model_inputs(flat)).last_hidden_state[0]",
        "tests/test_batch_splitting.py -k two_ranks",
    ),
    Mutant(
        "lightning_modules/optimiser_step.py",
        "norm = whole(torch.nn.utils.get_total_norm(gradients))",
        "norm = torch.nn.utils.get_total_norm([local(gradient) for gradient in gradients])",
        "tests/test_sharding.py -k losses_of_ten",
    ),
    Mutant(
        BASE,
        "self._counts = own is None or batch_idx < own.counted_batches",
        "pass",
        "tests/test_ranks.py::test_validation_figures_are_the_same_on_one_to_three_processes[SFTModule]",
    ),
    Mutant(SHARD_FILES, "or checksum(path) != crc", "", "tests/test_checkpoint_io.py -k sharded"),
    Mutant(
        SHARD_FILES,
        "if not all(isinstance(entry, TensorStorageMetadata) for entry in index.state_dict_metadata.values()):",
        "if False:",
        "tests/test_checkpoint_io.py -k sharded",
    ),
    Mutant(
        SHARD_FILES,
        "            replaced.rename(target)\n        raise",
        "            pass\n        raise",
        "tests/test_sharding.py -k full_disk",
    ),
    Mutant(
        SHARDS,
        "state.setdefault(numbers[name], {})[key] = tensor",
        "state.setdefault(0, {})[key] = tensor",
        "tests/test_sharding.py -k full_disk",
    ),
    Mutant(ENCODING, "zip(indices, _run", "zip(range(len(rows)), _run", "tests/test_datamodules.py -k names_its_row"),
    Mutant(ENCODING, "islice(encoded, len(each))", "islice(encoded, 1)", TOGETHER),
    Mutant("datamodules/rendering.py", "is opened and not one.tools]", "is opened]", TOGETHER),
    Mutant(
        "datamodules/rendering.py",
        "if size >= RENDERED_TOGETHER:",
        "if False:",
        "tests/test_datamodules.py -k so_much",
    ),
    Mutant(CHAT, 'answered and conversation.messages[answers[number // 2]].get("weight") != 0', "answered", CUSTOM),
    Mutant(CHAT, "        deque(written, maxlen=0)", "        del written", TOGETHER),
    Mutant("datamodules/rendering.py", "if number not in found:", "if False:", TOGETHER),
    Mutant(CHAT, "if not (text.startswith(done) and (", "if not ((", "tests/test_chat.py -k rewrites"),
    Mutant("datamodules/chat.py", "        backend.no_truncation()\n", "", "tests/test_chat.py -k without_offsets"),
    Mutant("datamodules/position.py", " // multiple * multiple", "", "tests/test_sharding.py -k another_number"),
    Mutant(
        "callbacks/checkpoints/exact_resume.py",
        "counts.update(dict.fromkeys(counts, self._moved.batches))",
        "pass",
        "tests/test_sharding.py -k goes_on_with",
    ),
    Mutant(
        "commands/members.py", "if member.code != first.code:", "if False:", "tests/test_launch.py -k ends_on_every"
    ),
    Mutant(
        "commands/members.py", 'member.device.startswith("cuda")', "False", "tests/test_launch.py -k names_the_process"
    ),
    Mutant(
        "commands/launch.py",
        "if digest != first[name]:",
        "if False:",
        "tests/test_launch.py -k ends_on_every",
    ),
]
"""Defects in what was written since."""


def place(mutant: Mutant, root: Path = ROOT) -> str:
    """The file's text with the defect.

    Raises:
        ValueError: If the defect has no place, or several.
    """
    text = (root / mutant.file).read_text("utf-8")
    if text.count(mutant.text) != 1:
        raise ValueError(f"{mutant.file} has {text.count(mutant.text)} places for {mutant.text!r}")
    return text.replace(mutant.text, mutant.replacement)


def copy_of_the_suite(folder: Path) -> Path:
    """The files under version control, with the real data beside them where it is at hand."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    copy = folder / "suite"
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return copy


def is_noticed(mutant: Mutant, copy: Path) -> str:
    """Empty if the tests fail on the defect, otherwise what they do."""
    changed = copy / mutant.file
    original = changed.read_text("utf-8")
    changed.write_text(place(mutant, copy), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "slow or not slow", "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        result = subprocess.run(
            [*command, *mutant.tests.split()],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ""  # a test that hangs is noticed
    finally:
        changed.write_text(original, encoding="utf-8")
    if result.returncode == 1:
        return ""
    return "survives" if result.returncode == 0 else f"pytest ends with {result.returncode}: {result.stdout[-300:]}"


def main() -> int:
    """Plant what is asked for, and count what is left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("words", nargs="*", help="plant only what holds one of these in its file or text")
    parser.add_argument("--check", action="store_true", help="only look for the places")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    chosen = [m for m in [*PLANTED, *OWN] if not arguments.words or any(w in m.file + m.text for w in arguments.words)]
    for mutant in chosen:
        place(mutant)
    print(f"{len(chosen)} defects, each in its place", flush=True)
    if arguments.check:
        return 0
    survivors = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for job in range(arguments.jobs):
            (Path(folder) / str(job)).mkdir()
            copies.put(copy_of_the_suite(Path(folder) / str(job)))

        def plant(mutant: Mutant) -> None:
            copy = copies.get()
            told = is_noticed(mutant, copy)
            copies.put(copy)
            line = f"{mutant.file}: {mutant.text.strip()[:60]!r} -> {mutant.replacement.strip()[:40]!r}"
            print(f"{told or 'noticed'}: {line}", flush=True)
            if told:
                survivors.append(mutant)

        list(pool.map(plant, chosen))
    planted, own = (sum(m in group for m in survivors) for group in (PLANTED, OWN))
    print(f"survivors: {planted} of {len(PLANTED)} that once passed, {own} of {len(OWN)} others")
    return 1 if planted or own * 10 > len(OWN) else 0


if __name__ == "__main__":
    sys.exit(main())
