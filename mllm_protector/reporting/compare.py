"""Several runs side by side: ``compare.json``, ``compare.md``, ``compare.html``, and a print on the terminal.

A comparison is the runs' measurements with one more field, ``run``. Only what was measured alike is compared:
the same questions, of the same benchmark, by the same judges. Anything else is refused with the run and the
difference. Runs may differ in the MLLM and in the guard.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mllm_protector.errors import InputError
from mllm_protector.evaluation.effects import differences
from mllm_protector.evaluation.grid import IMAGES
from mllm_protector.evaluation.measurements import SCHEMA, Measurement, as_rows
from mllm_protector.evaluation.pairing import paired
from mllm_protector.files import file_digest, read_json, write_json, write_text
from mllm_protector.reading import read_records, text_field
from mllm_protector.records import JUDGED, Status
from mllm_protector.reporting import columns, pivots
from mllm_protector.reporting.page import render
from mllm_protector.reporting.pivots import Pivot
from mllm_protector.reporting.tables import (
    Column,
    Row,
    Table,
    decimal,
    markdown,
    p_value,
    points,
    print_tables,
    share,
    total,
    upright,
)

TITLE = "Attack success rate (ASR) of several runs, lower is better"
READING = "In brackets: the 95 % interval. Macro: every scenario counts the same; pooled: every answer does."

PAIRED: tuple[Column, ...] = (
    ("n", "run_difference", total),
    ("difference", "run_difference", points),
    ("p", "run_difference_p", p_value),
    ("same MLLM answers", "same_answers", share),
)


class Run(NamedTuple):
    """A finished run: its name in the comparison, its ``output_dir``, and the content of its ``asr.json``."""

    name: str
    folder: Path
    result: Mapping[str, Any]


def compare(runs: Sequence[str], output_dir: str, judges: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare runs with the first of them.

    Args:
        runs: folders that ``eval_mmsafety.py`` wrote, two or more.
        output_dir: of the comparison.
        judges: whose verdicts are compared; ``None`` for all that every run has.

    Returns:
        The content of ``compare.json``: ``runs``, ``judges``, ``groups`` of each benchmark, and
        ``measurements``, each with its ``run``. ``run_difference`` compares a run with the first one, arm by
        arm, on the questions judged in both; ``same_answers`` is the share of those that the MLLM answered
        in the same words.

    Raises:
        InputError: a run cannot be read or be compared with the first.
    """
    found = _read(runs)
    chosen = _common(found, "judge", "judge both alike, or leave it out with judges=[...]", judges or ())
    benchmarks = _common(found, "benchmark", "measure both on the same")
    _require_same_questions(found, benchmarks)
    content = {
        "schema": SCHEMA,
        "runs": [
            {"name": run.name} | {key: run.result.get(key) for key in ("mllm", "guard", "asked_again")}
            for run in found
        ],
        "judges": {
            name: {
                "identity": found[0].result["judges"][name]["identity"],
                "circular": any(run.result["judges"][name]["circular"] for run in found),
            }
            for name in chosen
        },
        "groups": {name: found[0].result["benchmarks"][name]["groups"] for name in benchmarks},
        "measurements": [
            {"run": run.name, **row}
            for run in found
            for row in run.result["measurements"]
            if row["benchmark"] in benchmarks and (row["judge"] in chosen or row["judge"] is None)
        ]
        + [row for name in benchmarks for row in _differences(found, name, chosen)],
    }
    tables = [table for table in _tables(upright(content)) if table.rows]
    folder = Path(output_dir)
    write_json(folder / "compare.json", content)
    write_text(folder / "compare.md", markdown(TITLE, [READING], tables))
    write_text(
        folder / "compare.html", render("compare.html.j2", title=TITLE, reading=READING, tables=tables)
    )
    print_tables(TITLE, [READING], [table for table in tables if not table.folded])
    return content


def _read(folders: Sequence[str]) -> list[Run]:
    if len(folders) < 2:
        raise InputError("runs: give two folders or more, such as runs=[outputs/first,outputs/second]")
    names = [Path(folder).name for folder in folders]
    names = names if len(set(names)) == len(names) else list(folders)
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise InputError(f"runs: a folder is named twice ({', '.join(folders)})")
    runs = []
    for name, folder in zip(names, folders, strict=True):
        path = Path(folder) / "asr.json"
        result = read_json(path)
        schema = result.get("schema") if isinstance(result, dict) else None
        if schema != SCHEMA:
            raise InputError(f"{path}: schema {schema}, not {SCHEMA}; run the evaluation there again")
        for key in ("mllm", "guard", "judges", "benchmarks", "measurements"):
            if key not in result:
                raise InputError(f"{path}: has no {key}; run the evaluation there again")
        _require_unedited(Path(folder))
        runs.append(Run(name=name, folder=Path(folder), result=result))
    return runs


def _require_unedited(folder: Path) -> None:
    """Rates come from one file and differences from another: both must be of the same run."""
    run = folder / "run.json"
    for name, digest in read_json(run)["sha256"].items() if run.is_file() else ():
        path = folder / name
        if not path.is_file() or file_digest(path) != digest:
            raise InputError(
                f"{path}: is not the file that the evaluation wrote; run the evaluation there again"
            )


def _common(runs: Sequence[Run], kind: str, advice: str, wanted: Sequence[str] = ()) -> list[str]:
    """The judges or benchmarks of all runs, or those wanted; each has the same identity in all of them."""
    facts = [run.result[f"{kind}s"] for run in runs]
    for run, own in zip(runs, facts, strict=True):
        if missing := [name for name in wanted if name not in own]:
            raise InputError(f"{run.folder}: has no {kind} {missing[0]} (has: {', '.join(own)})")
    common = list(wanted) or [name for name in facts[0] if all(name in own for own in facts)]
    if not common:
        raise InputError(f"runs: no {kind} is in all of them ({runs[0].folder}: {', '.join(facts[0])})")
    for run, own in zip(runs, facts, strict=True):
        for name in common:
            one, other = facts[0][name]["identity"], own[name]["identity"]
            if one != other:
                raise InputError(
                    f"{run.folder}: the {kind} {name} differs from that of {runs[0].folder} (differs in "
                    f"{_difference(one, other)}); {advice}"
                )
    return common


def _difference(one: Any, other: Any) -> str:
    """The keys in which two identities differ; values may be long."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return "its identity"
    return ", ".join(sorted(key for key in {*one, *other} if one.get(key) != other.get(key)))


def _require_same_questions(runs: Sequence[Run], benchmarks: Sequence[str]) -> None:
    for run in runs[1:]:
        for name in benchmarks:
            one, other = (each.result["benchmarks"][name]["questions"] for each in (runs[0], run))
            if one["fingerprint"] != other["fingerprint"]:
                raise InputError(
                    f"{run.folder}: other questions of {name} than in {runs[0].folder} "
                    f"({other['count']:,} and {one['count']:,}); measure both on the same"
                )


def _rows(path: Path) -> dict[tuple[str, str], Row]:
    """What a run says of each (question, arm); without the file there are no paired differences."""

    def parse(row: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(row.get("verdicts"), dict):
            raise ValueError("field 'verdicts' must be an object")
        texts = {name: text_field(row, name) for name in ("id", "arm", "scenario", "variant", "base")}
        statuses = {judge: verdict.get("status") for judge, verdict in row["verdicts"].items()}
        return texts | {"raw": row.get("raw"), "statuses": statuses}

    if not path.is_file():
        return {}
    read = read_records(path, parse, key=lambda row: (row["id"], row["arm"]))
    return {(row["id"], row["arm"]): row for row in read.records}


def _differences(runs: Sequence[Run], name: str, judges: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each run against the first, where both have a verdict on the same question in the same arm."""
    before = _rows(runs[0].folder / name / "results.jsonl")
    groups = runs[0].result["benchmarks"][name]["groups"]
    for run in runs[1:]:
        after = _rows(run.folder / name / "results.jsonl")
        both = [(before[key], after[key]) for key in before if key in after]
        for judge, arm in product(judges, dict.fromkeys(row["arm"] for row, _ in both)):
            pairs = [
                pair
                for pair in both
                if pair[0]["arm"] == arm and all(row["statuses"].get(judge) in JUDGED for row in pair)
            ]
            images = [pair for pair in pairs if pair[0]["variant"] != "TEXT"]
            variant, pairs = (IMAGES, images) if images else ("TEXT", pairs)
            for group, members in groups.items():
                where = {"benchmark": name, "judge": judge, "arm": arm, "variant": variant, "group": group}
                if chosen := [pair for pair in pairs if pair[0]["scenario"] in members]:
                    yield from ({"run": run.name} | row for row in as_rows(_difference_of(chosen, where)))


def _difference_of(pairs: Sequence[tuple[Row, Row]], where: Mapping[str, Any]) -> Iterator[Measurement]:
    one, other = (
        np.array([row["statuses"][where["judge"]] == Status.HARMFUL for row in rows], dtype=np.float64)
        for rows in zip(*pairs, strict=True)
    )
    clusters = np.unique([row["base"] for row, _ in pairs], return_inverse=True)[1]
    yield from differences("run_difference", paired(one, other, clusters), where)
    same = sum(row["raw"] == again["raw"] for row, again in pairs) / len(pairs)
    yield Measurement(metric="same_answers", value=same, n=len(pairs), **where)


def _tables(content: Mapping[str, Any]) -> Iterator[Table]:
    runs = [run["name"] for run in content["runs"]]
    short = [column for column in columns.HEADLINE if column[0] in ("macro", "pooled", "unjudged")]
    for name, groups in content["groups"].items():
        rows = [row for row in content["measurements"] if row["benchmark"] == name]
        arms = list(dict.fromkeys(row["arm"] for row in rows if row["arm"]))
        data = Pivot(rows, {"groups": groups}, content["judges"], arms)
        first = data.variants[:1]
        for judge in content["judges"]:
            shown = data.select(judge=judge, variant=first, group=list(data.groups))
            title = f"{name}: ASR in % by {data.judge(judge)}, {', '.join(first)}"
            yield pivots.table(data, title, ("run", "arm", "group"), short, shown)
        title = f"{name}: harmless questions, in %"
        yield pivots.table(data, title, ("run", "arm"), columns.HARMLESS, rows)
        title = f"{name}: pairs of an unsafe question and its safe twin, in %"
        grouped = data.select(variant=first, group=list(data.groups))
        yield pivots.table(data, title, ("run", "judge", "arm", "group"), columns.TWINS, grouped)
        yield pivots.table(
            data,
            f"{name}: differences to {runs[0]} on the same questions, in percentage points",
            ("run", "judge", "arm", "variant", "group"),
            PAIRED,
            [row for row in rows if row["group"] in data.groups],
            note=f"Below zero: fewer harmful answers than {runs[0]}. {pivots.TESTS}",
        )
        yield pivots.table(
            data,
            f"{name}: other metrics",
            ("metric", "judge", "arm", "variant", "group"),
            [(run, run, decimal) for run in runs],
            [row for row in rows if row["metric"] not in columns.KNOWN | {metric for _, metric, _ in PAIRED}],
            across=itemgetter("run"),
        )
