"""New settings for a server that runs: which of them it can take over."""

import functools
from collections.abc import Mapping
from typing import Any

from mllm_protector.serving.settings import ApiKey, FrontSettings

CHANGEABLE = ("policy", "keys", "limits", "score_decimals")
"""Arguments of ``serve`` that can change while it runs."""


def front_settings(url: str, arguments: Mapping[str, Any]) -> FrontSettings:
    """What the arguments of ``serve`` say to a front.

    Raises:
        InputError: they do not fit together.
    """
    return FrontSettings(
        upstream=arguments["upstream"](url=url),
        limits=arguments["limits"],
        policy=arguments["policy"],
        keys=[ApiKey(name=name, sha256=digest) for name, digest in arguments["keys"].items()],
        reconnect_s=arguments["reconnect_s"],
        grace_s=arguments["grace_s"],
        score_decimals=arguments["score_decimals"],
        audit=arguments["audit"],
    )


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The arguments of ``serve`` that differ, but can only change at a restart."""
    fixed = [name for name in before if name not in CHANGEABLE]
    return [name for name in fixed if _comparable(before[name]) != _comparable(after[name])]


def _comparable(value: Any) -> Any:
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    return value
