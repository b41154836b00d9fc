"""The calibration of a detector as part of its guard file."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mllm_protector.guard.calibration import TEMPERATURES, Aim, Sizes, choose_threshold, describe, fit_scale
from mllm_protector.metrics import detection_metrics
from mllm_protector.models.guard_file import GuardFile

log = logging.getLogger(__name__)


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
