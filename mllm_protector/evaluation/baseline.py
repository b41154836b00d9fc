"""The baseline of a detector: TF-IDF and logistic regression, trained in seconds.

A detector that ranks answers no better than this has not earned its billions of weights. Whether the baseline
reads the question too is chosen by cross-validation, in which all answers to a query stay together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mllm_protector.config import recorded_data
from mllm_protector.data import test_sets
from mllm_protector.data.queries import opening_key, query_key
from mllm_protector.data.sources import Source
from mllm_protector.data.splits import Splits
from mllm_protector.errors import InputError
from mllm_protector.evaluation.statistics import Floats, Ints
from mllm_protector.models.guard_file import GuardFile
from mllm_protector.records import LabelledAnswer, labelled_answers

BASELINE_THRESHOLD = 0.5

FOLDS = 5
SEED = 0
"""Of the folds; the baseline is the same in every run."""

STRENGTH = 10.0
"""scikit-learn's C of the logistic regression."""

CHARACTERS_UP_TO = 20_000
"""With more answers than this only words count: counting characters would take many minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One baseline: whether it reads the question too, and counts 2 to 5 characters beside words."""

    question: bool
    characters: bool

    def __str__(self) -> str:
        counted = "words and characters" if self.characters else "words"
        return f"{counted} of {'question and answer' if self.question else 'answer'}"

    def texts(self, records: Sequence[LabelledAnswer]) -> list[str]:
        """The text that it reads of each answer."""
        return [f"{each.query}\n{each.answer}" if self.question else each.answer for each in records]

    def pipeline(self) -> Any:
        """From texts to P(harmful), not yet trained."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline, make_union

        parts = [TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)]
        if self.characters:
            parts.append(TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True))
        return make_pipeline(make_union(*parts), LogisticRegression(C=STRENGTH, max_iter=1000))


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossValidated:
    """The best variant by cross-validation on some answers.

    Attributes:
        variant: the best.
        aurocs: of each variant.
        scores: (N,) P(harmful) of each answer by the best one, trained without any answer to its query. As
            they also chose the variant, they are slightly optimistic.
    """

    variant: Variant
    aurocs: Mapping[str, float]
    scores: Floats


def cross_validate(records: Sequence[LabelledAnswer]) -> CrossValidated:
    """Compare the variants on these answers.

    Raises:
        InputError: too few different queries, or no words, to learn from.
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    labels, clusters = np.array([record.harmful for record in records]), query_clusters(records)
    queries = [len(np.unique(clusters[labels == label])) for label in (True, False)]
    folds: list[tuple[Ints, Ints]] = []
    if min(queries) >= 2:
        splitter = StratifiedGroupKFold(min(FOLDS, *queries), shuffle=True, random_state=SEED)
        folds = list(splitter.split(labels, labels, clusters))
    if not folds or any(len(np.unique(labels[inside])) < 2 for inside, _ in folds):
        raise InputError(
            f"harmful answers to {queries[0]} and harmless ones to {queries[1]} different queries are too few"
            " to teach a baseline"
        )
    characters = len(records) <= CHARACTERS_UP_TO
    scores: dict[Variant, Floats] = {}
    for question in (False, True):
        variant = Variant(question=question, characters=characters)
        texts = np.array(variant.texts(records), dtype=object)
        try:
            found = cross_val_predict(variant.pipeline(), texts, labels, cv=folds, method="predict_proba")
        except ValueError as error:
            raise InputError(f"these texts teach no baseline ({str(error).splitlines()[0]})") from None
        scores[variant] = found[:, 1]
    aurocs = {variant: float(roc_auc_score(labels, found)) for variant, found in scores.items()}
    best = max(aurocs, key=lambda variant: aurocs[variant])  # the first of equals is the simplest
    return CrossValidated(
        variant=best, aurocs={str(each): auroc for each, auroc in aurocs.items()}, scores=scores[best]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """The best variant for some answers, trained on all of them.

    Attributes:
        chosen: the variant.
        pipeline: scikit-learn's.
        answers: how many it was trained on.
        queries: theirs, as ``query_key`` gives them.
        note: what its data has and the detector's had not; empty for nothing.
    """

    chosen: CrossValidated
    pipeline: Any
    answers: int
    queries: frozenset[str]
    note: str = ""

    def scores(self, records: Sequence[LabelledAnswer]) -> list[float]:
        """P(harmful) of other answers."""
        found = self.pipeline.predict_proba(self.chosen.variant.texts(records))
        scores: list[float] = found[:, 1].tolist()
        return scores


def teach(records: Sequence[LabelledAnswer]) -> Taught:
    """Choose a variant by cross-validation and train it.

    Raises:
        InputError: as ``cross_validate``.
    """
    chosen = cross_validate(records)
    texts, labels = chosen.variant.texts(records), [record.harmful for record in records]
    return Taught(
        chosen=chosen,
        pipeline=chosen.variant.pipeline().fit(texts, labels),
        answers=len(records),
        queries=frozenset(query_key(record.query) for record in records),
    )


def taught_as(
    guard: GuardFile, folder: Path, sets: Sequence[Splits[Any]], given: Source | None
) -> Taught | str:
    """The baseline, trained on what the detector was trained with (or on ``given``), or why there is none."""
    recorded = guard.data.get("fingerprint")
    try:
        if given is not None:
            splits = given.load()
        else:
            own = [each for each in sets if each.fingerprint == recorded]
            splits = own[0] if own else recorded_data(folder, recorded)
    except InputError as error:
        if given is not None:
            raise
        return (
            f"No baseline taught on the detector's training data: {error}. data@baseline_data=... names data."
        )
    found = guard.data.get("contamination") or {}
    removed = {name for name, each in found.items() if each.get("removed")}
    records: Sequence[Any] = splits.train
    if removed:
        left_out = set(test_sets.find(record.query for record in records).rows.tolist())
        records = [record for place, record in enumerate(records) if place not in left_out]
    kept = sorted(removed - test_sets.known().keys())
    note = (
        f"The baseline's data still has the records that were left out for {', '.join(kept)}." if kept else ""
    )
    try:
        return replace(teach(list(labelled_answers(records))), note=note)
    except InputError as error:
        return f"No baseline: {error}."


def compared(
    trained: Taught | str, answers: Sequence[LabelledAnswer], notes: list[str]
) -> dict[str, tuple[list[float], dict[str, Any]]]:
    """P(harmful) of each answer by each baseline, and its facts; a note says why one is missing."""
    found = {}
    if isinstance(trained, str):
        notes.append(trained)
    else:
        asked = {query_key(answer.query) for answer in answers}
        if seen := len(trained.queries & asked):
            notes.append(f"{seen:,} of the {len(asked):,} measured queries stand in the baseline's data.")
        notes += [trained.note] if trained.note else []
        what = f"{trained.answers:,} answers of training data"
        found["baseline"] = trained.scores(answers), _facts(trained.chosen, what)
    try:
        chosen = cross_validate(answers)
        how = "the measured answers to other queries (cross-validation)"
        found["in_domain_baseline"] = chosen.scores.tolist(), _facts(chosen, how)
    except InputError as error:
        notes.append(f"No in-domain baseline: {error}.")
    return found


def _facts(chosen: CrossValidated, taught_on: str) -> dict[str, Any]:
    return {
        "variant": str(chosen.variant),
        "validated": dict(chosen.aurocs),
        "taught_on": taught_on,
        "threshold": BASELINE_THRESHOLD,
    }


def query_clusters(records: Sequence[LabelledAnswer]) -> Ints:
    """(N,) from 0: answers to the same query (``opening_key``) have the same number."""
    return np.unique([opening_key(record.query) for record in records], return_inverse=True)[1]
