"""Several runs side by side: ``compare.json``, ``compare.md``, ``compare.html``, and a print on the terminal.

Only what was measured alike is compared: the same questions, of the same benchmark, by the same judges.
Anything else is refused with the run and the difference. Runs may differ in the MLLM and in the guard.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm_protector.errors import InputError
from mllm_protector.evaluation.pairing import paired
from mllm_protector.files import file_digest, read_json, write_json, write_text
from mllm_protector.reading import read_records, text_field
from mllm_protector.records import JUDGED, Status
from mllm_protector.reporting.layout import (
    Table,
    markdown_table,
    markdown_text,
    p_value,
    percent,
    points,
    render,
    upright,
    with_interval,
)
from mllm_protector.reporting.printed import print_tables
from mllm_protector.reporting.report import SCHEMA
from mllm_protector.reporting.sentences import TESTS
from mllm_protector.reporting.tables import shown_groups

TITLE = "Attack success rate (ASR) of several runs, lower is better"


Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run left behind.

    Attributes:
        name: what the comparison calls it.
        folder: its ``output_dir``.
        result: the content of its ``asr.json``.
    """

    name: str
    folder: Path
    result: Mapping[str, Any]


def compare(runs: Sequence[str], output_dir: str, judges: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare runs with the first of them.

    Args:
        runs: folders that ``eval_mmsafety.py`` wrote, two or more.
        output_dir: where the comparison goes.
        judges: whose verdicts are compared; ``None`` for all that every run has.

    Returns:
        The content of ``compare.json``: ``runs``, ``judges``, and for each benchmark ``means``, ``benign``
        and ``paired`` (the first run against each other one, arm by arm, on the questions judged in both;
        ``same_answers`` says whether the MLLM's answers were the same too).

    Raises:
        InputError: a run cannot be read or be compared with the first.
    """
    found = _read(runs)
    chosen = _common_judges(found, judges)
    benchmarks = _common_benchmarks(found)
    content = {
        "schema": SCHEMA,
        "runs": [{"name": run.name} | {key: run.result[key] for key in ("mllm", "guard")} for run in found],
        "judges": {
            name: {
                "identity": found[0].result["judges"][name]["identity"],
                "circular": any(run.result["judges"][name]["circular"] for run in found),
            }
            for name in chosen
        },
        "benchmarks": {name: _benchmark(found, name, chosen) for name in benchmarks},
    }
    tables = [table for table in _tables(upright(content)) if table.rows]
    folder = Path(output_dir)
    write_json(folder / "compare.json", content)
    write_text(folder / "compare.md", _markdown(tables))
    write_text(folder / "compare.html", render("compare.html.j2", title=TITLE, tables=tables))
    print_tables(TITLE, [], tables)
    return content


def _read(folders: Sequence[str]) -> list[Run]:
    if len(folders) < 2:
        raise InputError("runs: give two folders or more, such as runs=[outputs/first,outputs/second]")
    names = [Path(folder).name for folder in folders]
    names = names if len(set(names)) == len(names) else list(folders)
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise InputError(f"runs: a folder stands there twice ({', '.join(folders)})")
    runs = []
    for name, folder in zip(names, folders, strict=True):
        path = Path(folder) / "asr.json"
        result = read_json(path)
        schema = result.get("schema") if isinstance(result, dict) else None
        if schema != SCHEMA:
            raise InputError(f"{path}: schema {schema}, not {SCHEMA}; run eval_mmsafety.py there again")
        if missing := [key for key in ("mllm", "guard", "judges", "benchmarks") if key not in result]:
            raise InputError(f"{path}: has no {missing[0]}; run eval_mmsafety.py there again")
        _require_unedited(Path(folder))
        runs.append(Run(name=name, folder=Path(folder), result=result))
    return runs


def _require_unedited(folder: Path) -> None:
    """Rates are read from one file and differences made from another: both must be of the same run."""
    run = folder / "run.json"
    for name, digest in read_json(run)["sha256"].items() if run.is_file() else ():
        path = folder / name
        if not path.is_file() or file_digest(path) != digest:
            raise InputError(
                f"{path}: is not the file that the evaluation wrote; run eval_mmsafety.py there again"
            )


def _common_judges(runs: Sequence[Run], wanted: Sequence[str] | None) -> list[str]:
    first = runs[0]
    for run in runs:
        if missing := [name for name in wanted or () if name not in run.result["judges"]]:
            raise InputError(
                f"{run.folder}: has no judge {missing[0]} (has: {', '.join(run.result['judges'])})"
            )
    common = wanted or [
        name for name in first.result["judges"] if all(name in run.result["judges"] for run in runs)
    ]
    if not common:
        raise InputError(
            f"runs: no judge is in all of them ({first.folder}: {', '.join(first.result['judges'])})"
        )
    for run in runs[1:]:
        for name in common:
            one, other = (each.result["judges"][name]["identity"] for each in (first, run))
            if one != other:
                raise InputError(
                    f"{run.folder}: the judge {name} is another one than in {first.folder} (differs in "
                    f"{_difference(one, other)}); judge both alike, or leave it out with judges=[...]"
                )
    return list(common)


def _common_benchmarks(runs: Sequence[Run]) -> list[str]:
    first = runs[0]
    common = [
        name for name in first.result["benchmarks"] if all(name in run.result["benchmarks"] for run in runs)
    ]
    if not common:
        raise InputError(
            f"runs: no benchmark is in all of them ({first.folder}: {', '.join(first.result['benchmarks'])})"
        )
    for run in runs[1:]:
        for name in common:
            one, other = (each.result["benchmarks"][name] for each in (first, run))
            if one["identity"] != other["identity"]:
                raise InputError(
                    f"{run.folder}: the benchmark {name} is another one than in {first.folder} (differs in "
                    f"{_difference(one['identity'], other['identity'])}); measure both on the same"
                )
            if one["questions"]["fingerprint"] != other["questions"]["fingerprint"]:
                raise InputError(
                    f"{run.folder}: other questions of {name} than in {first.folder} "
                    f"({other['questions']['count']:,} and {one['questions']['count']:,}); "
                    "measure both on the same"
                )
    return common


def _difference(one: Any, other: Any) -> str:
    """The keys in which two identities differ; values may be long."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return "its identity"
    return ", ".join(sorted(key for key in {*one, *other} if one.get(key) != other.get(key)))


def _benchmark(runs: Sequence[Run], name: str, judges: Sequence[str]) -> dict[str, Any]:
    entries = {run.name: run.result["benchmarks"][name] for run in runs}
    groups = entries[runs[0].name]["groups"]
    rows = [_rows(run.folder / name / "results.jsonl") for run in runs]
    return {
        "groups": groups,
        "means": [
            {"run": run} | mean
            for run, entry in entries.items()
            for mean in entry["means"]
            if mean["judge"] in judges
        ],
        "benign": [{"run": run} | arm for run, entry in entries.items() for arm in entry["benign"]],
        "paired": [
            {"run": run.name, "against": runs[0].name} | comparison
            for run, own in zip(runs[1:], rows[1:], strict=True)
            for comparison in _paired(rows[0], own, judges, groups)
        ],
    }


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


def _paired(
    before: Mapping[tuple[str, str], Row],
    after: Mapping[tuple[str, str], Row],
    judges: Sequence[str],
    groups: Mapping[str, Sequence[str]],
) -> Iterator[dict[str, Any]]:
    """Arm by arm: the same questions in both runs, where both have a verdict."""
    both = [key for key in before if key in after]
    for judge in judges:
        for arm in dict.fromkeys(arm for _, arm in both):
            pairs = [(before[key], after[key]) for key in both if key[1] == arm]
            pairs = [pair for pair in pairs if all(row["statuses"].get(judge) in JUDGED for row in pair)]
            variants = dict.fromkeys(row["variant"] for row, _ in pairs)
            pictures = [variant for variant in variants if variant != "TEXT"]
            for kind, members in ({"IMAGES": pictures} if pictures else {"TEXT": ["TEXT"]}).items():
                for group in shown_groups(groups):
                    chosen = [
                        (one, other)
                        for one, other in pairs
                        if one["variant"] in members and one["scenario"] in groups[group]
                    ]
                    if chosen:
                        yield {"judge": judge, "arm": arm, "variant": kind, "group": group} | _difference_of(
                            chosen, judge
                        )


def _difference_of(pairs: Sequence[tuple[Row, Row]], judge: str) -> dict[str, Any]:
    one, other = (
        np.array([row["statuses"][judge] == Status.HARMFUL for row in rows], dtype=np.float64)
        for rows in zip(*pairs, strict=True)
    )
    clusters = np.unique([row["base"] for row, _ in pairs], return_inverse=True)[1]
    found = paired(one, other, clusters)
    return asdict(found) | {"same_answers": all(row["raw"] == again["raw"] for row, again in pairs)}


def _tables(content: Mapping[str, Any]) -> Iterator[Table]:
    def title(judge: str) -> str:
        return f"{judge} (circular)" if content["judges"][judge]["circular"] else judge

    for name, entry in content["benchmarks"].items():
        groups = shown_groups(entry["groups"])
        kinds = list(dict.fromkeys(mean["variant"] for mean in entry["means"]))[:1]
        for judge in content["judges"]:
            yield Table(
                title=f"{name}: ASR in % by {title(judge)}, {', '.join(kinds)}",
                header=["run", "arm", "scenarios", "macro", "micro", "unjudged"],
                rows=[
                    [
                        mean["run"],
                        mean["arm"],
                        mean["group"],
                        with_interval(mean["macro"], mean["macro_low"], mean["macro_high"]),
                        with_interval(mean["micro"], mean["low"], mean["high"]),
                        f"{mean['unjudged']:,}",
                    ]
                    for mean in entry["means"]
                    if mean["judge"] == judge and mean["variant"] in kinds and mean["group"] in groups
                ],
                words=3,
            )
        yield Table(
            title=f"{name}: harmless questions, in %",
            header=["run", "arm", "changed", "refused", "score", "correct answers lost"],
            rows=[
                [
                    arm["run"],
                    arm["arm"],
                    *(
                        with_interval(arm[f"{what}_share"], arm[f"{what}_low"], arm[f"{what}_high"])
                        for what in ("changed", "refused")
                    ),
                    percent(arm["score"]),
                    with_interval(arm["lost_share"], arm["lost_low"], arm["lost_high"]),
                ]
                for arm in entry["benign"]
                if arm["total"]
            ],
            words=2,
        )
        yield Table(
            title=f"{name}: differences on the same questions, in percentage points",
            header=["run", "against", "judge", "arm", "scenarios", "answers", "n", "difference", "p", "test"],
            rows=[
                [
                    pair["run"],
                    pair["against"],
                    title(pair["judge"]),
                    pair["arm"],
                    f"{pair['group']}, {pair['variant']}",
                    "the same" if pair["same_answers"] else "others",
                    f"{pair['pairs']:,}",
                    points(pair["difference"], pair["low"], pair["high"]),
                    p_value(pair["p"]),
                    pair["test"],
                ]
                for pair in entry["paired"]
            ],
            note="Below zero: fewer harmful answers than in the run it is compared with. The answers are "
            f"those of the MLLM, before the guard. {TESTS}",
            words=6,
        )


def _markdown(tables: Sequence[Table]) -> str:
    parts = [f"# {TITLE}"]
    for table in tables:
        note = [markdown_text(table.note)] if table.note else []
        parts += [f"## {markdown_text(table.title)}", *note, markdown_table(table)]
    return "\n\n".join(parts) + "\n"
