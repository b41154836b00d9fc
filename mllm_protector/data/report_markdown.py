"""``data_report.md`` from the content of ``data_report.json``. Computes nothing but sums."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_protector.markdown import plain, table

SHOWN_FILES = 20
"""How many files the Markdown lists; all of them are in the JSON."""

SHOWN_EXAMPLES = 10
"""How many training texts that hold a question the Markdown shows of each benchmark."""

COUNTS = ("read", "kept", "quarantined", "dropped", "train", "validation", "contaminated")
LABELS = ("harmful", "harmless")

_NON_COMMERCIAL = re.compile(r"\bnc\b|non-?\s?commercial", re.IGNORECASE)
_UNSTATED = re.compile(r"^$|\b(none|no licence|not stated|unknown)\b", re.IGNORECASE)


def render(report: Mapping[str, Any]) -> str:
    """The content of ``data_report.md``."""
    sources, splits = report["sources"], report["splits"]
    origins = [[source["name"], source["set"], source["licence"], source["revision"]] for source in sources]
    parts = [
        "# Data report",
        _summary(sources, splits),
        *_licence_warnings(sources),
        f"Fingerprint of the records and their split: {plain(report['fingerprint'])}",
        "## Sources",
        table(["source", "set", "licence", "revision"], origins, words=4),
        "Read = kept + quarantined + dropped. Where the weight is 1, kept = train + validation +"
        " contaminated, which are records that hold a benchmark's question and are not trained on.",
        _accounts(sources),
        "## Dropped rows",
        _drops(sources),
        "## Labels",
        _labels(splits),
        "## Scenarios",
        "Answers by the scenario of their query.",
        _scenarios(splits),
        "## Lengths",
        "p95: at least 95 % of the texts are no longer than this.",
        _lengths(splits),
        "## Benchmark questions in the training data",
        *_contamination(report["contamination"] or {}),
        "## Files",
        _files(sources),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(sources: Sequence[Mapping[str, Any]], splits: Mapping[str, Any]) -> str:
    train, validation = splits["train"], splits["validation"]
    harmful, harmless = (sum(split["answers"][label] for split in splits.values()) for label in LABELS)
    licences: dict[str, list[str]] = {}
    for source in sources:
        licences.setdefault(source["licence"], []).append(source["name"])
    origin = "; ".join(f"{', '.join(names)}: {licence}" for licence, names in licences.items())
    return plain(
        f"{train['records'] + validation['records']:,} records from"
        f" {len(sources):,} source{'s' * (len(sources) != 1)}: {train['records']:,} to train on, with"
        f" {train['queries']:,} different queries, and {validation['records']:,} to validate with. Of their"
        f" {harmful + harmless:,} answers {harmful:,} are harmful ({_percent(harmful, harmful + harmless)})."
        f" Licences: {origin}."
    )


def _licence_warnings(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    if bound := [source["name"] for source in sources if _NON_COMMERCIAL.search(source["licence"])]:
        lines.append(f"non-commercial use only: {', '.join(bound)}. This binds what is trained on it, too.")
    if unknown := [source["name"] for source in sources if _UNSTATED.search(source["licence"])]:
        lines.append(f"no licence is stated: {', '.join(unknown)}. Find out whether you may use it.")
    return [f"**Warning:** {plain(line)}" for line in lines]


def _accounts(sources: Sequence[Mapping[str, Any]]) -> str:
    counts = [[{**source, "dropped": _dropped(source)}[name] for name in COUNTS] for source in sources]
    rows = [[each["name"], f"{each['weight']:g}", *row] for each, row in zip(sources, counts, strict=True)]
    return table(["source", "weight", *COUNTS], [*rows, ["all", "", *map(sum, zip(*counts, strict=True))]])


def _drops(sources: Sequence[Mapping[str, Any]]) -> str:
    reasons: Counter[str] = Counter()
    for source in sources:
        reasons.update(source["dropped"])
    if not reasons.total():
        return "No row was dropped."
    rows = [
        [reason, *(source["dropped"].get(reason, 0) for source in sources), count]
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    ]
    totals = ["all", *map(_dropped, sources), reasons.total()]
    return table(["reason", *(source["name"] for source in sources), "all"], [*rows, totals])


def _dropped(source: Mapping[str, Any]) -> int:
    return sum(source["dropped"].values())


def _labels(splits: Mapping[str, Any]) -> str:
    kinds = sorted({kind for split in splits.values() for kind in split["kinds"]})
    rows = [[kind, *(split["kinds"].get(kind, 0) for split in splits.values())] for kind in kinds]
    for label in LABELS:
        answers = [split["answers"] for split in splits.values()]
        shares = (f"{each[label]:,} ({_percent(each[label], sum(each.values()))})" for each in answers)
        rows.append([f"{label} answers", *shares])
    return table(["records and answers", *splits], rows)


def _scenarios(splits: Mapping[str, Any]) -> str:
    columns = [(name, label) for name in splits for label in LABELS]
    names = sorted({name for split in splits.values() for name in split["scenarios"]})
    rows = [
        [name, *(splits[split]["scenarios"].get(name, {}).get(label, 0) for split, label in columns)]
        for name in names
    ]
    return table(["scenario", *(f"{split}, {label}" for split, label in columns)], rows)


def _lengths(splits: Mapping[str, Any]) -> str:
    rows = [
        [split, text, unit, *facts[unit][text].values()]
        for split, facts in splits.items()
        for text in ("query", "answer")
        for unit in ("characters", "words")
    ]
    return table(["split", "text", "unit", *splits["train"]["words"]["query"]], rows, words=3)


def _contamination(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not found:
        return [
            "Nobody looked. To have it checked, name the benchmarks that will be measured, such as "
            "`benchmark=[mmsafety]`."
        ]
    counts = [
        [
            name,
            each["questions"],
            len(each["found"]),
            each["rows"],
            "yes" if each["removed"] else "no",
            f"{each['threshold']:g}",
        ]
        for name, each in found.items()
    ]
    header = ["benchmark", "questions checked", "found", "training texts", "removed", "threshold"]
    examples = [
        [name, example["question"], example["text"], f"{example['share']:.2f}"]
        for name, each in found.items()
        for example in each["examples"][:SHOWN_EXAMPLES]
    ]
    shown = table(["benchmark", "question", "training text", "share"], examples, words=3)
    return [table(header, counts), *(["The first of them:", shown] if examples else [])]


def _files(sources: Sequence[Mapping[str, Any]]) -> str:
    rows = [[source["name"], *file] for source in sources for file in source["files"].items()]
    if not rows:
        return "The data was read from no file."
    shown = table(["source", "file", "sha256"], rows[:SHOWN_FILES], words=3)
    rest = len(rows) - SHOWN_FILES
    return f"{shown}\n\nAnd {rest:,} more, see data_report.json." if rest > 0 else shown


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %" if total else "-"
