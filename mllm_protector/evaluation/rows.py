"""The results one by one: ``results.jsonl`` for people and programs, a lean table for the statistics.

The fields of a line are described in docs/evaluation.md.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_protector.evaluation.ensemble import ENSEMBLE, majority
from mllm_protector.evaluation.judging import Judged
from mllm_protector.evaluation.stages import BARE, CUT, Item, Outputs
from mllm_protector.evaluation.statistics import macro_mean
from mllm_protector.evaluation.store import FAILED
from mllm_protector.files import write_text
from mllm_protector.judges.keyword import find_refusal
from mllm_protector.reading import flag_field, read_records, text_field
from mllm_protector.records import BENIGN, LoadedBenchmark, Status

if TYPE_CHECKING:
    import pandas as pd

HumanLabels = Mapping[tuple[str, str], bool]
"""(question id, arm) -> whether people find the answer harmful."""

COLUMNS = (
    "id",
    "base",
    "scenario",
    "variant",
    "criterion",
    "arm",
    "outcome",
    "harm",
    "changed",
    "repeated",
    "cut",
    "refused",
    "score",
    "truth",
    "raw_truth",
    "human",
)
"""Of the table, beside ``status:<judge>`` and ``cut:<judge>`` for each judge."""


def result_rows(
    items: Sequence[Item],
    loaded: LoadedBenchmark,
    *,
    arms: Sequence[str],
    outputs: Outputs,
    judged: Mapping[str, Judged],
    ensemble: Sequence[str],
    human: HumanLabels,
) -> Iterator[dict[str, Any]]:
    """One row for each question of a benchmark and each arm, in this order.

    Raises:
        RunError: something was never answered, guarded or judged.
    """
    bases = _bases(items)
    for item in items:
        question, answer = item.question, outputs.answer(item)
        before: set[str | None] = set()
        for arm in arms:
            final, reply = outputs.final(item, arm), outputs.reply(item, arm)
            shown = reply["final"] if reply else answer.get("text")
            repeated = shown in before
            before.add(shown)
            benign = question.scenario == BENIGN
            verdicts = {} if benign else {name: each.verdict(item, arm) for name, each in judged.items()}
            if verdicts and ensemble:
                verdicts[ENSEMBLE] = _together({name: verdicts[name] for name in ensemble})
            told = shown if benign and isinstance(shown, str) else None
            yield {
                "id": question.id,
                "benchmark": item.benchmark,
                "scenario": question.scenario,
                "variant": question.variant,
                "base": bases[question.cluster],
                "repeat": question.repeat,
                "criterion": str(question.criterion),
                "question": question.text,
                "image": item.image,
                "arm": arm,
                "raw": answer.get("text"),
                "generation_error": answer.get(FAILED),
                "harm": reply["harm"] if reply else None,
                "final": shown,
                "outcome": reply["outcome"] if reply else None,
                "changed": bool(reply) and shown != answer.get("text"),
                "repeated": repeated,
                "cut": outputs.cut(item, arm),
                "refused": find_refusal(told) is not None if told is not None else None,
                "score": loaded.score(question, told) if told is not None and loaded.score else None,
                "truth": _truth(loaded, final),
                "raw_truth": _truth(loaded, answer.get("text")),
                "human": human.get((question.id, arm)),
                "verdicts": verdicts,
            }


def _bases(items: Sequence[Item]) -> dict[str, str]:
    """Of each cluster its name: that of an earlier one that begins with the same words and picture."""
    bases: dict[str, str] = {}
    first: dict[tuple[str, str | None], str] = {}
    for item in items:
        if item.question.cluster not in bases:
            asked = (item.question.text, item.image)
            bases[item.question.cluster] = first.setdefault(asked, item.question.cluster)
    return bases


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path, judges: Sequence[str]) -> "pd.DataFrame":
    """Write rows as JSONL, whole or not at all, and keep of each what the statistics need.

    Returns:
        ``COLUMNS``, and ``status:<judge>`` and ``cut:<judge>`` for each judge.
    """
    import pandas as pd

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
    names = ("id", "base", "scenario", "variant", "criterion", "arm", "outcome")
    for name in (*names, *(f"status:{judge}" for judge in judges)):
        columns[name] = pd.Categorical(columns[name])  # type: ignore[assignment]
    frame = pd.DataFrame(columns)
    return frame.astype({"harm": float, "score": float})


def own_metrics(loaded: LoadedBenchmark, rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the benchmark itself reports of each arm's answers; of several repeats the mean.

    Returns:
        arm -> metric -> value, or ``None`` where it cannot be computed; empty if there are no such metrics.
    """
    if loaded.metrics is None:
        return {}
    told: dict[str, dict[int, dict[str, str]]] = {}
    for row in rows:
        if row["scenario"] == BENIGN and row["final"] is not None:
            told.setdefault(row["arm"], {}).setdefault(row["repeat"], {})[row["base"]] = row["final"]
    found = {arm: [loaded.metrics(texts) for texts in repeats.values()] for arm, repeats in told.items()}
    return {
        arm: {name: macro_mean(repeat[name] for repeat in repeats) for name in repeats[0]}
        for arm, repeats in found.items()
    }


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a ``results.jsonl``."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def read_human_labels(path: str | None, asked: Iterable[tuple[str, str]]) -> dict[tuple[str, str], bool]:
    """People's labels from a JSONL, CSV or parquet file with ``id``, ``harmful`` and perhaps ``arm``.

    Args:
        path: the file; ``None`` for no labels.
        asked: the (question id, arm) of this run.

    Raises:
        RecordError: a broken row, a label given twice, or one of an answer that this run does not have.
    """
    if path is None:
        return {}
    known = set(asked)

    def parse(row: Mapping[str, Any]) -> tuple[tuple[str, str], bool]:
        key = text_field(row, "id"), text_field(row, "arm") if "arm" in row else BARE
        if key not in known:
            raise ValueError(f"this run has no question '{key[0]}' in the arm '{key[1]}'")
        return key, flag_field(row, "harmful")

    return dict(read_records(Path(path), parse, key=lambda label: label[0]).records)


def _truth(loaded: LoadedBenchmark, text: str | Status | None) -> bool | None:
    """Whether a text does harm, where that is known."""
    if loaded.truth is None or text is None or isinstance(text, Status):
        return None
    return loaded.truth(text)


def _together(verdicts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    statuses = {name: Status(verdict["status"]) for name, verdict in verdicts.items()}
    said = ", ".join(f"{name}: {status}" for name, status in statuses.items())
    return {"status": str(majority([*statuses.values()])), "reason": said}
