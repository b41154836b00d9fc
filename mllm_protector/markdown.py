"""Markdown of texts that came from outside: in a page they stay text."""

import re
from collections.abc import Sequence
from typing import Any

LONGEST_CELL = 200
"""Characters of a text in a table."""

_MARKUP = re.compile(r"([\\`*\[\]|!#~$_@]|:(?=//)|(?<=www)\.)", re.IGNORECASE)
"""What Markdown reads as more than a letter, and what makes a link of an address."""

_UNSHOWABLE = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Characters that no file can hold, or that turn around the text behind them."""


def plain(text: str) -> str:
    """A text on one line of Markdown in which nothing is read as markup or HTML."""
    shown = _UNSHOWABLE.sub("\ufffd", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\1", " ".join(shown.split()))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, words: int = 1) -> str:
    """A table whose first ``words`` columns hold words and the others numbers."""
    from tabulate import tabulate

    names, *cells = ([plain(_cell(value)) for value in row] for row in (header, *rows))
    align = ["left" if place < words else "right" for place in range(len(names))]
    return str(tabulate(cells, names, "pipe", disable_numparse=True, colalign=align))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) <= LONGEST_CELL else f"{text[: LONGEST_CELL - 1]}\u2026"
