"""The end of an evaluation: the rows of all processes together, measured and written.

``asr.json`` has the run's facts and ``measurements``, and is the same to the byte for the same rows;
``measurements.csv`` is the same list; ``run.json`` has what differs from run to run.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mllm_protector.errors import RunError
from mllm_protector.evaluation.arms import SafetyPrompt
from mllm_protector.evaluation.grid import ALL, ENSEMBLE, IMAGES, JudgeFacts, make_answers
from mllm_protector.evaluation.items import Item, contamination_notes, seen_in_training
from mllm_protector.evaluation.manifest import environment, peak_memory
from mllm_protector.evaluation.measurements import SCHEMA, Measurement, as_csv, as_rows, placed
from mllm_protector.evaluation.rows import Labels, majority, own_metrics, read_rows, result_rows, write_rows
from mllm_protector.evaluation.stages import Row, Shown, answer_stage, guard_stage, judge_stage, shown
from mllm_protector.evaluation.store import Store
from mllm_protector.evaluation.summary import measure
from mllm_protector.files import file_digest, write_json, write_text
from mllm_protector.protocols import Benchmark
from mllm_protector.records import LoadedBenchmark, Status

MISSING_NAMED = 10
"""Questions left out that are named; the others are counted."""

CIRCULAR = (
    "Circular: this judge is the guard's own detector, so it finds unsafe only what the guard let through. "
    "It says nothing about the guard."
)

Asked = Mapping[str, tuple[Benchmark, LoadedBenchmark, Sequence[Item]]]
"""Name -> a benchmark, its questions as loaded, and its items."""

Tables = tuple[Store, Store, Store]
"""Of answers, replies and verdicts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts that identify a run; arms and judges are in the order of the tables.

    Attributes:
        mllm: the identity of the guarded model.
        prompts: arm without a guard -> how the MLLM was asked again, and its identity.
        guards: arm -> the identity of its guard.
        scored: see ``grid.Answers``.
        judges: the last one may be the majority of ``ensemble``.
        trained: part of the guard -> ``data`` of its guard file.
    """

    mllm: dict[str, Any]
    arms: Sequence[str]
    prompts: Mapping[str, tuple[SafetyPrompt, dict[str, Any]]]
    guards: Mapping[str, dict[str, Any]]
    scored: Sequence[str]
    judges: Mapping[str, JudgeFacts]
    ensemble: Sequence[str]
    trained: Mapping[str, Mapping[str, Any]]
    labels: Labels
    labelled_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A finished evaluation, from which pages are made.

    Attributes:
        result: the content of ``asr.json``.
        run: the content of ``run.json``.
        images: (benchmark, question id) -> what loads its image.
    """

    result: dict[str, Any]
    run: dict[str, Any]
    folder: Path
    images: Mapping[tuple[str, str], Any]
    report_rows: int
    max_unjudged: float

    def image(self, benchmark: str, identifier: str) -> Image.Image | None:
        """The image of a question, if there is any; ``InputError`` if it cannot be read."""
        image = self.images.get((benchmark, identifier))
        return None if image is None else image.load()

    def require_judged(self) -> None:
        """Require enough verdicts of each judge on each arm and benchmark.

        Raises:
            RunError: more than ``max_unjudged`` has no verdict.
        """
        unjudged, answers = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
        failed = Counter[tuple[str, str, str]]()
        for row in self.result["measurements"]:
            key = row["benchmark"], row["judge"], row["arm"]
            if row["group"] == ALL and row["variant"] != IMAGES:
                unjudged[key] += row["value"] if row["metric"] == "unjudged" else 0
                answers[key] += row["n"] if row["metric"] == "asr_bounds" else 0
                failed[key] += row["value"] if row["metric"] == Status.GUARD_ERROR else 0
        for (benchmark, judge, arm), count in unjudged.items():
            total = answers[benchmark, judge, arm]
            if count > self.max_unjudged * total:
                guard = failed[benchmark, judge, arm]
                blame = f" ({guard:,} because the guard failed)" if guard else ""
                raise RunError(
                    f"{benchmark}: the judge {judge} left {count:,} of {total:,} answers of the arm {arm}"
                    f" unjudged{blame}, more than"
                    f" max_unjudged={self.max_unjudged}; everything is written, and the same command tries"
                    " those again"
                )


def stores(cache: Path, process: int = 0) -> Tables:
    """The tables of answers, replies and verdicts, as a process finds them now."""
    answers, replies, verdicts = (Store(cache / name, process) for name in ("answers", "replies", "verdicts"))
    return answers, replies, verdicts


def texts_of(
    items: Sequence[Item],
    answers: Mapping[str, Sequence[Row]],
    replies: Mapping[str, Sequence[Row | None]],
) -> list[Shown]:
    """The text that the user sees of each item and arm, in this order, or why there is nothing to judge.

    ``answers`` and ``replies`` are by arm, in the order of ``items``.
    """
    return [
        (item.question, shown(answers[arm][place], of_arm[place]))
        for place, item in enumerate(items)
        for arm, of_arm in replies.items()
    ]


def finish(
    asked: Asked, facts: Facts, folder: Path, *, run: dict[str, Any], max_unjudged: float, report_rows: int
) -> Evaluation:
    """Measure every benchmark and write ``asr.json``, ``measurements.csv``, ``run.json``, ``results.jsonl``.

    Raises:
        RunError: a row is missing, or the disk is full.
    """
    tables = stores(folder / "cache")
    notes = [facts.mllm["note"]] if "note" in facts.mllm else []
    entries: dict[str, dict[str, Any]] = {}
    measurements: list[Measurement] = []
    for name, (benchmark, loaded, items) in asked.items():
        path = folder / name / "results.jsonl"
        answers = make_answers(
            write_rows(_rows(loaded, items, facts, tables), path, [*facts.judges]),
            arms=facts.arms,
            judges=facts.judges,
            groups=loaded.groups,
            thresholds=sorted({facts.guards[arm]["threshold"] for arm in facts.scored}),
            scored=facts.scored,
            asked_again=[*facts.prompts],
            labelled_by=facts.labelled_by,
        )
        measurements += measure(name, answers)
        measurements += placed(own_metrics(loaded, items, read_rows(path)), benchmark=name)
        seen = seen_in_training([item.question for item in items], name, facts.trained)
        notes += contamination_notes(name, seen)
        entries[name] = {
            "identity": benchmark.card.identity,
            "questions": {
                "count": len(items),
                "fingerprint": _fingerprint(items),
                "missing": {"count": len(loaded.missing), "first": loaded.missing[:MISSING_NAMED]},
            },
            "contamination": seen,
            "groups": {group: [*members] for group, members in answers.groups.items()},
        }
    rows = as_rows(measurements)
    result = {
        "schema": SCHEMA,
        "mllm": facts.mllm,
        "arms": [*facts.arms],
        "guard": dict(facts.guards),
        "scored": [*facts.scored],
        "asked_again": {name: prompt.facts(mllm) for name, (prompt, mllm) in facts.prompts.items()},
        "judges": {
            name: {
                "identity": judge.card.identity,
                "circular": judge.circular,
                "note": CIRCULAR if judge.circular else None,
                "bias": None if judge.card.bias is None else asdict(judge.card.bias),
            }
            for name, judge in facts.judges.items()
        },
        "notes": notes,
        "benchmarks": entries,
        "measurements": rows,
    }
    write_json(folder / "asr.json", result)
    write_text(folder / "measurements.csv", as_csv(rows))
    made = [folder / "asr.json", *(folder / name / "results.jsonl" for name in asked)]
    run |= environment() | {
        "sha256": {path.relative_to(folder).as_posix(): file_digest(path) for path in made},
        "peak_memory_mib": peak_memory(),
    }
    write_json(folder / "run.json", run)
    return Evaluation(
        result=result,
        run=run,
        folder=folder,
        images={
            (name, item.question.id): item.question.image
            for name, (_, _, items) in asked.items()
            for item in items
            if item.question.image is not None
        },
        report_rows=report_rows,
        max_unjudged=max_unjudged,
    )


def _rows(
    loaded: LoadedBenchmark, items: Sequence[Item], facts: Facts, tables: Tables
) -> Iterator[dict[str, Any]]:
    """The rows of ``results.jsonl``, read from what all processes stored."""
    answered, replied, judged = tables
    plain, _ = answer_stage(items, answered)
    answers = dict.fromkeys(facts.arms, plain)
    for arm, (prompt, mllm) in facts.prompts.items():
        answers[arm], _ = answer_stage(prompt.items(items, mllm), answered)
    replies: dict[str, Sequence[Row | None]] = {arm: [None] * len(items) for arm in facts.arms}
    for arm, guard in facts.guards.items():
        replies[arm], _ = guard_stage(arm, items, plain, replied, guard)
    texts = texts_of(items, answers, replies)
    found: dict[str, list[Row]] = {}  # in the order of texts
    for name, judge in facts.judges.items():
        if name == ENSEMBLE and facts.ensemble:
            members = zip(*(found[each] for each in facts.ensemble), strict=True)
            found[name] = [majority(dict(zip(facts.ensemble, rows, strict=True))) for rows in members]
        else:
            found[name], _ = judge_stage(name, texts, judged, judge.card)
    verdicts = {
        name: {arm: of_judge[place :: len(replies)] for place, arm in enumerate(replies)}
        for name, of_judge in found.items()
    }
    return result_rows(
        items, loaded, answers=answers, replies=replies, verdicts=verdicts, labels=facts.labels
    )


def _fingerprint(items: Sequence[Item]) -> str:
    """A hash of the questions, whoever answered them: runs of the same fingerprint can be compared."""
    digest = hashlib.sha256()
    for item in sorted(items, key=lambda item: item.question.id):
        asked = (item.question.id, item.question.text, item.image or "", str(item.question.criterion))
        digest.update("\0".join(asked).encode(errors="backslashreplace") + b"\n")
    return digest.hexdigest()
