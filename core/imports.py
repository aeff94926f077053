"""Which import paths a config may name: ours, building blocks of Lightning and torch, and the user's own code."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

SUITE = Path(__file__).parents[1]
OURS = ("callbacks", "datamodules", "demo", "lightning_modules")
"""By where they lie, as another package may have such a name."""
PACKAGES = (
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.fabric.loggers",
    "lightning.fabric.plugins",
    "lightning.fabric.strategies",
    "bitsandbytes.optim",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.nn",
    "torch.optim",
    "torchao.optim",
)
"""Listed, as a package of functions is more than its classes: ``os.system`` is one import path away from a reward."""


def allowed_packages() -> list[str]:
    """The packages a config may name, with the modules that lie in the current directory."""
    ours = [name for name in OURS if _found_in(name, SUITE)]
    return [*ours, *PACKAGES, *own_modules(Path.cwd())]


def own_modules(directory: Path) -> list[str]:
    """The modules and packages of a directory that an import would really find there.

    A folder without ``__init__.py`` is none: a downloaded model's folder may hold any file.
    """
    return sorted(name for name in _modules_in(directory) if _found_in(name, directory))


def shadowed(path: str) -> str:
    """What to say of an import path whose module of the current directory has an installed one's name; else nothing."""
    name = path.partition(".")[0]
    if name not in _modules_in(Path.cwd()) or _found_in(name, Path.cwd()):
        return ""
    return (
        f"{name} of the current directory has the name of an installed module, which is what an import finds; give it "
        "a name of its own"
    )


def _modules_in(directory: Path) -> set[str]:
    return {path.stem for path in directory.glob("*.py")} | {
        path.parent.name for path in directory.glob("*/__init__.py")
    }


def _found_in(name: str, directory: Path) -> bool:
    if not name.isidentifier() or name in sys.stdlib_module_names or name == "jsonargparse":
        return False
    loaded = getattr(sys.modules.get(name), "__file__", None)
    spec = None if loaded else PathFinder.find_spec(name)
    origin = loaded or (spec.origin if spec else None)
    return origin is not None and Path(origin).resolve().is_relative_to(directory.resolve())


def is_allowed(path: str) -> bool:
    """Whether a config may name this import path."""
    return any(path == name or path.startswith(f"{name}.") for name in allowed_packages())
