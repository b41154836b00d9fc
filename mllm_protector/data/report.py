"""What a model is trained on, where it came from, what was left out: ``data_report.md`` and ``.json``.

Pure but for the writing: it counts records and arranges accounts that the sources gave, and reads no data.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mllm_protector.data.queries import digest, query_key
from mllm_protector.data.report_markdown import render as render
from mllm_protector.files import write_text
from mllm_protector.records import AnswerPair, LabelledAnswer

SCHEMA = 1
"""Of ``data_report.json``; grows when a key changes its meaning."""

NAMED = 100
"""How many scenarios are counted by name, the most frequent ones."""

SHARES = (5, 50, 95, 99)
"""The percentiles of the lengths."""


def describe(records: Iterable[AnswerPair | LabelledAnswer]) -> dict[str, Any]:
    """What records hold, in one pass: 8 bytes are kept of each record, and a count of each different length.

    Returns:
        ``records``; ``queries``, the different ones by ``query_key``; ``kinds``, records by
        the labels of their answers; ``answers`` by label; ``scenarios``, answers by scenario and label;
        ``characters`` and ``words``, percentiles of the lengths of queries (one a record) and answers.
    """
    queries = array("Q")
    kinds: Counter[str] = Counter()
    labels: Counter[tuple[str, bool]] = Counter()
    lengths: dict[tuple[str, str], Counter[int]] = {
        (unit, text): Counter() for unit in ("characters", "words") for text in ("query", "answer")
    }
    for record in records:
        queries.append(digest(0, query_key(record.query)))
        kinds[_kind(record)] += 1
        texts = [("query", record.query)]
        for answer, harmful in _answers(record):
            labels[record.scenario or "(none)", harmful] += 1
            texts.append(("answer", answer))
        for name, text in texts:
            lengths["characters", name][len(text)] += 1
            lengths["words", name][len(text.split())] += 1
    return {
        "records": len(queries),
        "queries": len(np.unique(np.frombuffer(queries, np.uint64))),
        "kinds": dict(sorted(kinds.items())),
        "answers": {
            name: sum(count for (_, harmful), count in labels.items() if harmful == wanted)
            for name, wanted in (("harmful", True), ("harmless", False))
        },
        "scenarios": _scenarios(labels),
        **{
            unit: {text: _percentiles(lengths[unit, text]) for text in ("query", "answer")}
            for unit in ("characters", "words")
        },
    }


def data_report(
    sources: Sequence[Mapping[str, Any]],
    train: Iterable[AnswerPair | LabelledAnswer],
    validation: Iterable[AnswerPair | LabelledAnswer],
    fingerprint: str,
    contamination: Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """The content of ``data_report.json``.

    Args:
        sources: where each comes from and where its rows went (``SourceAccount.as_json``).
        train: the records to train on; read once.
        validation: those to validate with; read once.
        fingerprint: of the records and their split.
        contamination: benchmark -> what was found of its questions in the training data, as in
            ``Contamination.as_json``, and whether those texts were ``removed``; ``None`` if nobody looked.

    Raises:
        ValueError: a source's rows do not add up.
    """
    for source in sources:
        dropped = sum(source["dropped"].values())
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
    """Write ``data_report.md`` and ``data_report.json``, each whole or not at all.

    Raises:
        OSError: they cannot be written.
    """
    text = render(report)
    # In ASCII, so that a half surrogate pair of somebody's question survives as an escape.
    write_text(folder / "data_report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_text(folder / "data_report.md", text)


def _answers(record: AnswerPair | LabelledAnswer) -> list[tuple[str, bool]]:
    if isinstance(record, LabelledAnswer):
        return [(record.answer, record.harmful)]
    return [(record.accepted, record.accepted_harmful), (record.rejected, record.rejected_harmful)]


def _kind(record: AnswerPair | LabelledAnswer) -> str:
    if isinstance(record, LabelledAnswer):
        return "single answers"
    if record.accepted_harmful == record.rejected_harmful:
        return "both harmful" if record.accepted_harmful else "both harmless"
    return "harmful over harmless" if record.accepted_harmful else "harmless over harmful"


def _scenarios(labels: Counter[tuple[str, bool]]) -> dict[str, dict[str, int]]:
    sizes: Counter[str] = Counter()
    for (name, _), count in labels.items():
        sizes[name] += count
    ranked = sorted(sizes, key=lambda name: (-sizes[name], name))
    found = {name: {"harmful": 0, "harmless": 0} for name in sorted(ranked[:NAMED])}
    for name in ranked:
        counts = found.setdefault(name if name in found else "(others)", {"harmful": 0, "harmless": 0})
        counts["harmful"] += labels[name, True]
        counts["harmless"] += labels[name, False]
    return found


def _percentiles(lengths: Counter[int]) -> dict[str, int | None]:
    """By nearest rank, so each is a length that occurs; ``None`` of nothing."""
    ordered = sorted(lengths)
    if not ordered:
        return dict.fromkeys([*(f"p{share}" for share in SHARES), "longest"])
    below = np.array([*accumulate(lengths[length] for length in ordered)])
    places = np.searchsorted(below * 100, np.array(SHARES) * below[-1])
    found = {f"p{share}": ordered[place] for share, place in zip(SHARES, places, strict=True)}
    return {**found, "longest": ordered[-1]}
