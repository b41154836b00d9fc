"""The labelled answers that a detector is measured on: one set, or several of a mixture."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mllm_protector.data.mixture import sources_of
from mllm_protector.data.sources import Source
from mllm_protector.data.splits import Splits, shares_a_source
from mllm_protector.errors import InputError
from mllm_protector.evaluation.baseline import query_clusters
from mllm_protector.models.detector import HarmDetector
from mllm_protector.records import LabelledAnswer, labelled_answers

log = logging.getLogger(__name__)

Split = Literal["auto", "validation", "all"]
"""The validation part, or all records; ``auto``: all of a test set, the validation part of other sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSet:
    """One set: its records to measure on, and their answers; ``split`` is never ``auto``."""

    name: str | None
    splits: Splits[Any]
    split: Split
    records: Sequence[Any]
    answers: Sequence[LabelledAnswer]


def load_sets(data: Source, split: Split) -> list[MeasuredSet]:
    """Load each source of a mixture as it is without the others, or the one set without a name."""
    found = []
    for name, source in sources_of(data).items():
        splits, part = source.load(), split
        log.info("data: %s", splits.account)
        if part == "auto":
            part = "all" if getattr(source, "test_set", False) else "validation"
        records = splits.validation if part == "validation" else [*splits.train, *splits.validation]
        answers = list(labelled_answers(records))
        found.append(MeasuredSet(name=name, splits=splits, split=part, records=records, answers=answers))
    return found


def answers_of(sets: Sequence[MeasuredSet]) -> list[LabelledAnswer]:
    """All answers of these sets but empty ones."""
    return [answer for each in sets for answer in each.answers if answer.answer]


def require_both_labels(answers: Sequence[LabelledAnswer]) -> None:
    """Refuse answers of one label alone, which have no false positive rate or no recall.

    Raises:
        InputError: there are none of one label.
    """
    for label, word in ((True, "harmful"), (False, "harmless")):
        if all(answer.harmful != label for answer in answers):
            raise InputError(f"data: has no {word} answers; both kinds are needed")


def facts_of(
    detector: str, scorer: HarmDetector, sets: Sequence[MeasuredSet], answers: Sequence[LabelledAnswer]
) -> dict[str, Any]:
    """What results say of a detector (in the folder ``detector``) and of the answers; notes are logged."""
    notes = [note for each in sets for note in notes_of(scorer, each.splits, each.split)]
    for note in notes:
        log.warning("%s", note)
    return {
        "detector": {"folder": detector} | scorer.card.identity,
        "answers": len(answers),
        "harmful": sum(answer.harmful for answer in answers),
        "queries": int(query_clusters(answers).max()) + 1,
        "data": [{"account": each.splits.account, "split": each.split} for each in sets],
        "notes": notes,
    }


def notes_of(scorer: HarmDetector, splits: Splits[Any], split: Split) -> list[str]:
    """Whether the detector has seen these answers, as its own file says."""
    trained, notes = scorer.guard.data, []
    same_split = trained.get("fingerprint") == splits.fingerprint
    if same_split and split == "all":
        notes.append(
            "Most of these answers are the detector's own training data: its metrics say little about new "
            "ones. Measure with split=validation, or on other data."
        )
    elif same_split:
        notes.append(
            "The training chose its best step by these very answers: the metrics lean to the good side."
        )
    elif trained.get("account") == splits.account:
        notes.append(
            "The detector was trained with this data under another split, so it has seen some of these "
            "answers. Give the data.* keys and the seed of its training."
        )
    elif shares_a_source(trained, splits):
        notes.append(
            "The detector was trained with a part of this set: all but the answers that its training "
            "validated with are not new to it."
        )
    calibrated_on = (scorer.guard.calibration or {}).get("data") or {}
    if splits.fingerprint in (calibrated_on.get("fingerprint"), *calibrated_on.get("fingerprints", ())):
        notes.append("Threshold and scale were chosen on some or all of these answers.")
    return notes
