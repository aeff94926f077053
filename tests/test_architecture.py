"""The import direction, and that what others rely on is there."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "core": set(),
    "datamodules": {"core"},
    "lightning_modules": {"core", "datamodules"},
    "callbacks": {"core", "datamodules", "lightning_modules"},
    "commands": {"core", "datamodules", "lightning_modules", "callbacks"},
    "demo": {"core", "datamodules"},
    "cli": {"commands", "core"},
}
OURS = set(ALLOWED)


def imported(file: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def own_modules(file: Path) -> set[str]:
    """The modules of this suite that a file imports from."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    return {str(node.module) for node in nodes if str(node.module).split(".")[0] in OURS}


@pytest.mark.parametrize("package", sorted(OURS))
def test_imports_go_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py")) or [ROOT / f"{package}.py"]
    assert files
    for file in files:
        assert (imported(file) & OURS) - {package} <= ALLOWED[package], file


def test_functional_imports_torch_and_scipy_alone() -> None:
    files = list((ROOT / "lightning_modules" / "functional").glob("*.py"))
    assert len(files) > 3
    for file in files:
        allowed = {"torch", "numpy", "scipy", "jaxtyping", "typing", "typing_extensions", "collections", "math"}
        assert imported(file) - {"lightning_modules"} <= allowed, file
        assert all(name.startswith("lightning_modules.functional") for name in own_modules(file)), file


def test_the_names_that_others_rely_on_can_be_imported() -> None:
    from callbacks import HuggingFaceExport, NemotronEvaluation
    from datamodules import SmolTalkDataModule, UltraFeedbackDataModule
    from lightning_modules import DPOModule, RewardModule, RLOOModule, SFTModule
    from lightning_modules.rewards import ModelReward, NemotronReward

    methods = {module.method for module in (SFTModule, RewardModule, DPOModule, RLOOModule)}
    assert methods == {"sft", "reward", "dpo", "rloo"}
    assert {SmolTalkDataModule.validation_split, UltraFeedbackDataModule.validation_split} == {"test", "test_prefs"}
    for named in (HuggingFaceExport, NemotronEvaluation, ModelReward, NemotronReward):
        assert named.__doc__


DISTRIBUTIONS = {"yaml": "pyyaml", "typing_extensions": "typing-extensions"}
"""What a package to import is called where it is installed from, if that is another name."""


def declared(*extras: str) -> set[str]:
    """The distributions that ``pip install -e '.[extras]'`` asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {re.split(r"[<>=\[; ]", line)[0].lower() for line in wanted}


def test_what_is_imported_is_declared() -> None:
    """Of the suite's own code alone; pydantic comes with fastapi, which is made of it."""
    files = [ROOT / "cli.py", *(file for name in OURS - {"cli"} for file in (ROOT / name).rglob("*.py"))]
    foreign = {name for file in files for name in imported(file)} - OURS - sys.stdlib_module_names
    missing = {DISTRIBUTIONS.get(name, name) for name in foreign} - declared("serve") - declared("lora") - {"pydantic"}
    assert missing == set()
