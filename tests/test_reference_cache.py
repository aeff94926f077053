"""The reference is asked once about each pair, whatever run asks, and never about what has changed unnoticed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from datamodules.batches import PreferenceBatch, TokenBatch, pad
from lightning_modules import DPOModule
from lightning_modules.models.identity import weights_digest
from lightning_modules.models.loading import load_causal_lm
from lightning_modules.models.reference_cache import pair_keys, read_table

pytestmark = pytest.mark.filterwarnings("ignore")

Pair = tuple[list[int], list[int], list[int]]
PAIRS: list[Pair] = [([1, 2, 3], [4, 5], [6]), ([7, 8], [9], [1, 1, 2]), ([3, 3], [5, 4], [4, 5])]


def batch_of(pairs: Sequence[Pair]) -> PreferenceBatch:
    rows = [prompt + completion for side in (1, 2) for prompt, completion in ((pair[0], pair[side]) for pair in pairs)]
    starts = [len(pair[0]) for pair in pairs] * 2
    masks = [[i >= start for i in range(len(row))] for row, start in zip(rows, starts, strict=True)]
    return PreferenceBatch(pad(rows, masks, pad_token_id=0))


def fit(directory: Path, root: Path, pairs: Sequence[Pair] = PAIRS, **options: Any) -> tuple[DPOModule, list[int]]:
    """Two epochs of one pair a batch; the module, and how many pairs each question to the reference was about."""
    limits = {"max_epochs": 2, "limit_val_batches": 0, **options.pop("limits", {})}
    workers = options.pop("workers", 0)
    module = DPOModule(model_name=str(directory), learning_rate=1e-3, **options)
    asked: list[int] = []
    ask = module.reference_log_probs

    def counting(batch: PreferenceBatch) -> torch.Tensor:
        asked.append(len(batch.pairs()) // 2)
        return ask(batch)

    module.reference_log_probs = counting  # type: ignore[method-assign]
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=root / "run",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **limits,
    )
    batches = [batch_of([pair]) for pair in pairs]
    trainer.fit(module, DataLoader(batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0))
    if trainer.max_steps == -1:
        assert trainer.global_step == trainer.max_epochs * trainer.num_training_batches
    return module, asked


def weights(module: DPOModule) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.model.parameters()])


def test_asking_before_training_gives_the_weights_that_asking_at_each_step_gives(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    before, asked = fit(tiny_model_dir, tmp_path)
    at_each_step, asked_online = fit(tiny_model_dir, tmp_path, precompute_reference=False)
    assert (len(asked), len(asked_online)) == (3, 6)
    torch.testing.assert_close(weights(before), weights(at_each_step), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("epochs", [1, 2])
def test_workers_that_load_batches_give_training_all_of_them_too(
    tiny_model_dir: Path, tmp_path: Path, epochs: int
) -> None:
    """They persist and share one iterator, which asking the reference must not use up."""
    alone, _ = fit(tiny_model_dir, tmp_path / "alone", limits={"max_epochs": epochs})
    helped, asked = fit(tiny_model_dir, tmp_path / "helped", limits={"max_epochs": epochs}, workers=1)
    assert len(asked) == 3
    assert torch.equal(weights(alone), weights(helped))


def test_epochs_shorter_than_the_data_are_asked_about_as_they_come(tiny_model_dir: Path, tmp_path: Path) -> None:
    _, asked = fit(tiny_model_dir, tmp_path, limits={"max_epochs": 2, "limit_train_batches": 1})
    assert len(asked) == 2
    _, asked = fit(tiny_model_dir, tmp_path / "one", limits={"max_epochs": 1, "limit_train_batches": 2})
    assert len(asked) == 2


def test_a_table_that_holds_no_number_is_asked_about_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    fit(tiny_model_dir, tmp_path)
    (file,) = (tmp_path / "cache").iterdir()
    table = read_table(file)
    lines = [[key, *values] for key, values in table.items()]
    lines[0][1] = float("nan")
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert fit(tiny_model_dir, tmp_path)[1] == [1]
    assert read_table(file) == table


def test_the_reference_is_not_in_memory_while_training(tiny_model_dir: Path, tmp_path: Path) -> None:
    module, _ = fit(tiny_model_dir, tmp_path)
    assert module.reference._model is None
    assert not any("reference" in name for name in module.state_dict())


def test_another_run_asks_about_new_pairs_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    fit(tiny_model_dir, tmp_path, PAIRS[:2])
    assert fit(tiny_model_dir, tmp_path, PAIRS[:2])[1] == []
    first, asked = fit(tiny_model_dir, tmp_path)
    assert asked == [1]
    second, _ = fit(tiny_model_dir, tmp_path / "elsewhere")
    assert torch.equal(weights(first), weights(second))


def test_of_a_broken_file_the_whole_lines_count(tiny_model_dir: Path, tmp_path: Path) -> None:
    fit(tiny_model_dir, tmp_path)
    (file,) = (tmp_path / "cache").iterdir()
    whole, table = file.read_text(), read_table(file)
    for broken, missing in ((whole[:-20], 1), ("[]\n7\n{}\n[1]\n\xff", 3), (whole[5:], 1), ("[" * 100_000, 3)):
        file.write_text(broken)
        assert len(fit(tiny_model_dir, tmp_path)[1]) == missing
        assert read_table(file) == table
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert read_table(tmp_path / "nowhere.jsonl") == {}


def test_other_weights_or_another_configuration_have_another_digest(tiny_model_dir: Path) -> None:
    from datamodules.chat import load_tokenizer

    model = load_causal_lm(str(tiny_model_dir), load_tokenizer(str(tiny_model_dir)))
    digests = [weights_digest(model)]
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 2] += 1e-6  # type: ignore[operator, union-attr, index]
    digests.append(weights_digest(model))
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 17.0}
    digests.append(weights_digest(model))
    assert len(set(digests)) == 3


def test_a_pairs_key_is_its_content_and_not_its_padding_or_neighbours() -> None:
    alone, together = pair_keys(batch_of(PAIRS[:1])), pair_keys(batch_of(PAIRS))
    assert alone[0] == together[0]
    assert len(set(together)) == 3
    swapped = batch_of([(PAIRS[0][0], PAIRS[0][2], PAIRS[0][1])])
    assert pair_keys(swapped) != alone
    ids, attended, completion = batch_of(PAIRS[:1]).tokens
    shorter = PreferenceBatch(TokenBatch(ids, attended, completion & (torch.arange(ids.shape[1]) != 3)))
    assert pair_keys(shorter) != alone


def test_a_run_that_ends_early_asks_about_no_pair_that_it_will_not_see(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert len(fit(tiny_model_dir, tmp_path, limits={"max_steps": 2, "max_epochs": -1})[1]) == 2


def test_under_another_precision_the_reference_is_asked_anew(tiny_model_dir: Path, tmp_path: Path) -> None:
    """And under the run's own, precomputed or not: the weights after training are the same."""
    trained = {}
    for precision in ("bf16-mixed", "32-true"):
        for precompute in (True, False):
            options = {"precompute_reference": precompute, "limits": {"precision": precision}}
            module, asked = fit(tiny_model_dir, tmp_path, **options)
            assert len(asked) == (3 if precompute else 6)
            trained[precision, precompute] = weights(module)
    for precision in ("bf16-mixed", "32-true"):
        assert torch.equal(trained[precision, True], trained[precision, False])
    assert not torch.equal(trained["bf16-mixed", True], trained["32-true", True])
    assert len(list((tmp_path / "cache").iterdir())) == 2
