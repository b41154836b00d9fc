"""Calibrating a trained detector again, on other data with the same weights."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas

from mllm_protector.config import recorded_data
from mllm_protector.data.mixture import sources_of
from mllm_protector.data.queries import opening_key
from mllm_protector.data.sources import Source
from mllm_protector.data.splits import Splits, shares_a_source
from mllm_protector.errors import InputError
from mllm_protector.files import fresh_folder
from mllm_protector.guard.calibration import Aim, Sizes, choose_threshold, fit_scale
from mllm_protector.guard.each_source import choose_for_each, in_words
from mllm_protector.locks import locked
from mllm_protector.metrics import detection_metrics
from mllm_protector.models.detector import BATCH_TOKENS, load_detector, logits_of
from mllm_protector.models.guard_file import FILE_NAME, GuardFile, Scale
from mllm_protector.outputs import keep_mark, probe
from mllm_protector.ranges import Count, Seed
from mllm_protector.records import LabelledAnswer, labelled_answers
from mllm_protector.training.calibration import calibrated, calibration_metrics, summary, warn

log = logging.getLogger(__name__)

NOTE = "measured on the answers on which threshold and scale were chosen"

NOT_COPIED = ("last", "checkpoints")
"""Beside the weights of a training, and not needed to use them."""


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

    All records of the source are scored; of one that the detector was trained on, only the validation part:
    scores of answers that it has learnt say nothing about other answers. Of a mixture, each source is scored
    as it is without the others, and the threshold keeps the aim on each (``guard.each_source``).

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
        answers = _answers(folder, found.guard, data)
        records = [record for each in answers for record in each.records]
        labels, logits = [record.harmful for record in records], logits_of(found, records)
        queries = [opening_key(record.query) for record in records]
        sources = [each.name for each in answers for _ in each.records]
        aim = calibration
        by_source: dict[str, dict[str, Any]] = {}
        if len(answers) > 1:
            scores = fit_scale(labels, logits).scores(logits)
            threshold, by_source = choose_for_each(labels, scores, calibration, queries, sources)
            aim = Aim("fixed", threshold, calibration.confidence)
        chosen = calibration_metrics(labels, logits, aim, queries)
        before = detection_metrics(labels, Scale().scores(logits), threshold=0.5)
        guard = calibrated(
            found.guard,
            before | chosen,
            aim,
            Sizes.of(labels, queries),
            data={
                "account": "; ".join(each.splits.account for each in answers),
                "fingerprint": answers[0].splits.fingerprint,
                "part": "+".join(dict.fromkeys(each.part for each in answers)),
            },
            note=NOTE,
        )
        if by_source:
            promised = all(facts["promised"] for facts in by_source.values())
            facts = guard.calibration or {}
            fingerprints = [each.splits.fingerprint for each in answers]
            facts |= {"aim": calibration.kind, "target": calibration.target, "promised": promised}
            facts |= {"sources": by_source, "data": {**facts["data"], "fingerprints": fingerprints}}
            guard = replace(guard, threshold_how=in_words(calibration, by_source), calibration=facts)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answers:
    """The answers of one source; ``part`` says which of them: ``validation``, ``new`` ones, or ``all``."""

    name: str
    splits: Splits[Any]
    part: str
    records: Sequence[LabelledAnswer]


def _answers(folder: Path, guard: GuardFile, data: Source) -> list[_Answers]:
    """The answers of each source that the detector in ``folder`` has not learnt.

    Raises:
        InputError: some were learnt, and which ones cannot be told.
    """
    found = []
    for name, source in sources_of(data).items():
        splits = source.load()
        log.info("data: %s", splits.account)
        part, used = "all", [*splits.train, *splits.validation]
        if splits.fingerprint == guard.data.get("fingerprint"):
            log.warning("%s: was trained on this data, so only its validation part is used", folder)
            part, used = "validation", [*splits.validation]
        elif shares_a_source(guard.data, splits):
            learnt = _learnt(folder, guard)
            part, used = "new", [record for record in used if opening_key(record.query) not in learnt]
            log.warning("%s: was trained on some of this data; %d records are new to it", folder, len(used))
            if not used:
                raise InputError(f"{splits.account}; the detector was trained on all of it; give other data")
        records = list(labelled_answers(used))
        found.append(_Answers(name=name or "", splits=splits, part=part, records=records))
    return found


def _learnt(folder: Path, guard: GuardFile) -> set[str]:
    """The keys of the queries that a detector was trained with."""
    try:
        recorded = recorded_data(folder, guard.data.get("fingerprint"))
    except InputError as error:
        raise InputError(
            f"{folder}: was trained on some of this data, and which part cannot be told ({error}); "
            "give other data"
        ) from None
    return {opening_key(record.query) for record in recorded.train}


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
        with fresh_folder(target.resolve()) as copy:
            shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*NOT_COPIED), dirs_exist_ok=True)
            guard.write(copy)
            copy.rename(target)
    except OSError as error:
        raise InputError(
            f"{target or folder}: cannot be written ({error.strerror or error}); the detector is unchanged"
        ) from error


def _table(old: GuardFile, stored: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The stored calibration and the new one, on the same answers."""
    both = {
        "temperature": (old.scale.temperature, new["temperature"]),
        "offset": (old.offset, new["offset"]),
        "threshold": (old.harmful_from, new["threshold"]),
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
