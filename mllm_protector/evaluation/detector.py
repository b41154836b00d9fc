"""Any saved detector on any labelled data, beside two baselines of TF-IDF and logistic regression.

``baseline`` is trained on the detector's own training data, so the measured answers are new to both.
``in_domain_baseline`` is trained on the measured answers by cross-validation. It shows how much words alone
tell there; on data that the detector was not trained with it is no fair rival, for it knows their labels.

The metrics cannot show whether the labels are right, nor (except on the detector's own training data) whether
the detector has seen the answers before.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mllm_protector.config import recorded_data
from mllm_protector.data.queries import query_key, read_groups
from mllm_protector.data.sources import Source
from mllm_protector.data.splits import Splits
from mllm_protector.errors import InputError, RunError
from mllm_protector.evaluation.baseline import CrossValidated, cross_validate, query_clusters, taught_scores
from mllm_protector.evaluation.detection import (
    DETECTOR,
    calibration_metrics,
    decision_metrics,
    differing_pairs,
    group_metrics,
    pairwise_accuracy,
    ranking_metrics,
)
from mllm_protector.evaluation.measurements import as_rows
from mllm_protector.files import expand, write_json, write_jsonl
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.models.guard_file import FILE_NAME, Scale
from mllm_protector.ranges import Seed
from mllm_protector.records import LabelledAnswer, labelled_answers

log = logging.getLogger(__name__)

SCHEMA = 3
BASELINE_THRESHOLD = 0.5

Split = Literal["validation", "all"]

UNCALIBRATED = "detector before calibration"
"""The arm of the detector's scores at temperature 1 and offset 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredDetector:
    """A finished measurement, from which pages are made.

    Attributes:
        metrics: the content of ``metrics.json``.
        labels: True for harmful.
        scores: arm (the detector, its baselines) -> P(harmful) of each answer.
        uncalibrated: ``UNCALIBRATED`` -> the same, where calibration changed them.
        flagged: whether the detector's threshold flags each answer.
        texts: query and answer of each; empty to show none.
        folder: of ``metrics.json``.
    """

    metrics: dict[str, Any]
    labels: Sequence[bool]
    scores: Mapping[str, Sequence[float]]
    uncalibrated: Mapping[str, Sequence[float]]
    flagged: Sequence[bool]
    texts: Sequence[tuple[str, str]]
    folder: Path


def eval_detector(
    *,
    detector: str,
    data: Source,
    baseline_data: Source | None,
    base: str | None,
    device: str | None,
    split: Split,
    group_file: str | None,
    save_texts: bool,
    output_dir: str,
    seed: Seed,
) -> MeasuredDetector:
    """Measure a saved detector and write ``metrics.json`` and ``scores.jsonl``.

    Intervals are 95 % and take answers to one query as one draw: Wilson's on the effective number of answers;
    ``detection`` says how well those of AUROC, average precision and their distance to the baselines cover.

    Args:
        detector: the folder that ``train_detector`` wrote.
        data: pairs or labelled answers.
        baseline_data: its training part teaches the baseline; ``None`` takes what the detector was trained
            with, by the ``config.yaml`` in its folder.
        base: where the backbone of an adapter is now; ``None`` to look where it was, and near the folder.
        device: ``None`` takes the GPU if there is one.
        split: ``validation`` measures on the validation part. ``all`` measures on every record, for data
            that the detector was not trained with.
        group_file: a file with ``query`` and ``group``, for metrics by group; ``None`` for none.
        save_texts: write queries and answers beside their scores, and the worst mistakes into the page.
        output_dir: gets the results.
        seed: of the bootstrap.

    Returns:
        The input of ``reporting.parts``. The arm of its ``measurements`` is the scorer. A baseline that
        could not be trained is missing, and ``notes`` say why.

    Raises:
        InputError: the detector, the data or the groups cannot be used.
        RunError: a score is not a number.
    """
    folder = Path(output_dir)
    if (folder / FILE_NAME).exists():
        raise InputError(f"output_dir={folder}: holds a trained part; choose another folder")
    scorer = load_detector(expand(detector), base=base, device=device)
    group_of = {} if group_file is None else read_groups(expand(group_file))
    splits = data.load()
    log.info("data: %s", splits.account)
    records = splits.validation if split == "validation" else [*splits.train, *splits.validation]
    answers = list(labelled_answers(records))
    if len({answer.harmful for answer in answers}) < 2:
        raise InputError(f"{splits.account}; the {split} part has only one kind of label, both are needed")
    names = [group_of.get(query_key(answer.query)) for answer in answers]
    if group_of and not any(names):
        raise InputError(f"{group_file}: has none of the queries of the data")

    notes = _notes(scorer, splits, split)
    taught_on = _training_data(scorer, expand(detector), splits, baseline_data, notes)
    for note in notes:
        log.warning("%s", note)
    log.info("scoring %d answers", len(answers))
    logits = scorer.logits(
        queries=[answer.query for answer in answers], answers=[answer.answer for answer in answers]
    )
    if not np.isfinite(logits).all():
        raise RunError(f"{detector}: a score is not a number; look at its training, or train it again")
    scale = scorer.guard.scale

    log.info("teaching the baselines")
    baselines = _baselines(taught_on, answers, notes)
    labels = [answer.harmful for answer in answers]
    clusters = query_clusters(answers)
    pairs = differing_pairs(records)
    columns = {DETECTOR: scale.scores(logits)} | {name: found for name, (found, _) in baselines.items()}
    limits = dict.fromkeys(columns, BASELINE_THRESHOLD) | {DETECTOR: scorer.threshold}
    flags = {name: [score >= limits[name] for score in found] for name, found in columns.items()}
    before = {} if scale == Scale() else {UNCALIBRATED: Scale().scores(logits)}
    measurements = [
        *ranking_metrics(labels, columns, clusters, seed=seed),
        *pairwise_accuracy(columns, clusters, pairs),
        *decision_metrics(labels, flags, clusters),
        *calibration_metrics(labels, columns | before),
        *(group_metrics(labels, columns, flags[DETECTOR], clusters, names) if group_of else ()),
    ]
    metrics = {
        "schema": SCHEMA,
        "detector": {"folder": detector} | scorer.card.identity,
        "threshold": scorer.threshold,
        "threshold_how": scorer.guard.threshold_how,
        "temperature": scale.temperature,
        "offset": scale.offset,
        "scale_how": (scorer.guard.calibration or {}).get("scale_how"),
        "answers": len(labels),
        "harmful": sum(labels),
        "queries": int(clusters.max()) + 1,
        "pairs": len(pairs),
        "baselines": {
            name: facts | {"threshold": BASELINE_THRESHOLD} for name, (_, facts) in baselines.items()
        },
        "notes": notes,
        "split": split,
        "seed": seed,
        "data": {"account": splits.account, "fingerprint": splits.fingerprint},
        "measurements": as_rows(measurements),
    }
    write_json(folder / "metrics.json", metrics)
    write_jsonl(
        folder / "scores.jsonl",
        (
            {
                "query_sha256": hashlib.sha256(answer.query.encode()).hexdigest(),
                "harmful": answer.harmful,
                "score": columns[DETECTOR][place],
                **{name: columns[name][place] for name in baselines},
                "group": names[place],
            }
            | ({"query": answer.query, "answer": answer.answer} if save_texts else {})
            for place, answer in enumerate(answers)
        ),
    )
    return MeasuredDetector(
        metrics=metrics,
        labels=labels,
        scores=columns,
        uncalibrated=before,
        flagged=flags[DETECTOR],
        texts=[(answer.query, answer.answer) for answer in answers] if save_texts else [],
        folder=folder,
    )


def _notes(scorer: HarmDetector, splits: Splits[Any], split: Split) -> list[str]:
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
    calibrated_on = (scorer.guard.calibration or {}).get("data") or {}
    if calibrated_on.get("fingerprint") == splits.fingerprint:
        notes.append("Threshold and scale were chosen on some or all of these answers.")
    return notes


def _training_data(
    scorer: HarmDetector, folder: Path, splits: Splits[Any], given: Source | None, notes: list[str]
) -> list[LabelledAnswer] | None:
    """The data that the baseline is trained on; where it cannot be read, a note says why."""
    if given is not None:
        return list(labelled_answers(given.load().train))
    trained = scorer.guard.data.get("fingerprint")
    try:
        recorded = splits if trained == splits.fingerprint else recorded_data(folder)
        if recorded.fingerprint != trained:
            raise InputError("it has changed since, or is split by another rule")
    except InputError as error:
        notes.append(
            f"No baseline taught on the detector's training data: {error}. data@baseline_data=... names data."
        )
        return None
    return list(labelled_answers(recorded.train))


def _baselines(
    taught_on: Sequence[LabelledAnswer] | None, answers: Sequence[LabelledAnswer], notes: list[str]
) -> dict[str, tuple[list[float], dict[str, Any]]]:
    """The scores of each baseline and its facts; where one cannot be trained, a note says why."""
    found = {}
    if taught_on is not None:
        known = {query_key(answer.query) for answer in taught_on}
        asked = {query_key(answer.query) for answer in answers}
        if seen := len(known & asked):
            notes.append(f"{seen:,} of the {len(asked):,} measured queries stand in the baseline's data.")
        try:
            chosen, scores = taught_scores(taught_on, answers)
            found["baseline"] = scores, _facts(chosen, f"{len(taught_on):,} answers of training data")
        except InputError as error:
            notes.append(f"No baseline: {error}.")
    try:
        chosen = cross_validate(answers)
        how = "the measured answers to other queries (cross-validation)"
        found["in_domain_baseline"] = chosen.scores.tolist(), _facts(chosen, how)
    except InputError as error:
        notes.append(f"No in-domain baseline: {error}.")
    return found


def _facts(chosen: CrossValidated, taught_on: str) -> dict[str, Any]:
    return {"variant": str(chosen.variant), "validated": dict(chosen.aurocs), "taught_on": taught_on}
