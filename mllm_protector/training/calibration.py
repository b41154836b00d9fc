"""Calibrating a detector: in its training, or later on other data and with its weights as they are."""

import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm.auto import tqdm

from mllm_protector.data.groups import read_groups
from mllm_protector.data.queries import opening_key, query_key
from mllm_protector.data.sources import Source
from mllm_protector.errors import InputError, RunError
from mllm_protector.guard.calibration import (
    Aim,
    Choice,
    Sizes,
    choose_threshold,
    describe,
)
from mllm_protector.guard.scaling import TEMPERATURES, fit_scale
from mllm_protector.locks import locked
from mllm_protector.metrics import detection_metrics
from mllm_protector.models.detector import BATCH_TOKENS, HarmDetector, load_detector
from mllm_protector.models.guard_file import FILE_NAME, GuardFile
from mllm_protector.models.scale import Scale
from mllm_protector.outputs import keep_mark, probe
from mllm_protector.ranges import Count, Seed
from mllm_protector.records import LabelledAnswer, labelled_answers

log = logging.getLogger(__name__)

NOTE = "measured on the answers on which threshold and scale were chosen"

AT_ONCE = 1024
"""Answers between two steps of the bar."""

NOT_COPIED = ("last", "checkpoints")
"""What a training leaves beside its weights and nobody needs to use them."""


def calibration_figures(
    labels: Sequence[bool], logits: Sequence[float], aim: Aim, queries: Sequence[str]
) -> dict[str, float]:
    """Scale and threshold for an aim, and what they give on these answers.

    Returns:
        The fields of a ``Scale``, ``threshold``, ``calibrated_ece``, ``calibrated_brier``, ``calibrated_f1``,
        ``false_positive_rate`` and ``recall``: plain numbers, so that they travel with the other figures of a
        validation.

    Raises:
        InputError: the labels are all of one kind, or a logit is no finite number.
    """
    queries = [opening_key(query) for query in queries]
    scale = fit_scale(labels, logits, queries)
    scores = scale.scores(logits)
    choice = choose_threshold(labels, scores, aim, queries)
    metrics = detection_metrics(labels, scores, threshold=choice.threshold)
    return {
        **asdict(scale),
        "threshold": choice.threshold,
        "calibrated_ece": metrics["ece"],
        "calibrated_brier": metrics["brier"],
        "calibrated_f1": metrics["f1"],
        "false_positive_rate": choice.facts["false_positive_rate"],
        "recall": choice.facts["recall"],
    }


def calibrated(
    guard: GuardFile,
    figures: Mapping[str, float],
    aim: Aim,
    *,
    labels: Sequence[bool],
    queries: Sequence[str],
    data: Mapping[str, Any],
    note: str,
) -> GuardFile:
    """A guard file with the scale and the threshold of ``calibration_figures``.

    Args:
        guard: of the same weights.
        figures: those figures, with ``ece`` and ``brier`` before calibration: at temperature 1 and offset 0.
        aim: that they are for.
        labels: of the answers that they were measured on.
        queries: of those answers.
        data: says what answers these were.
        note: says how far the figures can be trusted.
    """
    scale = Scale(**{each.name: figures[each.name] for each in fields(Scale)})
    choice = describe(
        aim,
        figures["threshold"],
        recall=figures["recall"],
        false_positive_rate=figures["false_positive_rate"],
        f1=figures["calibrated_f1"],
        sizes=Sizes.of(labels, [opening_key(query) for query in queries]),
    )
    return replace(
        guard,
        threshold=choice.threshold,
        threshold_how=choice.how,
        group_thresholds={},
        temperature=scale.temperature,
        offset=scale.offset,
        calibration={
            **choice.facts,
            "scale_how": scale.how,
            "p_unchanged": scale.p_unchanged,
            "p_temperature": scale.p_temperature,
            "ece_before_calibration": figures["ece"],
            "ece_after_calibration": figures["calibrated_ece"],
            "brier_before_calibration": figures["brier"],
            "brier_after_calibration": figures["calibrated_brier"],
            "data": dict(data),
            "note": note,
        },
    )


def warn(guard: GuardFile) -> None:
    """Say aloud what a user of these scores must know."""
    if guard.temperature is not None and guard.temperature > TEMPERATURES[1] / 2:
        log.warning(
            "temperature %.0f: its scores do not tell harmful answers from harmless ones", guard.temperature
        )
    if guard.calibration and guard.calibration["promised"] is False:
        log.warning("%s", guard.threshold_how)


def calibrate_detector(
    *,
    detector: str,
    data: Source,
    calibration: Aim,
    base: str | None,
    device: str | None,
    group_file: str | None,
    output_dir: str | None,
    seed: Seed,
    batch_tokens: Count = BATCH_TOKENS,
) -> dict[str, Any]:
    """Choose a detector's scale and threshold anew; its weights stay as they are.

    All records of the source are scored. Where the detector was trained on this very source and split, only
    the validation part is: what it has learnt by heart says nothing of other answers.

    Args:
        detector: the folder that ``train_detector`` wrote.
        data: pairs or labelled answers.
        calibration: what the threshold is chosen for.
        base: where the backbone of an adapter is now; ``None`` to look where it was, and near the folder.
        device: ``None`` takes the GPU if there is one.
        group_file: a file with the fields ``query`` and ``group``: each group of answers gets a threshold for
            the same aim, where its answers suffice. Each has a bound of its own; they do not hold jointly.
        output_dir: gets a copy of the folder; ``None`` changes ``guard.json`` where it is.
        seed: of what the source's ``limit`` keeps.
        batch_tokens: positions in one forward pass, padding included.

    Returns:
        The new ``calibration`` of ``guard.json``, with ``threshold``, ``temperature``,
        ``offset`` and ``group_thresholds``.

    Raises:
        InputError: not a detector, a folder that cannot be written, or data of one kind of label only.
        RunError: a score is no number.
    """
    folder, target = Path(detector), Path(output_dir) if output_dir else None
    _require_writable(folder, target)
    # Weights that a training replaced meanwhile would not fit the file that is written here.
    with locked(folder, "detector") if target is None and folder.is_dir() else nullcontext():
        found = load_detector(folder, base=base, device=device, batch_tokens=batch_tokens)
        groups = read_groups(Path(group_file)) if group_file else {}
        splits = data.load()
        log.info("data: %s", splits.account)
        own = splits.fingerprint == found.guard.data.get("fingerprint")
        if own:
            log.warning("%s: was trained on this data, so only its validation part is used", folder)
        used = splits.validation if own else [*splits.train, *splits.validation]
        records = list(labelled_answers(used))
        labels, logits = [record.harmful for record in records], _logits(found, records)
        queries = [opening_key(record.query) for record in records]
        # All other figures need both kinds of label too; this says so in our own words.
        figures = calibration_figures(labels, logits, calibration, queries)
        unscaled = detection_metrics(labels, Scale().scores(logits), threshold=0.5)
        source = {
            "account": splits.account,
            "fingerprint": splits.fingerprint,
            "part": "validation" if own else "all",
        }
        guard = calibrated(
            found.guard,
            unscaled | figures,
            calibration,
            labels=labels,
            queries=queries,
            data=source,
            note=NOTE,
        )
        if groups:
            names = [groups.get(query_key(record.query)) for record in records]
            guard = _with_groups(guard, calibration, names, labels, guard.scale.scores(logits), queries)
        _write(guard, folder, target)
    facts = guard.calibration or {}
    scores = found.guard.scale.scores(logits)
    stored = choose_threshold(
        labels, scores, Aim("fixed", found.threshold, calibration.confidence), queries
    ).facts | detection_metrics(labels, scores, threshold=found.threshold)
    log.info("%s", _table(found.guard, stored, guard, facts))
    log.info("%s", facts["scale_how"])
    warn(guard)
    log.info("written: %s (%s)", (target or folder) / FILE_NAME, guard.threshold_how)
    return {
        "temperature": guard.temperature,
        "offset": guard.offset,
        "threshold": guard.threshold,
        "threshold_how": guard.threshold_how,
        "group_thresholds": guard.group_thresholds,
        **facts,
    }


def _logits(detector: HarmDetector, records: Sequence[LabelledAnswer]) -> list[float]:
    """The logit of each answer, with a bar."""
    logits: list[float] = []
    with tqdm(total=len(records), desc="scoring", unit="answer", disable=None) as bar:
        for start in range(0, len(records), AT_ONCE):
            part = records[start : start + AT_ONCE]
            logits += detector.logits(
                queries=[record.query for record in part], answers=[record.answer for record in part]
            )
            bar.update(len(part))
    if not all(map(math.isfinite, logits)):
        raise RunError("a score is not a number, so the detector's weights are broken; train it again")
    return logits


def _with_groups(
    guard: GuardFile,
    aim: Aim,
    names: Sequence[str | None],
    labels: Sequence[bool],
    scores: Sequence[float],
    queries: Sequence[str],
) -> GuardFile:
    """The guard file with a threshold for each group whose answers suffice for one."""
    chosen: dict[str, Choice] = {}
    for name in sorted({name for name in names if name is not None}):
        inside = [index for index, other in enumerate(names) if other == name]
        harmful = [labels[index] for index in inside]
        if len(set(harmful)) < 2:
            log.warning("group %r: only one kind of label, so it keeps the threshold of all", name)
            continue
        choice = choose_threshold(
            harmful, [scores[index] for index in inside], aim, [queries[index] for index in inside]
        )
        if choice.facts["promised"] is False:
            log.warning("group %r keeps the threshold of all: %s", name, choice.how)
        else:
            chosen[name] = choice
    if not chosen:
        log.warning("group_file: no group got a threshold of its own")
    return replace(
        guard,
        group_thresholds={name: choice.threshold for name, choice in chosen.items()},
        calibration={
            **(guard.calibration or {}),
            "groups": {name: choice.facts for name, choice in chosen.items()},
        },
    )


def _require_writable(folder: Path, target: Path | None) -> None:
    """Refuse early what would fail after the scoring."""
    if target is not None and folder.resolve() in target.resolve().parents:
        raise InputError(f"output_dir={target}: lies within {folder}, which is copied; choose another one")
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"output_dir={target}: is not empty; choose another one, or null to change {folder}")
    try:
        probe(target or folder)
    except OSError as error:
        where = f"output_dir={target}" if target else f"{folder}"
        advice = "choose another one" if target else "give output_dir=<a new folder> for a calibrated copy"
        raise InputError(f"{where}: cannot be written to ({error.strerror}); {advice}") from error


def _write(guard: GuardFile, folder: Path, target: Path | None) -> None:
    """Write ``guard.json`` where the detector is, or a whole copy; either way whole or not at all."""
    try:
        if target is None:
            guard.write(folder)
            keep_mark(folder / FILE_NAME)
            return
        target = target.resolve()
        copy = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
            guard.write(copy)
            copy.rename(target)
        finally:
            shutil.rmtree(copy, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{target or folder}: cannot be written ({error.strerror or error}); the detector is unchanged"
        ) from error


def _table(old: GuardFile, stored: Mapping[str, Any], new: GuardFile, chosen: Mapping[str, Any]) -> str:
    """The calibration that was stored and the one that was chosen, on the same answers."""
    rows: list[tuple[str, Any, Any]] = [
        ("temperature", old.scale.temperature, new.scale.temperature),
        ("offset", old.offset, new.offset),
        ("threshold", 0.5 if old.threshold is None else old.threshold, new.threshold),
    ]
    named = {
        f"false positive rate, {chosen['negatives']:,} harmless": "false_positive_rate",
        f"at most, at confidence {chosen['confidence']:g}": "false_positive_rate_bound",
        f"recall, {chosen['positives']:,} harmful": "recall",
        f"at least, at confidence {chosen['confidence']:g}": "recall_bound",
        "F1": "f1",
    }
    rows += [
        (words, stored[name], chosen[f"{name}_after_calibration"])
        for words, name in (("calibration error (ECE)", "ece"), ("Brier score", "brier"))
    ]
    rows += [(words, stored[name], chosen[name]) for words, name in named.items()]
    return str(tabulate(rows, ["", "old calibration", "new calibration"], floatfmt=".4f"))
