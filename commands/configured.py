"""The options of ``fit``, for commands that read a run's configuration and run nothing."""

import sys

from typing_extensions import override

from commands.lightning import PARSING, SuiteCLI
from commands.parsing import check_arguments, refuse_secrets, restrict
from commands.quiet import quieten


class Configured(SuiteCLI):
    """Parses as ``fit`` or ``validate`` does and builds the classes, but no trainer, and runs nothing."""

    @override
    def _set_seed(self) -> None:
        """Nothing is random here."""

    @override
    def before_instantiate_classes(self) -> None:
        refuse_secrets(self.config[self.subcommand].as_dict())

    @override
    def instantiate_classes(self) -> None:
        self.config_init = self.parser.instantiate_classes(self.config)
        built = self.config_init[self.subcommand]
        self.datamodule, self.model = built.get("data"), built.get("model")

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def configured(arguments: list[str], *, command: str = "fit") -> Configured:
    """What the options of ``fit`` or ``validate`` describe.

    Args:
        arguments: As on the command line.
        command: Whose options; ``validate``'s need no method.
    """
    quieten()
    restrict()
    check_arguments(arguments)
    sys.argv = [sys.argv[0], command, *arguments]  # which is what LightningCLI wants to read
    return Configured(**PARSING, save_config_callback=None)
