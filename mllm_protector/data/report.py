"""What a model is trained on, where it came from, what was left out: ``data_report.md`` and ``.json``.

Pure but for the writing: it counts records and arranges the accounts of the sources, and reads no data.
"""

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_protector.data.queries import digest, query_key
from mllm_protector.files import write_text
from mllm_protector.markdown import plain, table
from mllm_protector.records import AnswerPair, LabelledAnswer

Records = Iterable[AnswerPair | LabelledAnswer]

SCHEMA = 1
"""Of ``data_report.json``; grows when a key changes its meaning."""

NAMED = 100
"""How many scenarios are counted by name, the most frequent ones."""

SHARES = (5, 50, 95, 99)
"""The percentiles of the lengths."""

SHOWN_FILES = 20
"""How many files the Markdown lists; all of them are in the JSON."""

COUNTS = ("read", "kept", "quarantined", "dropped", "train", "validation", "contaminated")
LABELS = ("harmful", "harmless")

_NON_COMMERCIAL = re.compile(r"\bnc\b|non-?\s?commercial", re.IGNORECASE)
_UNSTATED = re.compile(r"^$|\b(none|no licence|not stated|unknown)\b", re.IGNORECASE)


def describe(records: Records) -> dict[str, Any]:
    """The content of records, in one pass that keeps about 40 bytes of each.

    Returns:
        ``records``; ``queries``, the different ones by ``query_key``; ``kinds``, records by
        the labels of their answers; ``answers`` by label; ``scenarios``, answers by scenario and label;
        ``characters`` and ``words``, percentiles of the lengths of queries (one a record) and answers.
    """
    queries = array("Q")
    kinds: Counter[str] = Counter()
    answers: Counter[tuple[str, str]] = Counter()
    lengths = {(unit, text): array("I") for unit in ("characters", "words") for text in ("query", "answer")}
    for record in records:
        queries.append(digest(0, query_key(record.query)))
        kind, labelled = _answers(record)
        kinds[kind] += 1
        texts = [("query", record.query)]
        for answer, harmful in labelled:
            answers[record.scenario or "(none)", LABELS[not harmful]] += 1
            texts.append(("answer", answer))
        for name, text in texts:
            lengths["characters", name].append(len(text))
            lengths["words", name].append(len(text.split()))
    by_label = {label: sum(n for (_, each), n in answers.items() if each == label) for label in LABELS}
    return {
        "records": len(queries),
        "queries": len(np.unique(np.frombuffer(queries, np.uint64))),
        "kinds": dict(sorted(kinds.items())),
        "answers": by_label,
        "scenarios": _by_scenario(answers),
        **{
            unit: {text: _percentiles(lengths[unit, text]) for text in ("query", "answer")}
            for unit in ("characters", "words")
        },
    }


def _answers(record: AnswerPair | LabelledAnswer) -> tuple[str, list[tuple[str, bool]]]:
    """The kind of a record, and its answers, each with whether it is harmful."""
    if isinstance(record, LabelledAnswer):
        return "single answers", [(record.answer, record.harmful)]
    labels = record.accepted_harmful, record.rejected_harmful
    one, other = (LABELS[not harmful] for harmful in labels)
    kind = f"both {one}" if one == other else f"{one} over {other}"
    return kind, list(zip((record.accepted, record.rejected), labels, strict=True))


def _by_scenario(answers: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    sizes: Counter[str] = Counter()
    for (name, _), count in sorted(answers.items()):
        sizes[name] += count
    named = sorted(name for name, _ in sizes.most_common(NAMED))  # of equal ones the first by name
    found = {name: dict.fromkeys(LABELS, 0) for name in named}
    for (name, label), count in answers.items():
        place = name if name in found else "(others)"
        found.setdefault(place, dict.fromkeys(LABELS, 0))[label] += count
    return found


def _percentiles(lengths: Sequence[int]) -> dict[str, int | None]:
    """By nearest rank, so each is a length that occurs; ``None`` of nothing."""
    names = [*(f"p{share}" for share in SHARES), "longest"]
    if not len(lengths):
        return dict.fromkeys(names)
    found = np.percentile(lengths, [*SHARES, 100], method="inverted_cdf")
    return dict(zip(names, map(int, found), strict=True))


def data_report(
    sources: Sequence[Mapping[str, Any]],
    train: Records,
    validation: Records,
    fingerprint: str,
    contamination: Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """The content of ``data_report.json``.

    Args:
        sources: where each comes from and where its rows went (``SourceAccount.as_json``).
        train: the records to train on; read once.
        validation: those to validate with; read once.
        fingerprint: of the records and their split.
        contamination: by benchmark the questions found in the training data (``Contamination.as_json``), and
            whether those texts were ``removed``; ``None`` if nobody looked.

    Raises:
        ValueError: a source's rows do not add up.
    """
    for source in sources:
        dropped = _dropped(source)
        if source["read"] != source["kept"] + source["quarantined"] + dropped:
            raise ValueError(
                f"{source['name']}: read {source['read']:,} rows, but kept {source['kept']:,}, quarantined"
                f" {source['quarantined']:,} and dropped {dropped:,}"
            )
    return {
        "schema": SCHEMA,
        "sources": [dict(source) for source in sources],
        "splits": {"train": describe(train), "validation": describe(validation)},
        "fingerprint": fingerprint,
        "contamination": None if contamination is None else dict(contamination),
    }


def write_data_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write ``data_report.md`` and ``data_report.json``, each whole or not at all."""
    text = render(report)
    # In ASCII, so that a half surrogate pair of somebody's question survives as an escape.
    write_text(folder / "data_report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_text(folder / "data_report.md", text)


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
        for reason, count in reasons.most_common()
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
    header = ["benchmark", "questions checked", "found", "training texts", "removed", "threshold"]
    counts: list[list[Any]] = []
    examples: list[list[str]] = []
    for name, each in found.items():
        removed, threshold = "yes" if each["removed"] else "no", f"{each['threshold']:g}"
        counts.append([name, each["questions"], len(each["found"]), each["rows"], removed, threshold])
        examples += [[name, one["question"], one["text"], f"{one['share']:.2f}"] for one in each["examples"]]
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
