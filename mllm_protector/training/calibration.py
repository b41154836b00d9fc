"""Calibrating a detector: in its training, or later on other data with the same weights."""

import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
from tqdm.auto import tqdm

from mllm_protector.data.queries import opening_key
from mllm_protector.data.sources import Source
from mllm_protector.errors import InputError, RunError
from mllm_protector.guard.calibration import TEMPERATURES, Aim, Sizes, choose_threshold, describe, fit_scale
from mllm_protector.locks import locked
from mllm_protector.metrics import detection_metrics
from mllm_protector.models.detector import BATCH_TOKENS, HarmDetector, load_detector
from mllm_protector.models.guard_file import FILE_NAME, GuardFile, Scale
from mllm_protector.outputs import keep_mark, probe
from mllm_protector.ranges import Count, Seed
from mllm_protector.records import LabelledAnswer, labelled_answers

log = logging.getLogger(__name__)

NOTE = "measured on the answers on which threshold and scale were chosen"

AT_ONCE = 1024
"""Answers between two steps of the progress bar."""

NOT_COPIED = ("last", "checkpoints")
"""Beside the weights of a training, and not needed to use them."""


def calibration_metrics(
    labels: Sequence[bool], logits: Sequence[float], aim: Aim, queries: Sequence[str]
) -> dict[str, float]:
    """Scale and threshold for an aim, and how good they are on these answers.

    ``queries`` are keys of the answers' queries (``opening_key``).

    Returns:
        Plain numbers, to be logged and kept with the other metrics of a validation.

    Raises:
        InputError: the labels are all of one kind, or a logit is not finite.
    """
    scale = fit_scale(labels, logits)
    scores = scale.scores(logits)
    choice = choose_threshold(labels, scores, aim, queries)
    metrics = detection_metrics(labels, scores, threshold=choice.threshold)
    return {
        "temperature": scale.temperature,
        "offset": scale.offset,
        "threshold": choice.threshold,
        "calibrated_ece": metrics["ece"],
        "calibrated_brier": metrics["brier"],
        "calibrated_f1": metrics["f1"],
        "false_positive_rate": choice.facts["false_positive_rate"],
        "recall": choice.facts["recall"],
    }


def calibrated(
    guard: GuardFile,
    metrics: Mapping[str, float],
    aim: Aim,
    sizes: Sizes,
    *,
    data: Mapping[str, Any],
    note: str,
) -> GuardFile:
    """A guard file with the scale and the threshold of ``calibration_metrics``.

    ``metrics`` also has ``ece`` and ``brier`` before calibration (temperature 1, offset 0); ``data`` says
    which answers they were measured on, and ``note`` how far they can be trusted.
    """
    choice = describe(
        aim,
        metrics["threshold"],
        recall=metrics["recall"],
        false_positive_rate=metrics["false_positive_rate"],
        f1=metrics["calibrated_f1"],
        sizes=sizes,
    )
    return replace(
        guard,
        threshold=choice.threshold,
        threshold_how=choice.how,
        temperature=metrics["temperature"],
        offset=metrics["offset"],
        calibration={
            **choice.facts,
            "scale_how": f"temperature and offset with the least log loss on {choice.facts['n']:,} answers",
            "ece_before_calibration": metrics["ece"],
            "ece_after_calibration": metrics["calibrated_ece"],
            "brier_before_calibration": metrics["brier"],
            "brier_after_calibration": metrics["calibrated_brier"],
            "data": dict(data),
            "note": note,
        },
    )


def summary(guard: GuardFile) -> dict[str, Any]:
    """The calibration of a guard file, in one level."""
    return {
        "temperature": guard.temperature,
        "offset": guard.offset,
        "threshold": guard.threshold,
        "threshold_how": guard.threshold_how,
        **(guard.calibration or {}),
    }


def warn(guard: GuardFile) -> None:
    """Warn of scores that tell nothing, and of a promise that is not kept."""
    if guard.temperature is not None and guard.temperature > TEMPERATURES[1] / 2:
        log.warning(
            "temperature %.0f: the scores do not tell harmful answers from harmless ones", guard.temperature
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
    output_dir: str | None,
    seed: Seed,
    batch_tokens: Count = BATCH_TOKENS,
) -> dict[str, Any]:
    """Choose a detector's scale and threshold again; its weights do not change.

    All records of the source are scored. If the detector was trained on this very source and split, only the
    validation part is: scores of answers that it has learnt say nothing about other answers.

    ``configs/calibrate_detector.yaml`` describes the arguments.

    Returns:
        The new ``calibration`` of ``guard.json``, with ``threshold``, ``temperature`` and ``offset``.

    Raises:
        InputError: not a detector, a folder that cannot be written, or data of one kind of label only.
        RunError: a score is not a number.
    """
    folder, target = Path(detector), Path(output_dir) if output_dir else None
    _require_writable(folder, target)
    # Weights that a training replaced meanwhile would not fit the file that is written here.
    with locked(folder, "detector") if target is None and folder.is_dir() else nullcontext():
        found = load_detector(folder, base=base, device=device, batch_tokens=batch_tokens)
        splits = data.load()
        log.info("data: %s", splits.account)
        own = splits.fingerprint == found.guard.data.get("fingerprint")
        if own:
            log.warning("%s: was trained on this data, so only its validation part is used", folder)
        used = splits.validation if own else [*splits.train, *splits.validation]
        records = list(labelled_answers(used))
        labels, logits = [record.harmful for record in records], _logits(found, records)
        queries = [opening_key(record.query) for record in records]
        chosen = calibration_metrics(labels, logits, calibration, queries)
        before = detection_metrics(labels, Scale().scores(logits), threshold=0.5)
        guard = calibrated(
            found.guard,
            before | chosen,
            calibration,
            Sizes.of(labels, queries),
            data={
                "account": splits.account,
                "fingerprint": splits.fingerprint,
                "part": "validation" if own else "all",
            },
            note=NOTE,
        )
        _write(guard, folder, target)
    result = summary(guard)
    scores = found.guard.scale.scores(logits)
    stored = choose_threshold(
        labels, scores, Aim("fixed", found.threshold, calibration.confidence), queries
    ).facts | detection_metrics(labels, scores, threshold=found.threshold)
    log.info("%s", _table(found.guard, stored, result))
    log.info("%s", result["scale_how"])
    warn(guard)
    log.info("written: %s (%s)", (target or folder) / FILE_NAME, guard.threshold_how)
    return result


def _logits(detector: HarmDetector, records: Sequence[LabelledAnswer]) -> list[float]:
    """The logit of each answer, with a progress bar."""
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


def _require_writable(folder: Path, target: Path | None) -> None:
    """Fail early rather than after the scoring."""
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


def _table(old: GuardFile, stored: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The stored calibration and the new one, on the same answers."""
    both = {
        "temperature": (old.scale.temperature, new["temperature"]),
        "offset": (old.offset, new["offset"]),
        "threshold": (0.5 if old.threshold is None else old.threshold, new["threshold"]),
        "calibration error (ECE)": (stored["ece"], new["ece_after_calibration"]),
        "Brier score": (stored["brier"], new["brier_after_calibration"]),
    }
    named = {
        f"false positive rate, {new['negatives']:,} harmless": "false_positive_rate",
        f"at most, at confidence {new['confidence']:g}": "false_positive_rate_bound",
        f"recall, {new['positives']:,} harmful": "recall",
        f"at least, at confidence {new['confidence']:g}": "recall_bound",
        "F1": "f1",
    }
    both |= {words: (stored[name], new[name]) for words, name in named.items()}
    table = pandas.DataFrame.from_dict(both, orient="index", columns=["old calibration", "new calibration"])
    return table.to_string(float_format="%.4f")
