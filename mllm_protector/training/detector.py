"""Training the harm detector: its encoder, its metrics, its entry function."""

import math
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mllm_protector import prompts
from mllm_protector.data.batching import MicroBatchLimit, pack_answers
from mllm_protector.data.encoding import DetectorEncoder
from mllm_protector.data.preparation import Contaminated, prepare
from mllm_protector.data.queries import opening_key
from mllm_protector.data.sources import Source
from mllm_protector.data.tokenized import Balance, balanced, tokenized, with_prefixes
from mllm_protector.data.tokens import choose_pad_id, learnt_window
from mllm_protector.errors import InputError, RunError
from mllm_protector.files import content_key
from mllm_protector.guard.calibration import Aim, Sizes
from mllm_protector.metrics import DETECTION_METRICS, detection_metrics
from mllm_protector.models.backbone import Backbone, require_length
from mllm_protector.models.detector import worst_logits
from mllm_protector.models.guard_file import GuardFile, Scale
from mllm_protector.models.parts import save_part
from mllm_protector.models.tuning import Tuning
from mllm_protector.processes import Processes, first_process_first
from mllm_protector.protocols import Benchmark
from mllm_protector.ranges import Count, Seed, Share
from mllm_protector.records import LabelledAnswer, labelled_answers
from mllm_protector.training.best import require_metric
from mllm_protector.training.calibration import calibrated, calibration_metrics, summary, warn
from mllm_protector.training.logging import Tracker
from mllm_protector.training.loop import Task, Weights
from mllm_protector.training.losses import detector_loss
from mllm_protector.training.part import open_backbone, train_part, tuned, unmeasured
from mllm_protector.training.settings import CheckpointConfig, FitConfig, Resume, Run

THRESHOLD = 0.5
"""Of the metrics before calibration."""

NOTE = "measured on the answers on which threshold, scale and weights were chosen"
"""Weights too, so a bound is a little too good; ``calibrate_detector`` gives one that holds."""

Rows = list["array[int]"]
"""The windows of one answer, each a row of ids, 4 bytes each."""


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
    """Train a harm detector and write it, with its metrics, to ``output_dir``.

    Scale and threshold of the kept weights come from their own scores of the validation split, where a long
    answer is read in windows as in use.

    Args:
        data: pairs or labelled answers.
        benchmarks: name to benchmark; their questions are looked for in the training queries.
        contaminated: ``drop`` leaves out training records with such a question.
        balance: of answers with either label (see ``data.balance``).
        backbone: makes the pretrained model's description; called once.
        tuning: adapters or everything.
        fit: how to optimise.
        checkpoint: when to write checkpoints.
        resume: ``auto`` continues a stopped training in ``output_dir``, ``never`` starts over.
        tracker: takes the metrics.
        max_length: longest question and answer in tokens; longer ones are cut and counted.
        prompt: a template with ``{query}`` and ``{answer}``, or ``None`` for the package's own.
        prefixes: share of the training answers that are also learnt cut short, to score streams while they
            grow.
        calibration: what the threshold is for.
        output_dir: gets the weights, ``guard.json``, ``metrics.json``, ``metrics.jsonl`` and
            ``data_report.md``.
        seed: of the head, the order and dropout.

    Returns:
        The content of ``metrics.json``: metrics of the uncalibrated scores at a threshold of 0.5, and under
        ``calibrated`` scale, threshold and metrics of the calibrated scores.

    Raises:
        InputError: the data, the backbone or the settings cannot be used.
    """
    require_metric(fit.best_metric, DETECTION_METRICS)
    run = Run(
        fit=fit,
        checkpoint=checkpoint,
        resume=resume,
        tracker=tracker,
        output_dir=Path(output_dir),
        seed=seed,
    )
    prepared = prepare(data, benchmarks, contaminated=contaminated, folder=run.output_dir)
    splits = prepared.splits
    validation = list(labelled_answers(splits.validation))
    learnt = Counter(record.harmful for record in labelled_answers(splits.train))
    for name, kinds in (("training", learnt), ("validation", Counter(each.harmful for each in validation))):
        if len(kinds) < 2:
            raise InputError(f"the {name} split has only one kind of label; the detector needs both")

    base = open_backbone(backbone, seed)
    tokenizer = base.load_tokenizer()
    harmful = (record.answer for record in labelled_answers(splits.train) if record.harmful)
    window = learnt_window(tokenizer, harmful, learnt[True])
    encoder = DetectorEncoder(
        tokenizer,
        pad_id=choose_pad_id(tokenizer),
        max_length=max_length,
        prompt=prompts.DETECTOR if prompt is None else prompt,
    )
    pretrained, fresh = base.load_classifier(pad_id=encoder.pad_id)
    require_length(pretrained, max_length)
    model = tuned(pretrained, "SEQ_CLS", fresh, tuning, packing=fit.packing)
    train = with_prefixes(labelled_answers(splits.train), share=prefixes, seed=seed)
    content = content_key(splits.fingerprint, prefixes and [prefixes, seed])
    with first_process_first():
        encoded = tokenized(encoder, train, content=content)
    examples = balanced(encoded, balance, seed=seed)
    windows = _windows(encoder, validation, window)
    labels = [record.harmful for record in validation]
    queries = [opening_key(record.query) for record in validation]
    guard = unmeasured("detector", base, tuning, encoder, prepared.facts(), window=window)

    def evaluate(model: torch.nn.Module, processes: Processes[float]) -> dict[str, float]:
        logits = _logits(model, encoder, windows, processes, limit=fit.validation_batch)
        uncalibrated = detection_metrics(labels, Scale().scores(logits), threshold=THRESHOLD)
        return uncalibrated | calibration_metrics(labels, logits, calibration, queries)

    def measured(metrics: dict[str, float]) -> GuardFile:
        """The guard file of weights with these metrics, which are enough for it after a resume too."""
        seen = {name: guard.data[name] for name in ("account", "fingerprint")} | {"part": "validation"}
        sizes = Sizes.of(labels, queries)
        found = calibrated(guard, metrics, calibration, sizes, data=seen, note=NOTE)
        return replace(found, metrics=_uncalibrated(metrics))

    def save(folder: Path, metrics: dict[str, float], weights: Weights) -> None:
        save_part(model, tokenizer, measured(metrics), folder, weights)

    task = Task(
        model=model,
        examples=examples,
        collate=pack_answers if fit.packing else encoder,
        loss=detector_loss,
        evaluate=evaluate,
        save=save,
        identity=guard.origin()
        | {
            "base": asdict(base),
            "tuning": str(tuning),
            "calibration": asdict(calibration),
            "prefixes": prefixes,
            "balance": balance,
        },
    )
    fitted = train_part(task, run, guard, encoded)
    kept = measured(fitted.metrics)
    warn(kept)
    fitted = replace(
        fitted, metrics=_uncalibrated(fitted.metrics), last_metrics=_uncalibrated(fitted.last_metrics)
    )
    return fitted.write(
        run.output_dir,
        examples=len(examples),
        validation_examples=len(validation),
        calibrated=summary(kept),
    )


def _uncalibrated(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in DETECTION_METRICS}


def _windows(encoder: DetectorEncoder, records: Sequence[LabelledAnswer], window: int) -> list[Rows]:
    """Each answer in the rows that it is read in; few at a time as lists, which take more memory."""
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
