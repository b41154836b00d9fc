"""The pages of an evaluation: ``asr.md``, ``asr.tex``, ``asr.png``, ``report.html``, and the terminal.

All are made from the content of ``asr.json``; only the page also shows single answers and ``run.json``.
"""

import logging
from collections.abc import Mapping
from itertools import chain
from typing import Any

from mllm_protector.evaluation.result import Evaluation
from mllm_protector.evaluation.rows import read_rows
from mllm_protector.files import write_bytes, write_text
from mllm_protector.reporting import pivots, sentences
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
    html = page(
        result,
        lambda: chain.from_iterable(
            read_rows(folder / name / "results.jsonl") for name in result["benchmarks"]
        ),
        run=evaluation.run,
        images=evaluation.image,
        max_rows=evaluation.report_rows,
    )
    write_text(folder / "report.html", html)
    print_report(result)
    log.info("written: %s (report.html, asr.json, measurements.csv, asr.md, asr.tex, asr.png)", folder)
    evaluation.require_judged()


def as_markdown(result: Mapping[str, Any]) -> str:
    """Every table of every benchmark."""
    result = upright(result)
    parts = [markdown(TITLE, [*sentences.legend(result), *sentences.judge_lines(result["judges"])], [])]
    for name in result["benchmarks"]:
        data = pivots.pivot(result, name)
        lines = [*sentences.headlines(data), *sentences.benchmark_lines(data, name)]
        parts.append(markdown(f"Benchmark {name}", lines, pivots.tables(data)))
    return "\n".join(parts)


def as_latex(result: Mapping[str, Any]) -> str:
    """For each benchmark the headline table, then each judge's scenarios."""
    result = upright(result)
    found: list[Table] = []
    for name in result["benchmarks"]:
        data = pivots.pivot(result, name)
        found.append(pivots.headline(data))
        found += [
            pivots.by_scenario(data, judge, variant) for judge in data.judges for variant in data.variants
        ]
    return latex(sentences.judge_lines(result["judges"]), [each for each in found if each.rows])


def print_report(result: Mapping[str, Any]) -> None:
    """For each benchmark what fits on a screen or two: headlines, and the first judge's scenarios."""
    result = upright(result)
    print_tables(TITLE, [*sentences.legend(result), *sentences.judge_lines(result["judges"])], [])
    short = [column for column in pivots.HEADLINE if column[0] in ("macro", "unjudged", "difference", "p")]
    for name in result["benchmarks"]:
        data = pivots.pivot(result, name)
        scenarios = [
            pivots.by_scenario(data, judge, variant)
            for judge in list(data.judges)[:1]
            for variant in data.variants[:1]
        ]
        tables = [pivots.headline(data, short), *scenarios, pivots.harmless(data), pivots.other_metrics(data)]
        lines = [*sentences.headlines(data), *sentences.benchmark_lines(data, name)]
        print_tables(f"Benchmark {name}", lines, [table for table in tables if table.rows])
