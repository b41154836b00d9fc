"""Tables on the terminal."""

from collections.abc import Sequence

from mllm_protector.reporting.layout import Table, showable

WIDTH = 110
"""Columns of the print at most; exactly so many in a file or a pipe."""


def print_tables(title: str, lines: Sequence[str], tables: Sequence[Table]) -> None:
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
            grid.add_column(words(name), justify="left" if number < table.words else "right")
        for row in table.rows:
            grid.add_row(*map(words, row))
        console.print(words(f"\n{table.title}"), style="bold")
        console.print(grid)
