"""Any saved detector on any labelled data, beside a floor of word counts that was learned on the same data.

It measures how answers are ordered, what the stored threshold does, and how far the scores can be taken as
probabilities. It does not know whether the labels are right, nor (unless the data are the very ones that
the detector was trained with) whether the detector has seen the answers before.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mllm_protector.data.groups import read_groups
from mllm_protector.data.sources import Source
from mllm_protector.data.splits import Splits, same_query
from mllm_protector.errors import InputError, RunError
from mllm_protector.evaluation.detection import differing_pairs, figures_by_group, figures_of_all
from mllm_protector.evaluation.floor import (
    cross_fitted_scores,
    fit_floor,
    query_clusters,
)
from mllm_protector.evaluation.reporting.detector import Measured, page, print_summary
from mllm_protector.files import expand, write_json, write_jsonl, write_text
from mllm_protector.metrics import expected_calibration_error
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.models.guard_file import FILE_NAME
from mllm_protector.records import LabelledAnswer, labelled_answers
from mllm_protector.scaling import Scale

log = logging.getLogger(__name__)

SCHEMA = 1
FLOOR_THRESHOLD = 0.5

Split = Literal["validation", "all"]


def eval_detector(
    *,
    detector: str,
    data: Source,
    base: str | None,
    device: str | None,
    split: Split,
    group_file: str | None,
    save_texts: bool,
    output_dir: str,
    seed: int,
) -> dict[str, Any]:
    """Measure a saved detector and write ``metrics.json``, ``scores.jsonl`` and ``report.html``.

    Intervals are 95 % and take answers to one query as one draw: Wilson's on the effective number of answers;
    ``ranking`` says how well those of AUROC, average precision and their distance to the floor cover.

    Args:
        detector: the folder that ``train_detector`` wrote.
        data: pairs or labelled answers; the floor learns from their training part.
        base: where the backbone of an adapter is now, if not where it was at training.
        device: ``None`` takes the GPU if there is one.
        split: ``validation`` measures on the validation part. ``all`` measures on every record, for data
            that the detector was not trained with; each answer is then scored by a floor that was trained on
            the other queries.
        group_file: a file with ``query`` and ``group``, for a table by group and for the thresholds that the
            detector has for groups; ``None`` for neither.
        save_texts: write queries and answers beside their scores, and the worst mistakes into the page.
        output_dir: gets the results.
        seed: of the bootstrap.

    Returns:
        The content of ``metrics.json``: the detector's figures, and the floor's under ``floor``.

    Raises:
        InputError: the detector, the data or the groups cannot be used.
        RunError: a score is not a number.
    """
    folder = Path(output_dir)
    if (folder / FILE_NAME).exists():
        raise InputError(f"output_dir={folder}: holds a trained part; choose another folder")
    group_of = {} if group_file is None else read_groups(expand(group_file))
    splits = data.load()
    log.info("data: %s", splits.account)
    records = splits.validation if split == "validation" else [*splits.train, *splits.validation]
    answers = list(labelled_answers(records))
    if len({answer.harmful for answer in answers}) < 2:
        raise InputError(f"{splits.account}; the {split} part has only one kind of label, both are needed")
    names = [group_of.get(same_query(answer.query)) for answer in answers]
    if group_of and not any(names):
        raise InputError(f"{group_file}: has none of the queries of the data")

    scorer = load_detector(expand(detector), base=base, device=device)
    notes = _notes(scorer, splits, split)
    for note in notes:
        log.warning("%s", note)
    log.info("scoring %d answers", len(answers))
    logits = scorer.logits(
        queries=[answer.query for answer in answers], answers=[answer.answer for answer in answers]
    )
    if not np.isfinite(logits).all():
        raise RunError(f"{detector}: a score is not a number; look at its training, or train it again")
    scale = scorer.guard.scale
    scores, uncalibrated = scale.scores(logits), Scale().scores(logits)
    limits = [scorer.group_thresholds.get(name or "", scorer.threshold) for name in names]

    log.info("training the floor")
    floor_scores, floor_facts = _floor(splits, answers, split, notes)
    labels = [answer.harmful for answer in answers]
    clusters = query_clusters(answers)
    pairs = differing_pairs(records)
    columns = {"detector": scores} | ({} if floor_scores is None else {"floor": floor_scores})
    flags = {
        "detector": [score >= limit for score, limit in zip(scores, limits, strict=True)],
        "floor": [score >= FLOOR_THRESHOLD for score in floor_scores or []],
    }
    figures, against = figures_of_all(labels, columns, flags, clusters, pairs, seed=seed)
    metrics = {
        "schema": SCHEMA,
        **figures["detector"],
        "threshold": scorer.threshold,
        "threshold_how": scorer.guard.threshold_how,
        "group_thresholds": dict(scorer.group_thresholds),
        "temperature": scale.temperature,
        "offset": scale.offset,
        "scale_how": (scorer.guard.calibration or {}).get("scale_how"),
        "ece_before_calibration": expected_calibration_error(labels, uncalibrated),
        "brier_before_calibration": float(np.mean((np.array(uncalibrated) - labels) ** 2)),
        "answers": len(labels),
        "harmful": sum(labels),
        "queries": int(clusters.max()) + 1,
        "pairs": len(pairs),
        "floor": floor_facts | figures["floor"] | {"threshold": FLOOR_THRESHOLD} if floor_facts else None,
        "against_floor": against,
        "groups": figures_by_group(labels, columns, flags["detector"], clusters, names) if group_of else [],
        "notes": notes,
        "split": split,
        "seed": seed,
        "data": {"account": splits.account, "fingerprint": splits.fingerprint},
        "detector": {"folder": detector} | scorer.identity(),
    }
    floor_column: Sequence[float | None] = floor_scores or [None] * len(answers)
    write_json(folder / "metrics.json", metrics)
    write_jsonl(
        folder / "scores.jsonl",
        (
            {
                "query_sha256": hashlib.sha256(answer.query.encode()).hexdigest(),
                "harmful": answer.harmful,
                "score": score,
                "floor": floor_score,
                "group": name,
            }
            | ({"query": answer.query, "answer": answer.answer} if save_texts else {})
            for answer, score, floor_score, name in zip(answers, scores, floor_column, names, strict=True)
        ),
    )
    measured = Measured(
        metrics=metrics,
        labels=labels,
        scores=columns,
        uncalibrated=uncalibrated,
        flagged=flags["detector"],
        texts=[(answer.query, answer.answer) for answer in answers] if save_texts else [],
    )
    write_text(folder / "report.html", page(measured))
    print_summary(metrics)
    log.info("written: %s (metrics.json, scores.jsonl, report.html)", folder)
    return metrics


def _notes(scorer: HarmDetector, splits: Splits[Any], split: Split) -> list[str]:
    """What the detector's own file says about having seen these answers."""
    trained, notes = scorer.guard.data, []
    same_split = trained.get("fingerprint") == splits.fingerprint
    if same_split and split == "all":
        notes.append(
            "Most of these answers are the detector's own training data: its figures say little about new "
            "ones. Measure with split=validation, or on other data."
        )
    elif same_split:
        notes.append(
            "The training chose its best step by these very answers: the figures lean to the good side."
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


def _floor(
    splits: Splits[Any], answers: Sequence[LabelledAnswer], split: Split, notes: list[str]
) -> tuple[list[float] | None, dict[str, Any] | None]:
    """The floor's scores and what it is; where it cannot be trained, a note says why."""
    try:
        if split == "all":
            return cross_fitted_scores(answers), {
                "variant": "chosen anew for each fold",
                "validated": {},
                "trained_on": "the answers to other queries",
            }
        train = list(labelled_answers(splits.train))
        floor = fit_floor(train)
    except InputError as error:
        notes.append(f"No floor: {error}.")
        return None, None
    return floor.score(answers), {
        "variant": str(floor.variant),
        "validated": dict(floor.validated),
        "trained_on": f"{len(train):,} answers of the training part",
    }
