"""The names of the upstream's models that may stand in logs: those that it lists, and those of the config.

A client can write anything as the name of a model, so its words are only repeated where they are known.
"""

import json
import re
from collections.abc import Iterable

OTHER = "other"
"""Stands for a name that is not known."""

MOST = 1000
_NAME = re.compile(r"[\w./:@+-]{1,128}", re.ASCII)


class ModelNames:
    """Names that were learned so far."""

    def __init__(self) -> None:
        """None is known yet."""
        self._names: set[str] = set()

    def add(self, configured: Iterable[str]) -> None:
        """Take over the names in a config."""
        self._names |= {*configured}

    def learn(self, listed: bytes) -> None:
        """Take over the names in an upstream's answer to ``GET /v1/models``; anything else is ignored."""
        try:
            content = json.loads(listed)
        except (ValueError, RecursionError):
            return
        data = content.get("data") if isinstance(content, dict) else None
        for each in data if isinstance(data, list) else []:
            name = each.get("id") if isinstance(each, dict) else None
            if isinstance(name, str) and _NAME.fullmatch(name) and len(self._names) < MOST:
                self._names.add(name)

    def known(self, name: str) -> str:
        """The name itself, or ``other``."""
        return name if name in self._names else OTHER
