"""The one exception for what the user can mend: an option, a file, an environment variable."""


class ConfigurationError(Exception):
    """Names what is wrong, the value received and the option to change; ``cli.py`` prints it without a traceback."""
