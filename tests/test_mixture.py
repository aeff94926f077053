"""Mixtures: exact counts, epochs that differ, a validation by part, packing, many processes, resume."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.errors import ConfigurationError
from datamodules import CustomDataModule, MixtureDataModule
from datamodules.mixture import MixtureSampler, apportioned
from datamodules.position import Position
from datamodules.token_budget import to_number
from tests.command_line import Cli


def rows(file: Path, count: int, name: str) -> str:
    lines = [json.dumps({"prompt": f"{name}{i}", "completion": "y" * (i % 5 + 1)}) for i in range(count)]
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def part(tmp_path: Path, name: str, count: int, **options: Any) -> CustomDataModule:
    file = rows(tmp_path / f"{name}.jsonl", count, name)
    return CustomDataModule(file, "conversations", validation_share=0.2, **options)


def mixture(tmp_path: Path, model: Path, sizes: dict[str, int], **options: Any) -> MixtureDataModule:
    parts = {name: part(tmp_path, name, count) for name, count in sizes.items()}
    module = MixtureDataModule(parts=parts, model_name=str(model), **options)  # type: ignore[arg-type]
    module.setup("fit")
    return module


def sampler(**options: Any) -> MixtureSampler:
    given: dict[str, Any] = {"sizes": [100, 10], "counts": [70, 30], "world_size": 1, "rank": 0, "seed": 1} | options
    return MixtureSampler(**given)


def epoch(which: MixtureSampler, number: int) -> list[Any]:
    which.set_epoch(number)
    return list(which)


def test_an_epoch_has_so_many_rows_of_each_part_and_none_twice_before_all_once() -> None:
    found = epoch(sampler(), 0)
    assert len(found) == 100
    assert len({row for row in found if row < 100}) == 70
    assert Counter(row for row in found if row >= 100) == dict.fromkeys(range(100, 110), 3)


def test_epochs_draw_other_rows_in_another_order_and_the_seed_decides() -> None:
    epochs = [epoch(sampler(), number) for number in range(3)]
    drawn = [{row for row in found if row < 100} for found in epochs]
    assert drawn[0] != drawn[1] != drawn[2]
    assert [row >= 100 for row in epochs[0]] != [row >= 100 for row in epochs[1]]
    assert epoch(sampler(), 1) == epochs[1]
    assert epoch(sampler(seed=2), 1) != epochs[1]


def test_parts_are_mixed_throughout_an_epoch() -> None:
    found = epoch(sampler(), 0)
    assert all(15 > sum(row >= 100 for row in found[at : at + 25]) > 1 for at in range(0, 100, 25))


def test_processes_share_an_epoch_and_have_as_much_each() -> None:
    shares = [epoch(sampler(world_size=3, rank=rank), 2) for rank in range(3)]
    whole = epoch(sampler(), 2)
    assert [len(share) for share in shares] == [34, 34, 34]
    assert [row for rows_ in zip(*shares, strict=True) for row in rows_] == [*whole, *whole[:2]]


@pytest.mark.parametrize("batches", [0, 3])
def test_an_epoch_goes_on_behind_what_is_done(batches: int) -> None:
    resumed = sampler(start=Position(1, batches), rows_per_batch=8)
    assert list(resumed) == epoch(sampler(), 1)[8 * batches :]


def test_batches_of_a_token_budget_have_the_same_rows_and_every_epoch_as_many() -> None:
    lengths = [1 + (7 * row) % 13 for row in range(110)]
    packed = sampler(lengths=(lengths, 40))
    counts = []
    for number in range(5):
        found = epoch(packed, number)
        counts.append(len(found))
        assert Counter(row for batch in found for row in batch) == Counter(epoch(sampler(), number))
        assert max(sum(lengths[row] for row in batch) for batch in found) <= 40
    assert set(counts) == {len(packed)}
    assert len(packed) <= 1.05 * math.ceil(sum(lengths) / 40) + 1


def test_batches_are_brought_to_a_number_without_losing_a_row() -> None:
    batches = [[1], [2, 3], [4], [5, 6, 7]]
    assert sorted(map(sorted, to_number(batches, 3))) == [[1, 4], [2, 3], [5, 6, 7]]
    assert sorted(map(sorted, to_number(batches, 5))) == [[1], [2, 3], [4], [5], [6, 7]]


def test_whole_numbers_in_proportion_add_up() -> None:
    assert apportioned(10, {"a": 0.7, "b": 0.3}) == {"a": 7, "b": 3}
    assert apportioned(10, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}) == {"a": 4, "b": 3, "c": 3}
    assert apportioned(101, {"a": 0.745, "b": 0.255}) == {"a": 75, "b": 26}


def test_an_epoch_is_as_large_as_it_can_be_without_a_row_twice(tmp_path: Path, tiny_model_dir: Path) -> None:
    module = mixture(tmp_path, tiny_model_dir, {"a": 100, "b": 20}, weights={"a": 0.7, "b": 0.3})
    assert module.counts(module._sizes["train"]) == {"a": 37, "b": 16}
    more = mixture(tmp_path, tiny_model_dir, {"a": 100, "b": 20}, weights={"a": 7.0, "b": 3.0}, rows_per_epoch=200)
    assert more.counts(more._sizes["train"]) == {"a": 140, "b": 60}


def test_batches_of_a_mixture_hold_what_the_parts_hold(tmp_path: Path, tiny_model_dir: Path) -> None:
    module = mixture(tmp_path, tiny_model_dir, {"a": 20, "b": 20}, weights={"a": 1.0, "b": 1.0}, batch_size=4)
    texts = [module.tokenizer.decode(ids) for batch in module.train_dataloader() for ids in batch.input_ids]
    assert Counter(text.split("user\n")[1][0] for text in texts) == {"a": 16, "b": 16}


def test_processes_validate_on_each_row_once_and_know_whose_it_is(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = mixture(tmp_path, tiny_model_dir, {"a": 50, "b": 25}, weights={"a": 1.0, "b": 1.0}, batch_size=3)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(module, "_ranks", lambda rank=rank: (2, rank))
        for number, batch in enumerate(module.val_dataloader()):
            texts = [module.tokenizer.decode(ids).split("user\n")[1] for ids in batch.input_ids]
            assert {text[0] for text in texts} == {module.validation_part(number)}
            seen += [text.partition("<")[0] for text in texts]
        assert module.validation_part(99) is None
    assert len(seen) == len(set(seen)) == 10 + 5


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"a": 1.0}, r"data.weights must be of the parts \['a', 'b'\]"),
        ({"a": 1.0, "b": 0.0}, r"data.weights.b must be positive, got 0"),
        ({"a": 1.0, "b": float("nan")}, r"data.weights.b must be positive"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    weights: dict[str, float], told: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    with pytest.raises(ConfigurationError, match=told):
        mixture(tmp_path, tiny_model_dir, {"a": 5, "b": 5}, weights=weights)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    a, weights = part(tmp_path, "a", 5), {"a": 1.0, "b": 1.0}
    prompts = CustomDataModule(a.dataset_name, "prompts")
    with pytest.raises(ConfigurationError, match="a yields conversations, b yields prompts"):
        MixtureDataModule(parts={"a": a, "b": prompts}, weights=weights)
    with pytest.raises(ConfigurationError, match="at least two"):
        MixtureDataModule(parts={"a": a}, weights={"a": 1.0})
    with pytest.raises(ConfigurationError, match="no name for metrics"):
        MixtureDataModule(parts={"a": a, "b.c": a}, weights={"a": 1.0, "b.c": 1.0})
    long = part(tmp_path, "b", 5, max_length=99)
    module = MixtureDataModule(parts={"a": a, "b": long}, weights=weights, model_name=str(tiny_model_dir))
    with pytest.raises(ConfigurationError, match=r"data.parts.b.max_length is 99 and data.max_length 512"):
        module.setup("fit")
    rare = mixture(tmp_path, tiny_model_dir, {"a": 5, "b": 5}, weights={"a": 1000.0, "b": 1.0}, rows_per_epoch=4)
    with pytest.raises(ConfigurationError, match=r"no row of b is in an epoch; raise data.weights.b"):
        rare.train_dataloader()


def test_a_held_out_prompt_of_one_part_is_found_in_another(tmp_path: Path, tiny_model_dir: Path) -> None:
    a, b = part(tmp_path, "a", 10), part(tmp_path, "b", 10)
    Path(b.dataset_name).write_text(Path(a.dataset_name).read_text())
    b.split_seed = 5
    module = MixtureDataModule(
        parts={"a": a, "b": b}, weights={"a": 1.0, "b": 1.0}, model_name=str(tiny_model_dir), decontaminate=True
    )
    module.setup("fit")
    keys = {split: set(module._splits[split]["prompt_key"]) for split in ("train", "validation")}
    assert keys["train"].isdisjoint(keys["validation"])
    assert len(keys["validation"]) > 2


def config(tmp_path: Path, model: Path, **data: Any) -> str:
    """A mixture of two parts, with 20 % of each held out, that SFT trains on for three epochs."""
    parts = {
        name: {
            "class_path": "datamodules.CustomDataModule",
            "init_args": {
                "dataset_name": rows(tmp_path / f"{name}.jsonl", count, name),
                "task": "conversations",
                "validation_share": 0.2,
            },
        }
        for name, count in (("chat", 40), ("own", 20))
    }
    content = {
        "trainer": {
            "default_root_dir": str(tmp_path / "run"),
            "accelerator": "cpu",
            "max_epochs": 3,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
        },
        "model": {"class_path": "lightning_modules.SFTModule", "init_args": {"model_name": str(model)}},
        "data": {
            "class_path": "datamodules.MixtureDataModule",
            "init_args": {
                "parts": parts,
                "weights": {"chat": 0.7, "own": 0.3},
                "batch_size": 4,
                "max_length": 64,
                **data,
            },
        },
        "evaluation": {"num_prompts": 0},
    }
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize("data", [{}, {"tokens_per_batch": 128}])
def test_a_mixture_trains_and_validates_by_part(
    data: dict[str, Any], tmp_path: Path, tiny_model_dir: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    result = cli("fit", "--config", config(tmp_path, tiny_model_dir, **data))
    assert result.returncode == 0, result.stderr
    assert "an epoch has 45 rows: 31 of 32 of chat (68.9%), 14 of 16 of own (31.1%)" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = {name: value for line in lines for name, value in line.items()}
    chat, own, both = (last[f"val/{name}"] for name in ("chat/loss", "own/loss", "loss"))
    tokens = {name: sum(i % 5 + 2 for i in held_out(tmp_path, name)) for name in ("chat", "own")}
    assert both == pytest.approx((tokens["chat"] * chat + tokens["own"] * own) / sum(tokens.values()))
    assert chat != own
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "chat (local) + own (local)" in card


def held_out(tmp_path: Path, name: str) -> list[int]:
    """The numbers of a part's rows that are validated on."""
    module = CustomDataModule(str(tmp_path / f"{name}.jsonl"), "conversations", validation_share=0.2)
    return [int(row["prompt"].removeprefix(name)) for row in module.load(module.validation_split)]
