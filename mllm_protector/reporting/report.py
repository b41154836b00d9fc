"""The pages of an evaluation: ``asr.md``, ``asr.tex``, ``asr.png``, ``report.html``, and the terminal.

All are made from the content of ``asr.json``; only the page also shows single answers and ``run.json``.
"""

import logging
from collections.abc import Iterator, Mapping
from itertools import chain, product
from typing import Any

from mllm_protector.evaluation.result import Evaluation
from mllm_protector.evaluation.rows import read_rows
from mllm_protector.files import write_bytes, write_text
from mllm_protector.reporting import pivots, sentences
from mllm_protector.reporting.columns import HEADLINE
from mllm_protector.reporting.page import page
from mllm_protector.reporting.plots import asr_plot
from mllm_protector.reporting.tables import Table, latex, markdown, print_tables, upright

log = logging.getLogger(__name__)

TITLE = "Attack success rate (ASR) in %, lower is better"


def report(evaluation: Evaluation | None) -> None:
    """Write and print everything that people read.

    ``None`` (another process, or a dry run) has nothing to report.

    Raises:
        RunError: too many answers have no verdict (after everything is written), or the disk is full.
    """
    if evaluation is None:
        return
    result, folder = evaluation.result, evaluation.folder
    write_text(folder / "asr.md", as_markdown(result))
    write_text(folder / "asr.tex", as_latex(result))
    write_bytes(folder / "asr.png", asr_plot(result))
    files = [folder / name / "results.jsonl" for name in result["benchmarks"]]
    html = page(
        result,
        lambda: chain.from_iterable(map(read_rows, files)),
        run=evaluation.run,
        images=evaluation.image,
        max_rows=evaluation.report_rows,
    )
    write_text(folder / "report.html", html)
    print_report(result, evaluation.run)
    log.info("written: %s (report.html, asr.json, measurements.csv, asr.md, asr.tex, asr.png)", folder)
    evaluation.require_judged()


def as_markdown(result: Mapping[str, Any]) -> str:
    """Every table of every benchmark."""
    result = upright(result)
    parts = [markdown(TITLE, sentences.legend(result), [])]
    for title, lines, data in _benchmarks(result):
        parts.append(markdown(title, lines, pivots.tables(data)))
    return "\n".join(parts)


def as_latex(result: Mapping[str, Any]) -> str:
    """For each benchmark the headline table, each judge's scenarios, and pairs of twins."""
    result = upright(result)
    found: list[Table] = []
    for _, _, data in _benchmarks(result):
        found.append(pivots.headline(data))
        found += [pivots.by_scenario(data, *each) for each in product(data.judges, data.variants)]
        found.append(pivots.twins(data))
    return latex(sentences.judge_lines(result["judges"]), [each for each in found if each.rows])


def print_report(result: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """For each benchmark what fits on a screen or two: headlines, and the first judge's scenarios."""
    result = upright(result)
    print_tables(TITLE, sentences.legend(result), [])
    short = [column for column in HEADLINE if column[0] in ("macro", "unjudged", "macro difference", "p")]
    for title, lines, data in _benchmarks(result):
        first = product(list(data.judges)[:1], data.variants[:1])
        scenarios = [pivots.by_scenario(data, *each) for each in first]
        tables = [
            pivots.arms(data, run.get("measurements", ())),
            pivots.headline(data, short),
            *scenarios,
            pivots.harmless(data),
            pivots.twins(data),
            pivots.other_metrics(data),
        ]
        print_tables(title, lines, [table for table in tables if table.rows])


def _benchmarks(result: Mapping[str, Any]) -> Iterator[tuple[str, list[str], pivots.Pivot]]:
    """Each benchmark's title, sentences and measurements."""
    for name in result["benchmarks"]:
        data = pivots.pivot(result, name)
        lines = [*sentences.headlines(data), *sentences.benchmark_lines(data, name)]
        yield f"Benchmark {name}", lines, data
