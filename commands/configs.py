"""``configs``: the ready configs, what each trains on what and needs, and a copy of one to change."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from commands import options
from commands.explaining import did_you_mean
from core.errors import ConfigurationError
from core.files import write_whole
from core.plain import loaded_file
from core.text import shown

FOLDER = Path(__file__).parents[1] / "configs"


class Ready(NamedTuple):
    """A config that ships."""

    name: str
    method: str
    model: str
    data: str
    needs: str


def run() -> None:
    """Parse the command line; list, or copy."""
    own = options.configs().parse_args(sys.argv[1:])
    if own.action == "copy":
        target = copy_config(own.name, own.target)
        print(f"{shown(str(target))}: change it, then python cli.py fit --config {shown(str(target))}")
    else:
        print(shown(listed(ready_configs())))


def ready_configs() -> list[Ready]:
    """Every config that ships, complete ones before overlays."""
    found = [described(file) for file in sorted(FOLDER.rglob("*.yaml"))]
    return sorted(found, key=lambda ready: (ready.method == "overlay", "/" in ready.name, ready.name))


def described(file: Path) -> Ready:
    """What a config's options say."""
    content = loaded_file(file)
    name = str(file.relative_to(FOLDER).with_suffix(""))
    model, data = (content.get(section) or {} for section in ("model", "data"))
    if "class_path" not in model:
        changes = ", ".join(section for section in content)
        return Ready(name, "overlay", "", "", f"changes {changes} of the config before it")
    options, rows = model.get("init_args", {}), data.get("init_args", {})
    dataset = str(rows.get("dataset_name") or data["class_path"].rpartition(".")[2].removesuffix("DataModule"))
    method = model["class_path"].rpartition(".")[2].removesuffix("Module")
    return Ready(name, method, str(options.get("model_name", "")), dataset, ", ".join(needs(content)) or "nothing more")


def needs(content: dict[str, Any]) -> list[str]:
    """What must be there before such a run: stages whose output it reads, a GPU, keys."""
    options = content["model"].get("init_args", {})
    read = [str(options.get(name, "")) for name in ("model_name", "reward", "reference_model")]
    read += [str(content["data"].get("init_args", {}).get("dataset_name", ""))]
    evaluation = content.get("evaluation") or {}
    found = [path for path in dict.fromkeys(read) if path.startswith("outputs/")]
    judged = not content["model"]["class_path"].endswith("RewardModule") and evaluation.get("num_prompts") != 0
    if judged and "reward" not in evaluation:
        found.append("NVIDIA_API_KEY for the judge")
    if content.get("trainer", {}).get("accelerator") != "cpu":
        found.append("a GPU")
    return found


def copy_config(name: str, target: Path | None) -> Path:
    """Copy a config, never over a file that is there.

    Raises:
        ConfigurationError: If there is no such config, or the file exists.
    """
    names = [ready.name for ready in ready_configs()]
    plain = name.removeprefix("configs/").removesuffix(".yaml")
    if plain not in names:
        raise ConfigurationError(f"no config {name!r}{did_you_mean(plain, names)}; python cli.py configs lists them")
    target = target or Path(f"{plain.replace('/', '-')}.yaml")
    if target.exists():
        raise ConfigurationError(f"{target} exists and is not replaced; name another file behind {name}")
    try:
        write_whole(target, (FOLDER / f"{plain}.yaml").read_text("utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {target} ({error.strerror}); name another file behind {name}"
        ) from error
    return target


def listed(configs: list[Ready]) -> str:
    """A paragraph for each config, narrow enough for any terminal."""
    width = max(len(ready.name) for ready in configs) + 2
    lines = []
    for ready in configs:
        what = f"{ready.method} of {ready.model} on {ready.data}" if ready.model else f"overlay: {ready.needs}"
        lines.append(f"{ready.name:{width}}{what}")
        if ready.model:
            lines.append(f"{'':{width}}needs {ready.needs}")
    return "\n".join([*lines, "", "python cli.py configs copy sft my.yaml copies one to change it"])
