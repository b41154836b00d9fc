"""Numbers as words, and tables of them for every medium: terminal, Markdown, LaTeX; ``page`` has HTML.

Every text from outside is escaped. Characters that no page can hold, or that would turn around what follows
them, are shown as U+FFFD.
"""

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from mllm_protector.files import write_text
from mllm_protector.markdown import TURNING, UNSHOWABLE, plain
from mllm_protector.markdown import table as markdown_table

WIDTH = 110
"""Columns of the terminal print at most; exactly that in a file or a pipe."""

Row = Mapping[str, Any]
"""A measurement as in ``asr.json``."""

GLOSSARY = {
    "none": "no guard",
    "refusal": "detector + fixed refusal",
    "protector": "detector + detoxifier",
    "safety_prompt": "no guard, the MLLM asked again with a sentence of defence",
    "llama_guard": "a moderation model + fixed refusal",
    "IMAGES": "all images together",
    "TEXT": "no image",
    "SD": "generated image",
    "TYPO": "image of the words",
    "SD_TYPO": "both",
}
"""What the usual arms and variants are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text below a header; the first column names the row.

    Attributes:
        title: what it shows.
        header: the names of the columns.
        rows: each as long as the header.
        note: how to read it; empty if that is plain.
        words: how many columns, from the left, hold words and not numbers.
        folded: whether a page shows it only after a click.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: int = 1
    folded: bool = False


Column = tuple[str, Any, Callable[[Row], str]]
"""A heading, what the measurements in the column have in common (``across``), and how each is shown."""

METRIC = itemgetter("metric")


def tabulated(
    title: str,
    rows: Sequence[Row],
    keys: Mapping[str, str],
    columns: Sequence[Column],
    *,
    across: Callable[[Row], Any] = METRIC,
    named: Callable[[str, str], str] = lambda _, name: name,
    **look: Any,
) -> Table:
    """Measurements as a table: a line for each value of the keys, and those of the columns that have a value.

    Lines come in the order of the rows. ``keys`` are fields and their headings, ``across`` tells the column
    of a measurement, ``named`` what the table calls the value of a key; ``look`` are attributes of ``Table``.
    """
    lines: dict[tuple[str, ...], dict[Any, Row]] = {}
    wanted = {place for _, place, _ in columns}
    for row in rows:
        if (place := across(row)) in wanted:
            lines.setdefault(tuple(named(key, row[key] or "-") for key in keys), {})[place] = row
    used = [each for each in columns if not lines or any(each[1] in line for line in lines.values())]
    return Table(
        title=title,
        header=[*keys.values(), *(heading for heading, _, _ in used)],
        rows=[
            [*begin, *(show(line[place]) if place in line else "-" for _, place, show in used)]
            for begin, line in lines.items()
        ],
        **look,
    )


def shown(row: Row, form: str, scale: float = 1) -> str:
    """A measurement's value with its interval, such as ``12.5 [10.1, 15.3]``; ``-`` without a value."""
    value, low, high = (
        "-" if row[name] is None else format(scale * row[name], form) for name in ("value", "low", "high")
    )
    return value if "-" in (low, high) else f"{value} [{low}, {high}]"


def counted(row: Row) -> str:
    """A share with its interval in percent, and the counts."""
    if row["value"] is None:
        return "-"
    return f"{share(row)} ({round(row['value'] * row['n']):,}/{row['n']:,})"


def total(row: Row) -> str:
    """How many answers a number is computed from."""
    return f"{row['n']:,}"


def bounds(row: Row) -> str:
    """The limits alone, in percent."""
    return f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"


def points(row: Row) -> str:
    """A difference with its interval, in percentage points."""
    return shown(row, "+.1f", 100)


def p_value(row: Row) -> str:
    """A p-value, such as ``0.012`` or ``< 0.001``."""
    return "< 0.001" if row["value"] is not None and row["value"] < 0.001 else decimal(row)


def share(row: Row) -> str:
    """A share with its interval in percent."""
    return shown(row, ".1f", 100)


def decimal(row: Row) -> str:
    """A number with its interval."""
    return shown(row, ",.3f")


def count(row: Row) -> str:
    """A count."""
    return shown(row, ",.0f")


def in_words(name: str) -> str:
    """A name with its meaning, if it is one of the usual ones."""
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


def markdown(title: str, lines: Sequence[str], tables: Iterable[Table]) -> str:
    """A title, sentences below it, and tables, each with its note."""
    parts = [f"# {plain(title)}", "\n".join(f"- {plain(line)}" for line in lines)]
    for each in tables:
        parts += [f"## {plain(each.title)}", *([plain(each.note)] if each.note else [])]
        parts.append(markdown_table(each.header, each.rows, words=each.words))
    return "\n\n".join(parts) + "\n"


def latex(lines: Sequence[str], tables: Iterable[Table]) -> str:
    """Tables to paste into a paper; they need the package booktabs and nothing else."""
    parts = ["\n".join(f"% {_latin(line)}" for line in ("Needs \\usepackage{booktabs}.", *lines))]
    for table in tables:
        align = "l" * table.words + "r" * (len(table.header) - table.words)
        caption = _latin(f"{table.title}. {table.note}".strip())
        for letter in "\\{}$&#_%~^":  # pandas escapes cells, not captions
            caption = caption.replace(letter, " " if letter in "\\{}~^" else f"\\{letter}")
        header, *rows = ([_latin(word) for word in row] for row in (table.header, *table.rows))
        frame = pd.DataFrame(rows, columns=header, dtype=object)
        body = frame.to_latex(index=False, escape=True, column_format=align, caption=caption)
        parts.append(
            body.replace(
                "\\begin{table}", "\\begin{table*}[t]\n\\footnotesize\\setlength{\\tabcolsep}{3pt}"
            ).replace("\\end{table}", "\\end{table*}")
        )
    return "\n\n".join(parts) + "\n"


def publish(path: Path, title: str, lines: Sequence[str], tables: Sequence[Table]) -> None:
    """Print a title, sentences and tables, and write them as Markdown."""
    write_text(path, markdown(title, lines, tables))
    print_tables(title, lines, tables)


def print_tables(title: str, lines: Sequence[str], tables: Iterable[Table]) -> None:
    """Print a title, sentences below it, and tables; what the terminal cannot show becomes ``?``."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    console = Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH

    def words(text: str) -> Text:
        shown = "".join(each if each.isprintable() or each == "\n" else "?" for each in showable(text))
        return Text(shown.encode(console.encoding, errors="replace").decode(console.encoding))

    console.print(words(f"\n{title}"), style="bold")
    for line in lines:
        console.print(words(line))
    for table in tables:
        grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for number, name in enumerate(table.header):
            side: Literal["left", "right"] = "left" if number < table.words else "right"
            grid.add_column(words(name), justify=side, overflow="fold")
        for row in table.rows:
            grid.add_row(*map(words, row))
        console.print(words(f"\n{table.title}"), style="bold")
        console.print(grid)


def _latin(text: str) -> str:
    """A text for LaTeX: plain ASCII on one line, accents dropped, anything else as ``?``.

    At the start of a row brackets and stars would belong to the line break before it.
    """
    bare = "".join(each for each in unicodedata.normalize("NFKD", text) if not unicodedata.combining(each))
    line = " ".join(bare.split())
    return "".join(each if each.isascii() and each.isprintable() else "?" for each in line).lstrip("[*")
