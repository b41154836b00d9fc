"""What the pages for people share: numbers as words, tables, and the frame of a self-contained HTML file.

A page loads nothing: its policy forbids every request, allows pictures that stand in the page, and runs the
one script whose hash it names. Every text from outside is escaped; characters that no page can hold are shown
as U+FFFD.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mllm_protector.reporting.tables import GLOSSARY

UNSHOWABLE = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""Control characters, half surrogate pairs and noncharacters: neither HTML nor SVG takes them."""


TURNING = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Characters that change the direction of what follows them."""

MARKUP = re.compile(r"([\\`*\[\]|!#~$_])")
"""What Markdown reads as more than a letter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text below a header; the first column names the row.

    Attributes:
        title: what it shows.
        header: the names of the columns.
        rows: each as long as the header.
        note: how to read it; empty if that is plain.
        words: so many columns, from the left, hold words and not numbers.
        folded: whether it is opened by a click only.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: int = 1
    folded: bool = False


def percent(share: float | None) -> str:
    """A share in [0, 1] as a percentage with one decimal, without the sign; ``-`` for a rate of nothing."""
    return "-" if share is None else f"{100 * share:.1f}"


def with_interval(share: float | None, low: float | None, high: float | None) -> str:
    """A share and its 95 % interval in percent, such as ``12.5 [10.1, 15.3]``."""
    return percent(share) if low is None else f"{percent(share)} [{percent(low)}, {percent(high)}]"


def points(difference: float | None, low: float | None, high: float | None) -> str:
    """A difference of shares and its 95 % interval in percentage points, with signs."""
    if difference is None:
        return "-"
    shown = f"{100 * difference:+.1f}"
    return shown if low is None or high is None else f"{shown} [{100 * low:+.1f}, {100 * high:+.1f}]"


def p_value(p: float | None) -> str:
    """A p-value, such as ``0.012`` or ``< 0.001``."""
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def decimal(value: float | None, digits: int = 2) -> str:
    """A number, or ``-`` for none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def in_words(name: str) -> str:
    """A name with what it stands for, if it is one of the usual ones."""
    return f"{name} ({GLOSSARY[name]})" if name in GLOSSARY else name


def showable(text: str) -> str:
    """The text with U+FFFD for each character that HTML and SVG cannot hold."""
    return UNSHOWABLE.sub("\ufffd", text)


def upright(value: Any) -> Any:
    """A JSON value with U+FFFD for characters that would turn around the numbers and words behind a name."""
    if isinstance(value, Mapping):
        return {upright(key): upright(item) for key, item in value.items()}
    if isinstance(value, list):
        return [upright(item) for item in value]
    return TURNING.sub("\ufffd", value) if isinstance(value, str) else value


def markdown_text(text: str) -> str:
    """A text on one line of Markdown in which nothing is read as markup or HTML."""
    line = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())
    return MARKUP.sub(r"\\\1", line)


def markdown_table(table: Table) -> str:
    """A table in Markdown, without its title."""
    from tabulate import tabulate

    names, *rows = ([markdown_text(word) for word in row] for row in (table.header, *table.rows))
    align = ["left" if place < table.words else "right" for place in range(len(names))]
    return str(tabulate(rows, names, "pipe", disable_numparse=True, colalign=align))


def data_uri(content: bytes, media_type: str) -> str:
    """A file as an address that stands in the page itself."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def render(template: str, *, script: str | None = None, **context: Any) -> str:
    """Fill a template of this folder into a page: escaped, self-contained, with its content policy.

    Args:
        template: its file name.
        script: the file name of the one script that may run.
        context: what the page shows; a ``str`` is text, never HTML.
    """
    code = "" if script is None else _own_text(script)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if code else "'none'"
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'"
        f"; script-src {allowed}"
    )
    frame = {"policy": policy, "script": Markup(code), "style": Markup(_own_text("page.css.j2"))}  # noqa: S704
    return _templates().get_template(template).render(context | frame)


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["in_words"] = in_words
    environment.filters["percent"] = percent
    return environment


def _finalize(value: Any) -> Any:
    return showable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _own_text(name: str) -> str:
    """The page's style or script: a fixed text of ours, which no data enters."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8").strip()
