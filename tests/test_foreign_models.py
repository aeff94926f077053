"""Model directories as a broken download or a stranger leaves them: each is one line that says what to change."""

import json
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from callbacks.model_card import LINEAGE, earlier_lineage
from core.errors import ConfigurationError
from core.limits import memory_limit, time_limit
from datamodules import rendering
from datamodules.chat import load_tokenizer
from datamodules.chat_template import turn_end
from datamodules.rendering import TemplateRefusalError, render
from lightning_modules.models.loading import load_causal_lm
from tests.command_line import Cli, assert_refused

pytestmark = pytest.mark.filterwarnings("ignore")

Spoil = Callable[[Path], object]


def setting(**values: Any) -> Spoil:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def cut(length: int) -> Spoil:
    return lambda model: (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:length])


def file(name: str, text: str) -> Spoil:
    return lambda model: (model / name).write_text(text)


def index(name: object) -> Spoil:
    """An index that sends the loader to another file."""

    def make(model: Path) -> None:
        (model / "model.safetensors").rename(model.parent / "other.safetensors")
        weights = {"model.norm.weight": name}
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))

    return make


FOREIGN: dict[str, tuple[Spoil, str]] = {
    "weights empty": (cut(0), "header too small"),
    "weights cut in the header": (cut(100), "invalid header length"),
    "weights cut": (cut(5000), "file not fully covered"),
    "weights of another kind": (file("model.safetensors", "x" * 4000), "header too large"),
    "config null": (file("config.json", "null"), "NoneType"),
    "config a list": (file("config.json", "[]"), "must be a mapping"),
    "config no JSON": (file("config.json", "{"), "config.json"),
    "no heads": (setting(num_attention_heads=0), "ZeroDivisionError"),
    "heads of text": (setting(num_attention_heads="two"), "num_attention_heads"),
    "fewer layers than none": (setting(num_hidden_layers=-1), "num_hidden_layers"),
    "no width": (setting(hidden_size=None), "hidden_size"),
    "an activation that there is not": (setting(hidden_act="evil"), "KeyError: 'evil'"),
    "a type that there is not": (setting(dtype="evil"), "evil"),
    "quantised": (setting(quantization_config={"quant_method": "gptq", "bits": 4}), "GPTQ"),
    "attention of a package": (setting(attn_implementation="flash_attention_2"), "FlashAttention2"),
    "attention from the hub": (
        setting(attn_implementation="someone/kernels"),
        "asks for the attention 'someone/k",
    ),
    "attention of no name": (setting(_attn_implementation="paged|../x"), "asks for the attention 'paged|../x'"),
    "an index that leads out": (index("../other.safetensors"), "names '../other.safetensors', which is no weights'"),
    "an index of other files": (index("weights.bin"), "names 'weights.bin', which is no weights' file beside it"),
    "an index of numbers": (index(7), "names '7', which is no weights' file beside it"),
    "an index of nothing": (file("model.safetensors.index.json", "[]"), "is no index of weights"),
    "tokenizer null": (file("tokenizer.json", "null"), "no tokenizer in"),
    "tokenizer settings null": (file("tokenizer_config.json", "null"), "no tokenizer in"),
}


@pytest.mark.parametrize("spoiled", FOREIGN)
def test_a_model_that_cannot_be_loaded_is_one_line(spoiled: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    spoil, message = FOREIGN[spoiled]
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    spoil(model)
    with pytest.raises(ConfigurationError) as caught:
        load_causal_lm(str(model), load_tokenizer(str(model)))
    told = str(caught.value)
    assert message in told
    assert told.endswith("; change model.model_name")
    assert "\n" not in told


TEMPLATES = {
    "loops for ever": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "eats memory": "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "doubles": "{% set ns = namespace(x='x') %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "computes a power": "{{ 9 ** 9 ** 9 }}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "is none": "{% for",
    "divides by zero": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_bounded_in_time_and_size(
    template: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATES[template])
    monkeypatch.setattr(rendering, "RENDER_S", 1.0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    started = time.monotonic()
    with pytest.raises(ConfigurationError, match=r"the chat template refuses .* name another in --data.chat_template"):
        turn_end(tokenizer)
    assert time.monotonic() - started < 20


def test_a_conversation_that_a_template_makes_huge_is_refused(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content * 50 }}{% endfor %}"
    monkeypatch.setattr(rendering, "LARGEST_RENDERED", 1000)
    assert len(render(tokenizer, [{"role": "user", "content": "x" * 20}], add_generation_prompt=False)) == 1000
    with pytest.raises(TemplateRefusalError, match="it makes 1,050 characters of them, and 1,000 are the most"):
        render(tokenizer, [{"role": "user", "content": "x" * 21}], add_generation_prompt=False)


def test_a_time_limit_leaves_another_s_alarm_as_it_was() -> None:
    """Pytest's own, for one; and in another thread there is none."""
    rung: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda signum, frame: rung.append(signum))
    before = signal.setitimer(signal.ITIMER_REAL, 0.4)
    try:
        with time_limit(5.0):
            time.sleep(0.1)
        with pytest.raises(TimeoutError), time_limit(0.05):
            time.sleep(1.0)
        assert rung == []
        assert 0.1 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.3
        time.sleep(0.5)
        assert rung == [signal.SIGALRM]
        done: list[str] = []

        def work() -> None:
            with time_limit(0.01):
                time.sleep(0.05)
            done.append("done")

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert done == ["done"]
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_a_memory_limit_ends_with_what_it_is_for() -> None:
    with pytest.raises(MemoryError), memory_limit(1 << 26):
        bytearray(1 << 30)
    assert len(bytearray(1 << 27)) == 1 << 27


LINEAGES = {
    "a list": "[1]",
    "empty": "",
    "no YAML": "a: [",
    "of itself": "stages: &a [*a]",
    "stages of text": "{base_model: x, base_name: x, stages: [a, b]}",
    "a stage without its data": "{base_model: x, base_name: x, stages: [{method: a, method_name: b, evaluation: d, "
    "steps: 1, learning_rate: 1}]}",
    "steps of text": "{base_model: x, base_name: x, stages: [{method: a, method_name: b, dataset: c, evaluation: d, "
    "steps: many, learning_rate: 1}]}",
}


@pytest.mark.parametrize("lineage", LINEAGES)
def test_a_lineage_that_is_none_is_told_and_passed_over(lineage: str, tmp_path: Path) -> None:
    """It is read when training has ended, where an error would cost the export."""
    (tmp_path / LINEAGE).write_text(LINEAGES[lineage])
    with pytest.warns(UserWarning, match=r"lineage.yaml is no lineage"):
        assert earlier_lineage(tmp_path) is None


def test_names_add_nothing_to_the_model_card(config: Any, tmp_path: Path, tiny_model_dir: Path, cli: Cli) -> None:
    """A line break in a path, or in an earlier lineage, begins no line of the card."""
    model = shutil.copytree(tiny_model_dir, tmp_path / "x\n---\nlicense: evil\n# evil")
    changes = {"model": {"model_name": str(model)}, "evaluation": {"num_prompts": 0}}
    assert cli("fit", "--config", config("SFTModule", **changes)).returncode == 0
    stage = {"method": "sft\n# evil", "method_name": "a\n# evil", "dataset": "b\n# evil", "evaluation": "c\n# evil"}
    history = {
        "base_model": "o/n\n# evil",
        "base_name": "n\n# evil",
        "stages": [{**stage, "steps": 1, "learning_rate": 1}],
    }
    final = tmp_path / "run" / "final"
    (final / LINEAGE).write_text(yaml.safe_dump(history))
    changes["model"] = {"model_name": str(final)}
    again = ["--trainer.default_root_dir", str(tmp_path / "again")]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert earlier_lineage(final) is not None
    assert cli("fit", "--config", config("SFTModule", **changes), *again).returncode == 0
    for run in ("run", "again"):
        card = (tmp_path / run / "final" / "README.md").read_text()
        front, _, text = card.removeprefix("---\n").partition("\n---\n")
        assert "license" not in yaml.safe_load(front)
        assert "evil" in text
        assert not any(line.startswith(("# evil", "license", "---")) for line in text.splitlines())


def test_escapes_in_what_is_told_are_shown(config: Any, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    result = cli("fit", "--config", config("SFTModule"), "--model.model_name", "./\x1b[31mred")
    assert_refused(result, "model directory ./\\x1b[31mred does not exist")
    assert "\x1b" not in result.stderr
