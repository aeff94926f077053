"""What the user can mend (an option, a file, an environment variable), and what another process has to say."""


class ConfigurationError(Exception):
    """Names what is wrong, the value received and the option to change; ``cli.py`` prints it without a traceback."""


class NotWrittenError(ConfigurationError):
    """The disk took no checkpoint; the one before it is as it was."""


class ProcessError(RuntimeError):
    """Another process of the run failed, and says why itself; ``cli.py`` prints one line."""


def is_of_another_process(error: BaseException) -> bool:
    """Whether what failed is that another process of the run ended, or does not answer."""
    from torch.distributed import DistError  # not above: who only prints help does without torch

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
