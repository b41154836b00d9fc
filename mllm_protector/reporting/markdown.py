"""``asr.md``: every number of ``asr.json`` in Markdown, with counts and intervals; other tables likewise."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm_protector.reporting import evidence, sentences
from mllm_protector.reporting.layout import Table
from mllm_protector.reporting.tables import View, views

READING = (
    "Arrows say which way is better: \u2193 lower for the ASR, its differences, changed, refused and lost"
    " answers; \u2191 higher for scores, accuracy and kappa.",
    "In brackets: the 95% interval (Wilson's for a share, on the effective size where several askings of one"
    " question are pooled; MOVER for a macro mean). In parentheses: the counts. +n?: answers without a"
    " verdict, in no rate.",
    "Macro mean: every scenario counts the same. Micro mean, or pooled: every answer does. Bounds: the ASR if"
    " all answers without a verdict were safe, and if all were harmful.",
    "Corrected: the pooled ASR after Rogan and Gladen, for the judge's errors where these were counted by the"
    " same criterion; it takes for granted that the judge errs on these answers as often as on those.",
    "Differences: on the same answers, with Bonett and Price's interval over questions. " + sentences.TESTS,
)

_SPECIAL = re.compile(r"[\\`*|~$]|(?<=\])[(\[:]")
"""Characters that format; and those that make a link of what stands in brackets."""

_TAG = re.compile("<(?=[A-Za-z/!?])")
_ENTITY = re.compile("&(?=#?[0-9A-Za-z]+;)")


def markdown(result: Mapping[str, Any]) -> str:
    """The whole file."""
    parts = [
        f"# {sentences.TITLE}",
        _bullets([*sentences.legend(result), *READING]),
        "## Judges",
        _bullets(
            [
                *sentences.judge_lines(result["judges"]),
                *(
                    f"Settings of {name}: {evidence.in_short(facts['identity'])}"
                    for name, facts in result["judges"].items()
                ),
            ]
        ),
    ]
    for name, benchmark in result["benchmarks"].items():
        parts += [
            f"## Benchmark: {_plain(name)}",
            _bullets(
                [
                    f"{benchmark['questions']['count']:,} questions, fingerprint"
                    f" {benchmark['questions']['fingerprint'][:12]}",
                    *sentences.training_lines(benchmark, name),
                    *sentences.policy_remark(benchmark["groups"]),
                    *sentences.closing(benchmark, named=None),
                ]
            ),
        ]
        for view in views(result, name):
            parts += _judge(view)
        for table in evidence.tables(result, name):
            if table.rows:
                parts += _section(table)
    return "\n\n".join(parts) + "\n"


def tables_in_markdown(title: str, lines: Sequence[str], tables: Sequence[Table]) -> str:
    """A title, sentences below it, and tables, each with its note."""
    parts = [f"# {_plain(title)}", _bullets(lines)]
    for table in tables:
        parts += _section(table)
    return "\n\n".join(parts) + "\n"


def _section(table: Table) -> Iterator[str]:
    yield f"### {_plain(table.title)}"
    if table.note:
        yield _plain(table.note)
    yield _pipe_table(table.header, [[*table.rows]])


def _judge(view: View) -> Iterator[str]:
    """The judge's headlines, then its scenarios, kind by kind."""
    title = _plain(view.title)
    lines = [f"Macro mean over scenarios \u2193, {line}" for line in sentences.headlines(view)]
    yield f"### Judge {title}"
    yield _bullets([*lines, *sentences.remarks(view), *sentences.comparisons(view)])
    for variant in view.variants if view.cells else ():
        yield f"### {title}: {_plain(variant)}, ASR in % \u2193"
        yield _pipe_table(["scenario", *view.arms], view.rows([variant], sentences.share_text))


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _plain(text: str) -> str:
    """A text on one line in which nothing is read as markup or HTML."""
    line = _TAG.sub("&lt;", _ENTITY.sub("&amp;", " ".join(text.split())))
    return _SPECIAL.sub(r"\\\g<0>", line)


def _pipe_table(header: Sequence[str], blocks: Sequence[Sequence[Sequence[str]]]) -> str:
    from tabulate import tabulate

    table = [header, *(row for block in blocks for row in block)]
    names, *rows = ([_plain(word) for word in row] for row in table)
    numbers = [all(_is_number(row[place]) for row in rows) for place in range(len(names))]
    align = ["right" if number else "left" for number in numbers]
    return str(tabulate(rows, names, "pipe", disable_numparse=True, colalign=align))


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text[:1] in "+-<"
