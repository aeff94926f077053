"""Which import paths a config may name: ours, building blocks of Lightning and torch, and the user's own code."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

PACKAGES = (
    "callbacks",
    "datamodules",
    "demo",
    "lightning_modules",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.fabric.loggers",
    "lightning.fabric.plugins",
    "lightning.fabric.strategies",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.nn",
    "torch.optim",
)
"""Listed, as a package of functions is more than its classes: ``os.system`` is one import path away from a reward."""


def allowed_packages() -> list[str]:
    """The packages a config may name, with the modules that lie in the current directory."""
    return [*PACKAGES, *own_modules(Path.cwd())]


def own_modules(directory: Path) -> list[str]:
    """The modules and packages of a directory that an import would really find there.

    A folder without ``__init__.py`` is none: a downloaded model's folder may hold any file.
    """
    names = {path.stem for path in directory.glob("*.py")} | {
        path.parent.name for path in directory.glob("*/__init__.py")
    }
    return sorted(name for name in names if _found_in(name, directory))


def _found_in(name: str, directory: Path) -> bool:
    if not name.isidentifier() or name in sys.stdlib_module_names or name == "jsonargparse":
        return False
    spec = PathFinder.find_spec(name)
    loaded = getattr(sys.modules.get(name), "__file__", None)
    origin = loaded or (spec.origin if spec else None)
    return origin is not None and Path(origin).resolve().is_relative_to(directory.resolve())


def is_allowed(path: str) -> bool:
    """Whether a config may name this import path."""
    return any(path == name or path.startswith(f"{name}.") for name in allowed_packages())
