"""One or two screens of ``asr.json`` for each benchmark, on the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from mllm_protector.reporting import sentences
from mllm_protector.reporting.tables import Block, View, views

WIDTH = 110
"""Columns of the terminal print at most; exactly so many in a file or a pipe."""

WORDS = ("scenario", "scenarios", "variant")
"""The columns that hold words; all others hold numbers."""

NAMED = 3
"""So many of the questions that were left out are named."""


def print_report(result: Mapping[str, Any]) -> None:
    """Print for each benchmark the first judge's rates, all headlines, and what stands beside them."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH

    def plain(line: str) -> Text:
        shown = "".join(each if each.isprintable() or each == "\n" else "?" for each in line)
        return Text(shown.encode(console.encoding, errors="replace").decode(console.encoding))

    def say(heading: str, lines: Sequence[str] = ()) -> None:
        console.print()
        console.print(plain(heading), style="bold")
        for line in lines:
            console.print(plain(line))

    def show(header: Sequence[str], blocks: Sequence[Block], *, wrap: bool) -> None:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for name in header:
            side: Literal["left", "right"] = "left" if name in WORDS else "right"
            table.add_column(plain(name), justify=side, vertical="bottom", no_wrap=not wrap)
        for block in blocks:
            for row in block:
                table.add_row(*map(plain, row))
            table.add_section()
        console.print(table)

    say(sentences.TITLE, [*sentences.legend(result), *sentences.judge_lines(result["judges"])])
    for name, benchmark in result["benchmarks"].items():
        count = benchmark["questions"]["count"]
        lines = [*sentences.policy_remark(benchmark["groups"]), *sentences.training_lines(benchmark, name)]
        say(f"Benchmark: {name}, {count:,} questions", lines)
        for number, view in enumerate(views(result, name)):
            first = number == 0
            lines = [*sentences.headlines(view), *sentences.remarks(view)]
            lines += sentences.comparisons(view) if first else []
            say(f"{name}, judge {view.title}: macro mean over scenarios", lines)
            if first and view.cells:
                say(f"{name}, judge {view.title}: every scenario")
                for header, blocks in _grids(view, console.width):
                    show(header, blocks, wrap=False)
                say(f"{name}, judge {view.title}: macro mean over scenarios")
                kinds = [kind for kind in view.kinds if kind in (view.kinds[0], "TEXT")]
                header = ["variant", "scenarios", *view.arms]
                show(header, view.mean_rows(kinds, sentences.macro_text), wrap=True)
        say(f"{name}: beside the ASR", sentences.closing(benchmark, named=NAMED))
    console.print()
    console.print(plain("All numbers, with counts and intervals: asr.md, asr.tex, asr.csv, asr.json"))


def _grids(view: View, width: int) -> Iterator[tuple[list[str], list[Block]]]:
    """Header and rows of the rates: as many variants side by side as fit into the width, then the rest."""
    gap, narrowest, arms = 2, 6, len(view.arms)
    show = sentences.rate_text
    room = width - max(len(row[0]) for block in view.rows([], show) for row in block)
    fitting = max(1, room // (gap + arms * (narrowest + 1) - 1))
    for start in range(0, len(view.variants), fitting):
        variants = view.variants[start : start + fitting]
        widest = (room // len(variants) - gap + 1) // arms - 1
        each = max(narrowest, min(widest, max(map(len, view.arms))))
        names = _side_by_side(view.arms, each)
        blocks = [
            [
                [row[0], *(_side_by_side(row[at : at + arms], each) for at in range(1, len(row), arms))]
                for row in block
            ]
            for block in view.rows(variants, show)
        ]
        yield ["scenario", *(f"{f' {variant} ':-^{len(names)}}\n{names}" for variant in variants)], blocks


def _side_by_side(texts: Sequence[str], width: int) -> str:
    """Each text on the right of a field; one that is too long is cut and ends in a full stop."""
    return " ".join(f"{text if len(text) <= width else f'{text[: width - 1]}.':>{width}}" for text in texts)
