"""Training the harm detector: its loss, its figures, its entry function."""

import logging
import math
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from mllm_protector import prompts
from mllm_protector.data.balance import Balance, balanced
from mllm_protector.data.batching import MicroBatchLimit
from mllm_protector.data.encoding import Batch, DetectorEncoder
from mllm_protector.data.packing import is_packed, pack_answers
from mllm_protector.data.prefixes import with_prefixes
from mllm_protector.data.preparation import Contaminated, prepare
from mllm_protector.data.queries import opening_key
from mllm_protector.data.sources import Source
from mllm_protector.data.tokenized import tokenized
from mllm_protector.data.tokens import choose_pad_id, learnt_window
from mllm_protector.errors import InputError, RunError
from mllm_protector.files import content_key
from mllm_protector.guard.calibration import Aim
from mllm_protector.metrics import DETECTION_METRICS, detection_metrics
from mllm_protector.models.backbone import Backbone, require_length
from mllm_protector.models.bases import provenance
from mllm_protector.models.detector import worst_logits
from mllm_protector.models.guard_file import GuardFile, library_versions, warn_of
from mllm_protector.models.packing import model_inputs, packed_logits, use_packed_attention
from mllm_protector.models.parts import save_part
from mllm_protector.models.scale import Scale
from mllm_protector.models.tuning import Tuning
from mllm_protector.processes import Processes, first_process_first
from mllm_protector.protocols import Benchmark
from mllm_protector.ranges import Count, Seed, Share
from mllm_protector.records import LabelledAnswer, labelled_answers
from mllm_protector.training import loop
from mllm_protector.training.calibration import calibrated, calibration_figures, warn
from mllm_protector.training.checkpoint import CheckpointConfig, Resume
from mllm_protector.training.keeping import require_metric
from mllm_protector.training.settings import FitConfig
from mllm_protector.training.tracking import Tracker

log = logging.getLogger(__name__)

THRESHOLD = 0.5
"""Of the figures before calibration."""

NOTE = "measured on the answers on which threshold, scale and weights were chosen"
"""Weights too, so a bound is a little too good; ``calibrate_detector`` gives one that holds."""

Rows = list["array[int]"]
"""The windows of one answer, each a row of ids, 4 bytes each."""


def detector_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Binary cross-entropy of the one logit of each text, summed over the batch; a scalar.

    Source: paper section 3 (plain BCE; the official code adds it twice and a ranking term besides).

    Args:
        model: a sequence classifier with one output, or one wrapped by PEFT.
        batch: padded or packed, with ``labels`` (S,) float32, 1.0 for harmful.
    """
    logits = packed_logits(model, batch) if is_packed(batch) else model(**model_inputs(batch)).logits
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits[:, 0].float(), batch["labels"], reduction="sum"
    )


def train_detector(
    *,
    data: Source,
    benchmarks: Mapping[str, Benchmark],
    contaminated: Contaminated,
    balance: Balance,
    backbone: Callable[[], Backbone],
    tuning: Tuning,
    fit: FitConfig,
    checkpoint: CheckpointConfig,
    resume: Resume,
    tracker: Tracker,
    max_length: Count,
    prompt: str | None,
    prefixes: Share,
    calibration: Aim,
    output_dir: str,
    seed: Seed,
) -> dict[str, Any]:
    """Train a harm detector and write it, with its figures, to ``output_dir``.

    Each set of weights that is kept gets its scale and its threshold from its own scores of the
    validation split, where a long answer is read in windows as in use.

    Args:
        data: pairs or labelled answers.
        benchmarks: whose questions are looked for in the training queries; their names are free.
        contaminated: ``drop`` leaves out training records with such a question.
        balance: what to do where there are more answers of one label (see ``data.balance``).
        backbone: makes the pretrained model's description; called once.
        tuning: adapters or everything.
        fit: how to optimise.
        checkpoint: when to write where a stopped training can go on.
        resume: ``auto`` goes on with a stopped training in ``output_dir``, ``never`` starts over.
        tracker: takes the figures.
        max_length: longest question and answer in tokens; longer ones are cut and counted.
        prompt: a template with ``{query}`` and ``{answer}``, or ``None`` for ours.
        prefixes: share of the training answers that are also learnt cut short, for streams that are scored
            while they grow.
        calibration: what the threshold is chosen for.
        output_dir: gets the weights, ``guard.json``, ``metrics.json``, ``metrics.jsonl`` and
            ``data_report.md``.
        seed: of the head, the order and dropout.

    Returns:
        The content of ``metrics.json``: figures of the scores as they were learnt, at a threshold of 0.5, and
        under ``calibrated`` those of the scores as they are used.

    Raises:
        InputError: the data, the backbone or the settings cannot be used.
    """
    require_metric(fit.best_metric, DETECTION_METRICS)
    folder = Path(output_dir)
    prepared = prepare(data, benchmarks, contaminated=contaminated, folder=folder)
    splits = prepared.splits
    validation = list(labelled_answers(splits.validation))
    learnt = Counter(record.harmful for record in labelled_answers(splits.train))
    for name, kinds in (("training", learnt), ("validation", Counter(each.harmful for each in validation))):
        if len(kinds) < 2:
            raise InputError(f"the {name} split has only one kind of label; the detector needs both")
    set_seed(seed)
    with first_process_first():
        base = backbone()
    tokenizer = base.load_tokenizer()
    answers = (record.answer for record in labelled_answers(splits.train))
    window = learnt_window(tokenizer, answers, learnt.total())
    encoder = DetectorEncoder(
        tokenizer,
        pad_id=choose_pad_id(tokenizer),
        max_length=max_length,
        prompt=prompts.DETECTOR if prompt is None else prompt,
    )
    pretrained, fresh = base.load_classifier(pad_id=encoder.pad_id)
    require_length(pretrained, max_length)
    model = tuning.prepare(pretrained, "SEQ_CLS", fresh)
    if fit.packing:
        use_packed_attention(model)
    train = with_prefixes(labelled_answers(splits.train), share=prefixes, seed=seed)
    content = content_key(splits.fingerprint, prefixes and [prefixes, seed])
    with first_process_first():
        encoded = tokenized(encoder, train, content=content)
    examples = balanced(encoded, balance, seed=seed)
    windows = _windows(encoder, validation, window)
    labels = [record.harmful for record in validation]
    queries = [opening_key(record.query) for record in validation]
    if encoded.shortened:
        log.warning(
            "%d of %d training questions are too long for max_length=%d tokens: head and tail are read",
            encoded.shortened,
            len(encoded),
            max_length,
        )
    if encoded.truncated:
        log.warning(
            "%d of %d training answers are longer than max_length=%d tokens and were cut",
            encoded.truncated,
            len(encoded),
            max_length,
        )
    guard = GuardFile(
        kind="detector",
        tuning=tuning.kind,
        **provenance(base),
        prompt=encoder.prompt,
        max_length=max_length,
        pad_id=encoder.pad_id,
        window=window,
        data=prepared.facts(),
        metrics={},
        versions=library_versions(),
    )
    warn_of(guard)

    def evaluate(model: torch.nn.Module, processes: Processes[float]) -> dict[str, float]:
        logits = _logits(model, encoder, windows, processes, limit=fit.validation_batch)
        plain = detection_metrics(labels, Scale().scores(logits), threshold=THRESHOLD)
        return plain | calibration_figures(labels, logits, calibration, queries)

    def measured(metrics: dict[str, float]) -> GuardFile:
        """The guard file of weights with these figures: they say all, also after an interruption."""
        data = {name: guard.data[name] for name in ("account", "fingerprint")} | {"part": "validation"}
        found = calibrated(guard, metrics, calibration, labels=labels, queries=queries, data=data, note=NOTE)
        return replace(found, metrics=_plain(metrics))

    def save(folder: Path, metrics: dict[str, float], weights: dict[str, torch.Tensor]) -> None:
        save_part(model, tokenizer, measured(metrics), folder, weights)

    fitted = loop.fit(
        model,
        train=examples,
        collate=pack_answers if fit.packing else encoder,
        loss_fn=detector_loss,
        evaluate=evaluate,
        save=save,
        config=fit,
        checkpoint=checkpoint,
        resume=resume,
        tracker=tracker,
        output_dir=folder,
        identity=guard.origin()
        | {
            "base": asdict(base),
            "tuning": str(tuning),
            "calibration": asdict(calibration),
            "prefixes": prefixes,
            "balance": balance,
        },
        seed=seed,
    )
    kept = measured(fitted.metrics)
    warn(kept)
    warn_of(kept)
    more: dict[str, Any] = {
        "examples": len(examples),
        "validation_examples": len(validation),
        "calibrated": {
            "temperature": kept.temperature,
            "offset": kept.offset,
            "threshold": kept.threshold,
            "threshold_how": kept.threshold_how,
            **(kept.calibration or {}),
        },
    }
    plain = replace(fitted, metrics=_plain(fitted.metrics), last_metrics=_plain(fitted.last_metrics))
    return plain.write(folder, **more)


def _plain(metrics: dict[str, float]) -> dict[str, float]:
    """The figures before calibration."""
    return {name: metrics[name] for name in DETECTION_METRICS}


def _windows(encoder: DetectorEncoder, records: Sequence[LabelledAnswer], window: int) -> list[Rows]:
    """Each answer in the rows that it is read in; of few at a time the ids are Python's own numbers."""
    return [
        [array("i", row) for row in rows]
        for start in range(0, len(records), 1000)
        for rows in encoder.windows(
            queries=[record.query for record in records[start : start + 1000]],
            answers=[record.answer for record in records[start : start + 1000]],
            window=window,
        )
    ]


def _logits(
    model: torch.nn.Module,
    encoder: DetectorEncoder,
    windows: Sequence[Rows],
    processes: Processes[float],
    *,
    limit: MicroBatchLimit,
) -> list[float]:
    """The logit of each answer, which is that of its worst window."""
    worst = worst_logits(model, encoder, processes.mine(windows), limit=limit)
    gathered = processes.gather(worst, len(windows))
    if not all(map(math.isfinite, gathered)):
        raise RunError("a validation score is not a number; lower fit.learning_rate or look at the data")
    return gathered
