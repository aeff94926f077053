"""Keys: told from other text, and kept out of what is printed."""

import os
import re
from typing import Any
from urllib.parse import parse_qsl, urlsplit

ENVIRONMENT = (
    "NVIDIA_API_KEY",
    "REWARD_API_KEY",
    "WANDB_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
)
KEY = re.compile(
    r"\b(?:nvapi-[\w-]{8,}|hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|wandb_v1_\w{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|glpat-[\w-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}\b|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
"""Of NVIDIA, Hugging Face, OpenAI, W&B, GitHub, GitLab and AWS, and JSON web tokens."""
WANDB_KEY = re.compile(r"[0-9a-f]{40}")
"""A commit has the same form, so only a whole value counts, not a part of a path."""
NAME = re.compile(r"(?:^|[._-])(?:api_?key|(?:auth|access|hf)_?token|token|secret|password)$", re.IGNORECASE)
IN_URL = re.compile(r"(?P<before>://)[^/\s@]+(?=@)|(?P<name>[?&][\w-]*(?:key|token|secret|password)=)[^&\s'\"]+")


def redact(text: str) -> str:
    """The text with ``***`` for the environment's keys, for whatever looks like one, and for passwords in URLs."""
    for name in ENVIRONMENT:
        value = os.environ.get(name, "").strip()
        if len(value) >= 8:
            text = text.replace(value, "***")
    text = KEY.sub("***", text)
    return IN_URL.sub(lambda match: f"{match['before'] or match['name']}***", text)


def secret_in(options: Any, name: str = "", seen: set[int] | None = None) -> str | None:
    """Why nested options hold a secret, without repeating it; None where they hold none. What is shared is read once.

    Args:
        options: Plain values.
        name: Of the options, dotted.
        seen: What has been read.
    """
    seen = set() if seen is None else seen
    if isinstance(options, (dict, list, tuple)):
        if id(options) in seen:
            return None
        seen.add(id(options))
    if isinstance(options, dict):
        found = (secret_in(value, f"{name}.{key}".lstrip("."), seen) for key, value in options.items())
        return next(filter(None, found), None)
    if isinstance(options, (list, tuple)):
        return next(filter(None, (secret_in(value, name, seen) for value in options)), None)
    if not isinstance(options, str) or not options:
        return None
    if KEY.search(options) or WANDB_KEY.fullmatch(options):
        return f"{name or 'a value'} looks like a key"
    if NAME.search(name):
        return f"{name} names a key"
    return f"{name or 'a value'} is a URL with a password or key in it" if _url_has_secret(options) else None


def _url_has_secret(text: str) -> bool:
    if "://" not in text:
        return False
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return "@" in parts.netloc or any(NAME.search(name) or name.lower() == "key" for name, _ in parse_qsl(parts.query))
