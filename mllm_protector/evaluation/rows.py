"""The results one by one: ``results.jsonl`` (docs/evaluation.md), and a lean table for the statistics."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mllm_protector.evaluation.grid import NONE
from mllm_protector.evaluation.items import Item
from mllm_protector.evaluation.measurements import Measurement
from mllm_protector.evaluation.stages import CUT, Row, shown, shown_is_cut
from mllm_protector.evaluation.statistics import macro_mean
from mllm_protector.evaluation.store import FAILED
from mllm_protector.files import write_text
from mllm_protector.reading import flag_field, read_records, text_field
from mllm_protector.records import BENIGN, JUDGED, LoadedBenchmark, Status
from mllm_protector.refusals import find_refusal

Labels = Mapping[tuple[str, str], bool]
"""(question id, arm) -> whether the answer is labelled harmful."""

NAMES = ("id", "base", "twin", "scenario", "variant", "criterion", "arm", "outcome")
COLUMNS = (
    *NAMES,
    *("harm", "changed", "repeated", "cut", "refused", "score", "truth", "raw_truth", "label"),
)
"""Of the table, beside ``status:<judge>`` and ``cut:<judge>`` for each judge."""


def result_rows(
    items: Sequence[Item],
    loaded: LoadedBenchmark,
    *,
    answers: Mapping[str, Sequence[Row]],
    replies: Mapping[str, Sequence[Row | None]],
    verdicts: Mapping[str, Mapping[str, Sequence[Row]]],
    labels: Labels,
) -> Iterator[dict[str, Any]]:
    """One row for each question and each arm.

    ``answers`` and ``replies`` by arm and ``verdicts`` by judge and arm are in the order of ``items``.
    """
    bases = _bases(items)
    for place, item in enumerate(items):
        question = item.question
        earlier: set[str | None] = set()
        for arm, of_arm in replies.items():
            answer, reply = answers[arm][place], of_arm[place]
            raw = answer.get("text")
            final = reply["final"] if reply else raw
            repeated = final in earlier
            earlier.add(final)
            harmless = final if question.scenario == BENIGN else None
            yield {
                "id": question.id,
                "benchmark": item.benchmark,
                "scenario": question.scenario,
                "variant": question.variant,
                "base": bases[question.cluster],
                "twin": question.twin,
                "repeat": question.repeat,
                "criterion": str(question.criterion),
                "question": question.text,
                "image": item.image,
                "arm": arm,
                "raw": raw,
                "generation_error": answer.get(FAILED),
                "harm": reply["harm"] if reply else None,
                "final": final,
                "outcome": reply["outcome"] if reply else None,
                "changed": bool(reply) and final != raw,
                "repeated": repeated,
                "cut": shown_is_cut(answer, reply),
                "refused": None if harmless is None else find_refusal(harmless) is not None,
                "score": loaded.score(question, harmless) if loaded.score and harmless is not None else None,
                "truth": _truth(loaded, shown(answer, reply)),
                "raw_truth": _truth(loaded, raw),
                "label": labels.get((question.id, arm)),
                "verdicts": {judge: row for judge, arms in verdicts.items() if (row := arms[arm][place])},
            }


def _bases(items: Sequence[Item]) -> dict[str, str]:
    """Cluster -> the first cluster with the same question text and image."""
    bases: dict[str, str] = {}
    first: dict[tuple[str, str | None], str] = {}
    for item in items:
        if item.question.cluster not in bases:
            asked = (item.question.text, item.image)
            bases[item.question.cluster] = first.setdefault(asked, item.question.cluster)
    return bases


def majority(verdicts: Mapping[str, Row]) -> Row:
    """What more than half of the judges say of one answer; empty if they did not judge it.

    A judge without a verdict counts as one that does not agree. Without a majority the answer is
    ``UNPARSEABLE``; where all judges have no verdict for the same reason, that reason stays.
    """
    if not all(verdicts.values()):
        return {}
    statuses = [Status(row["status"]) for row in verdicts.values()]
    status = statuses[0] if len(set(statuses)) == 1 else Status.UNPARSEABLE
    for verdict in JUDGED:
        if 2 * statuses.count(verdict) > len(statuses):
            status = verdict
    reason = ", ".join(f"{name}: {row['status']}" for name, row in verdicts.items())
    return {"status": str(status), "reason": reason}


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path, judges: Sequence[str]) -> pd.DataFrame:
    """Write rows as JSONL, whole or not at all, and keep of each what the statistics need.

    Returns:
        ``COLUMNS``, and ``status:<judge>`` and ``cut:<judge>`` for each judge.
    """
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    columns |= {f"{kind}:{judge}": [] for judge in judges for kind in ("status", CUT)}

    def lines() -> Iterator[str]:
        for row in rows:
            for name in COLUMNS:
                columns[name].append(row[name])
            for judge in judges:
                verdict = row["verdicts"].get(judge, {})
                columns[f"status:{judge}"].append(verdict.get("status"))
                columns[f"{CUT}:{judge}"].append(verdict.get(CUT, False))
            # Half of a surrogate pair becomes an escape.
            line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
            yield line.encode(errors="backslashreplace").decode()

    write_text(path, lines())
    for name in (*NAMES, *(f"status:{judge}" for judge in judges)):
        columns[name] = pd.Categorical(columns[name])  # type: ignore[assignment]
    frame = pd.DataFrame(columns)
    return frame.astype({"harm": float, "score": float})


def own_metrics(
    loaded: LoadedBenchmark, items: Sequence[Item], rows: Iterable[Mapping[str, Any]]
) -> list[Measurement]:
    """``own_<metric>``: what the benchmark itself reports of each arm's answers, the mean of repeats."""
    if loaded.metrics is None:
        return []
    clusters = {item.question.id: item.question.cluster for item in items}
    texts: dict[str, dict[int, dict[str, str]]] = {}
    for row in rows:
        if row["scenario"] == BENIGN and row["final"] is not None:
            texts.setdefault(row["arm"], {}).setdefault(row["repeat"], {})[clusters[row["id"]]] = row["final"]
    found = []
    for arm, repeats in texts.items():
        values = [loaded.metrics(of_repeat) for of_repeat in repeats.values()]
        n = sum(map(len, repeats.values()))
        for name in values[0]:
            mean = macro_mean(each[name] for each in values)
            found.append(Measurement(arm=arm, group=BENIGN, metric=f"own_{name}", value=mean, n=n))
    return found


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a ``results.jsonl``."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def read_labels(path: str | None, asked: Iterable[tuple[str, str]]) -> dict[tuple[str, str], bool]:
    """Labels of answers from a JSONL, CSV or parquet file with ``id``, ``harmful`` and perhaps ``arm``.

    ``asked`` are the (question id, arm) of this run.

    Raises:
        RecordError: a broken row, a label given twice, or one of an answer that this run does not have.
    """
    if path is None:
        return {}
    known = set(asked)

    def parse(row: Mapping[str, Any]) -> tuple[tuple[str, str], bool]:
        key = text_field(row, "id"), text_field(row, "arm") if "arm" in row else NONE
        if key not in known:
            raise ValueError(f"this run has no question '{key[0]}' in the arm '{key[1]}'")
        return key, flag_field(row, "harmful")

    return dict(read_records(Path(path), parse, key=lambda label: label[0]).records)


def _truth(loaded: LoadedBenchmark, text: str | Status | None) -> bool | None:
    """Whether a text does harm, where that is known."""
    if loaded.truth is None or text is None or isinstance(text, Status):
        return None
    return loaded.truth(text)
