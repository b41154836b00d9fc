"""Any saved detector on any labelled data, beside two baselines of TF-IDF and logistic regression.

``baseline`` is taught on the detector's own training data, so both meet the measured answers as strangers.
``in_domain_baseline`` is taught on the measured answers by cross-validation. It says what words alone tell
there; on data that the detector was not trained with it is no fair rival, for it knows their labels.

The module measures how answers are ordered, what the stored threshold does, and how far the scores can be
taken as probabilities. It does not know whether the labels are right, nor (unless the data are the very ones
that the detector was trained with) whether the detector has seen the answers before.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mllm_protector.config import recorded_data
from mllm_protector.data.groups import read_groups
from mllm_protector.data.queries import query_key
from mllm_protector.data.sources import Source
from mllm_protector.data.splits import Splits
from mllm_protector.errors import InputError, RunError
from mllm_protector.evaluation.baseline import CrossValidated, cross_validate, query_clusters, taught_scores
from mllm_protector.evaluation.detection import differing_pairs, figures_by_group, figures_of_all
from mllm_protector.files import expand, write_json, write_jsonl, write_text
from mllm_protector.metrics import expected_calibration_error
from mllm_protector.models.detector import HarmDetector, load_detector
from mllm_protector.models.guard_file import FILE_NAME
from mllm_protector.models.scale import Scale
from mllm_protector.ranges import Seed
from mllm_protector.records import LabelledAnswer, labelled_answers
from mllm_protector.reporting.detector import Measured, document, page, print_summary

log = logging.getLogger(__name__)

SCHEMA = 2
BASELINE_THRESHOLD = 0.5

Split = Literal["validation", "all"]


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
) -> dict[str, Any]:
    """Measure a saved detector: ``metrics.json``, ``scores.jsonl``, ``report.md`` and ``report.html``.

    Intervals are 95 % and take answers to one query as one draw: Wilson's on the effective number of answers;
    ``ranking`` says how well those of AUROC, average precision and their distance to the baselines cover.

    Args:
        detector: the folder that ``train_detector`` wrote.
        data: pairs or labelled answers.
        baseline_data: its training part teaches the baseline; ``None`` takes what the detector was trained
            with, by the ``config.yaml`` in its folder.
        base: where the backbone of an adapter is now; ``None`` to look where it was, and near the folder.
        device: ``None`` takes the GPU if there is one.
        split: ``validation`` measures on the validation part. ``all`` measures on every record, for data
            that the detector was not trained with.
        group_file: a file with ``query`` and ``group``, for a table by group and for the thresholds that the
            detector has for groups; ``None`` for neither.
        save_texts: write queries and answers beside their scores, and the worst mistakes into the page.
        output_dir: gets the results.
        seed: of the bootstrap.

    Returns:
        The content of ``metrics.json``: the detector's figures, and those of the baselines under
        ``baselines``; one that could not be taught is missing there, and ``notes`` say why.

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
    scores, uncalibrated = scale.scores(logits), Scale().scores(logits)
    limits = [scorer.threshold] * len(answers)

    log.info("teaching the baselines")
    baselines = _baselines(taught_on, answers, notes)
    labels = [answer.harmful for answer in answers]
    clusters = query_clusters(answers)
    pairs = differing_pairs(records)
    columns = {"detector": scores} | {name: found for name, (found, _) in baselines.items()}
    flags = {name: [score >= BASELINE_THRESHOLD for score in found] for name, found in columns.items()} | {
        "detector": [score >= limit for score, limit in zip(scores, limits, strict=True)]
    }
    figures, against = figures_of_all(labels, columns, flags, clusters, pairs, seed=seed)
    metrics = {
        "schema": SCHEMA,
        **figures["detector"],
        "threshold": scorer.threshold,
        "threshold_how": scorer.guard.threshold_how,
        "group_thresholds": {},
        "temperature": scale.temperature,
        "offset": scale.offset,
        "scale_how": (scorer.guard.calibration or {}).get("scale_how"),
        "ece_before_calibration": expected_calibration_error(labels, uncalibrated),
        "brier_before_calibration": float(np.mean((np.array(uncalibrated) - labels) ** 2)),
        "answers": len(labels),
        "harmful": sum(labels),
        "queries": int(clusters.max()) + 1,
        "pairs": len(pairs),
        "baselines": {
            name: facts | figures[name] | {"threshold": BASELINE_THRESHOLD}
            for name, (_, facts) in baselines.items()
        },
        "against": against,
        "groups": figures_by_group(labels, columns, flags["detector"], clusters, names) if group_of else [],
        "notes": notes,
        "split": split,
        "seed": seed,
        "data": {"account": splits.account, "fingerprint": splits.fingerprint},
        "detector": {"folder": detector} | scorer.identity(),
    }
    write_json(folder / "metrics.json", metrics)
    write_jsonl(
        folder / "scores.jsonl",
        (
            {
                "query_sha256": hashlib.sha256(answer.query.encode()).hexdigest(),
                "harmful": answer.harmful,
                "score": columns["detector"][place],
                **{name: columns[name][place] for name in baselines},
                "group": names[place],
            }
            | ({"query": answer.query, "answer": answer.answer} if save_texts else {})
            for place, answer in enumerate(answers)
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
    write_text(folder / "report.md", document(metrics))
    print_summary(metrics)
    log.info("written: %s (metrics.json, scores.jsonl, report.md, report.html)", folder)
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


def _training_data(
    scorer: HarmDetector, folder: Path, splits: Splits[Any], given: Source | None, notes: list[str]
) -> list[LabelledAnswer] | None:
    """What the baseline is taught on; where it cannot be read, a note says why."""
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
    """The scores of each baseline and what it is; where one cannot be taught, a note says why."""
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
