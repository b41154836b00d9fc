"""Markdown of texts that came from outside: in a page they stay text."""

import re
from collections.abc import Sequence
from typing import Any

LONGEST_CELL = 200
"""Characters of a text in a table."""

UNSHOWABLE = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""Control characters, half surrogate pairs and noncharacters: neither HTML nor SVG takes them."""

TURNING = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Characters that change the direction of what follows them."""

_MARKUP = re.compile(r"[\\`*|~$#@]|^>|(?<=\])[(\[:]|:(?=//)|(?<=www)\.|(?<!\w)_|_(?!\w)", re.IGNORECASE)
"""What Markdown reads as more than a letter, and what makes a link of words in brackets or of an address."""

_TAG, _ENTITY = re.compile("<(?=[A-Za-z/!?])"), re.compile("&(?=#?[0-9A-Za-z]+;)")


def plain(text: str) -> str:
    """A text on one line of Markdown in which nothing is read as markup or HTML."""
    shown = TURNING.sub("\ufffd", UNSHOWABLE.sub("\ufffd", " ".join(text.split())))
    return _MARKUP.sub(r"\\\g<0>", _TAG.sub("&lt;", _ENTITY.sub("&amp;", shown)))


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
