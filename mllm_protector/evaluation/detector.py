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
from typing import Any

from mllm_protector.data.mixture import Mixture
from mllm_protector.data.queries import query_key, read_groups
from mllm_protector.data.sources import Source
from mllm_protector.errors import InputError
from mllm_protector.evaluation.baseline import BASELINE_THRESHOLD, Taught, compared, query_clusters, taught_as
from mllm_protector.evaluation.detection import (
    DETECTOR,
    calibration_metrics,
    decision_metrics,
    differing_pairs,
    group_metrics,
    pairwise_accuracy,
    ranking_metrics,
)
from mllm_protector.evaluation.labelled import MeasuredSet, Split, load_sets, notes_of
from mllm_protector.evaluation.measurements import Measurement, as_rows, placed
from mllm_protector.files import expand, write_json, write_jsonl
from mllm_protector.models.detector import HarmDetector, load_detector, logits_of
from mllm_protector.models.guard_file import FILE_NAME, Scale
from mllm_protector.ranges import Seed
from mllm_protector.records import LabelledAnswer

log = logging.getLogger(__name__)

SCHEMA = 3

SCENARIO = "scenario"
"""Instead of a file of groups: the scenario of each answer."""

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
) -> list[MeasuredDetector]:
    """Measure a saved detector on one set or several; write ``metrics.json`` and ``scores.jsonl`` of each.

    Intervals are 95 % and take answers to one query as one draw: Wilson's on the effective number of answers;
    ``detection`` says how well those of AUROC, average precision and their distance to the baselines cover.

    Args:
        detector: the folder that ``train_detector`` wrote.
        data: pairs or labelled answers. Of a mixture each source is measured for itself, as it is without the
            others, in a folder of its name. A set of harmless answers alone gives a false positive rate.
        baseline_data: its training part teaches the baseline; ``None`` takes what the detector was trained
            with, by the ``config.yaml`` in its folder.
        base: where the backbone of an adapter is now; ``None`` to look where it was, and near the folder.
        device: ``None`` takes the GPU if there is one.
        split: ``validation`` measures on the validation part, ``all`` on every record, and ``auto`` on every
            record of a test set and on the validation part of other sets.
        group_file: a file with ``query`` and ``group``, for metrics by group; ``scenario`` for the set's own
            scenarios, ``None`` for no groups.
        save_texts: write queries and answers beside their scores, and the worst mistakes into the page.
        output_dir: gets the results.
        seed: of the bootstrap.

    Returns:
        The input of ``reporting.parts``, one for each set. The arm of its ``measurements`` is the scorer. A
        baseline that could not be trained is missing, and ``notes`` say why.

    Raises:
        InputError: the detector, the data or the groups cannot be used.
        RunError: a score is not a number.
    """
    folder = Path(output_dir)
    if (folder / FILE_NAME).exists():
        raise InputError(f"output_dir={folder}: holds a trained part; choose another folder")
    scorer = load_detector(expand(detector), base=base, device=device)
    group_of = {} if group_file in (None, SCENARIO) else read_groups(expand(group_file))
    loaded = load_sets(data, split)
    groups = [_groups(each.answers, group_of, group_file) for each in loaded]

    log.info("teaching the baseline")
    trained = taught_as(scorer.guard, expand(detector), [each.splits for each in loaded], baseline_data)
    measured = []
    for each, of_set in zip(loaded, groups, strict=True):
        place = folder if each.name is None else folder / each.name
        measured.append(
            _measure(scorer, detector, each, of_set, trained, place, save_texts=save_texts, seed=seed)
        )
    if isinstance(data, Mixture):
        rows = [row for each in measured for row in each.metrics["measurements"]]
        sets = {each.metrics["set"]: each.metrics["data"] for each in measured}
        facts = {"schema": SCHEMA, "detector": measured[0].metrics["detector"], "sets": sets}
        write_json(folder / "metrics.json", facts | {"measurements": rows})
    return measured


def _groups(
    answers: Sequence[LabelledAnswer], group_of: Mapping[str, str], group_file: str | None
) -> list[str | None]:
    """The group of each answer; ``None`` each where none are wanted."""
    groups = [
        answer.scenario if group_file == SCENARIO else group_of.get(query_key(answer.query))
        for answer in answers
    ]
    if group_file is not None and not any(groups):
        lacks = "the data have none" if group_file == SCENARIO else "has none of the queries of the data"
        raise InputError(f"{group_file}: {lacks}")
    return groups


def _measure(
    scorer: HarmDetector,
    detector: str,
    measured: MeasuredSet,
    groups: Sequence[str | None],
    trained: Taught | str,
    folder: Path,
    *,
    save_texts: bool,
    seed: int,
) -> MeasuredDetector:
    """Score one set; ``trained`` is the baseline, or why there is none."""
    answers = measured.answers
    notes = notes_of(scorer, measured.splits, measured.split)
    baselines = compared(trained, answers, notes)
    for note in notes:
        log.warning("%s", note)
    log.info("scoring %s answers%s", f"{len(answers):,}", f" of {measured.name}" if measured.name else "")
    logits = logits_of(scorer, answers)
    scale = scorer.guard.scale

    labels = [answer.harmful for answer in answers]
    clusters = query_clusters(answers)
    pairs = differing_pairs(measured.records)
    columns = {DETECTOR: scale.scores(logits)} | {name: found for name, (found, _) in baselines.items()}
    limits = dict.fromkeys(columns, BASELINE_THRESHOLD) | {DETECTOR: scorer.threshold}
    flags = {name: [score >= limits[name] for score in found] for name, found in columns.items()}
    before = {} if scale == Scale() else {UNCALIBRATED: Scale().scores(logits)}
    measurements: list[Measurement] = []
    if len(set(labels)) == 2:
        measurements += ranking_metrics(labels, columns, clusters, seed=seed)
        measurements += pairwise_accuracy(columns, clusters, pairs)
        measurements += calibration_metrics(labels, columns | before)
    measurements += decision_metrics(labels, flags, clusters)
    if any(groups):
        measurements += group_metrics(labels, columns, flags[DETECTOR], clusters, groups)
    metrics = {
        "schema": SCHEMA,
        "set": measured.name,
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
        "baselines": {name: facts for name, (_, facts) in baselines.items()},
        "notes": notes,
        "split": measured.split,
        "seed": seed,
        "data": {"account": measured.splits.account, "fingerprint": measured.splits.fingerprint},
        "measurements": as_rows(placed(measurements, benchmark=measured.name)),
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
                "group": groups[place],
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
