"""The address of a server and the key to it: checked, and shown without secrets."""

import ipaddress
import os
from urllib.parse import SplitResult, urlsplit

from mllm_protector.errors import InputError

_USUAL_PORTS = {"http": 80, "https": 443}


def checked_address(address: str) -> SplitResult:
    """The parts of a base_url. No message shows one that may hold a secret.

    Raises:
        InputError: it is no address, or holds a user, a password or a query.
    """
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise InputError("base_url: not an address such as http://localhost:8000/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            "base_url: must hold no user, password or query; put the key into the environment variable "
            "that api_key_env names"
        )
    return parts


def public(parts: SplitResult) -> str:
    """An address as it may be shown: scheme, host, port and path."""
    host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
    port = "" if parts.port in (None, _USUAL_PORTS[parts.scheme]) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def key_from(variable: str | None, *, local: bool) -> str:
    """The key in an environment variable; only a local server needs none.

    Raises:
        InputError: there is none, or what is there cannot be one.
    """
    key = "" if variable is None else os.environ.get(variable, "").strip()
    if not key and not local and variable is not None:
        raise InputError(
            f"api_key_env={variable}: this environment variable is not set; export {variable}=..., or give "
            "api_key_env=null for a server that wants no key"
        )
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"api_key_env={variable}: the value of this environment variable is no key")
    return key or "none"  # the client insists on one


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
