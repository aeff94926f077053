"""Which key goes to which host. A config names the host, so the environment alone says whose key that may be."""

import ipaddress
import os
from urllib.parse import urlsplit

import requests
import urllib3

from core.errors import ConfigurationError

NVIDIA_KEY = "NVIDIA_API_KEY"
OWN_KEY = "REWARD_API_KEY"
OWN_HOST = "REWARD_API_HOST"
"""The server, as ``host`` or ``host:port``, that ``REWARD_API_KEY`` is for."""
PORTS = {"http": 80, "https": 443}


def checked_url(url: str) -> str:
    """The address of an API, without a slash at its end.

    Raises:
        ConfigurationError: If it is none, holds a user, a query or a fragment, or is read differently by those who
            look at it here and those who connect.
    """
    refused = ConfigurationError(
        f"the reward's base_url must be http:// or https://, a host and a path, got {url.rpartition('@')[2]!r}"
    )
    if "\\" in url or "@" in url or not url.isascii() or not url.isprintable() or " " in url:
        raise refused
    try:
        sent = requests.Request("POST", url).prepare().url or ""
        asked, connected = urlsplit(url), urllib3.util.parse_url(sent)
        same = (asked.scheme, asked.hostname, asked.port) == (
            connected.scheme,
            (connected.host or "").strip("[]"),
            connected.port,
        )
    except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
        raise refused from error
    if not same or not asked.hostname or asked.scheme not in PORTS or asked.query or asked.fragment:
        raise refused
    return url.rstrip("/")


def key_for(url: str) -> tuple[str, str]:
    """The environment variable of the key for a server, and the key, empty where there is none to send.

    NVIDIA's goes to NVIDIA's hosts. A server of one's own gets ``REWARD_API_KEY`` where ``REWARD_API_HOST`` names it.
    Either goes over TLS, or without leaving this machine.

    Raises:
        ConfigurationError: If no header can hold the key.
    """
    variable = NVIDIA_KEY if is_nvidia(url) else OWN_KEY
    key = os.environ.get(variable, "").strip()
    if not key or not keeps_a_secret(url) or (variable == OWN_KEY and not is_named(url)):
        return variable, ""
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigurationError(f"{variable} holds a space or a letter that no key has; set it again")
    return variable, key


def advice(url: str) -> str:
    """What to do where a server does not accept the key, or wants one."""
    variable = NVIDIA_KEY if is_nvidia(url) else OWN_KEY
    host = urlsplit(url).netloc
    return f"check {variable}" if variable == NVIDIA_KEY else f"check {OWN_KEY}, sent where {OWN_HOST} is {host}"


def is_nvidia(url: str) -> bool:
    """Whether a host is NVIDIA's."""
    return f".{urlsplit(url).hostname or ''}".endswith(".nvidia.com")


def is_named(url: str) -> bool:
    """Whether ``REWARD_API_HOST`` is the host and port of an address."""
    asked = urlsplit(url)
    try:
        named = urlsplit(f"//{os.environ.get(OWN_HOST, '').strip()}")
        default = PORTS[asked.scheme]
        return bool(named.hostname) and (named.hostname, named.port or default) == (
            asked.hostname,
            asked.port or default,
        )
    except ValueError:
        return False


def keeps_a_secret(url: str) -> bool:
    """Whether a key may be sent there: over TLS, or without leaving this machine."""
    return urlsplit(url).scheme == "https" or on_this_machine(url)


def on_this_machine(url: str) -> bool:
    """Whether the address is a loopback one."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
