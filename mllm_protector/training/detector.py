"""Training the harm detector: its encoder, its metrics, its entry function."""

import math
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mllm_protector import prompts
from mllm_protector.data.augmentation import Augmentation
from mllm_protector.data.batching import pack_answers
from mllm_protector.data.encoding import DetectorEncoder, EncodedAnswer
from mllm_protector.data.preparation import Contaminated, prepare
from mllm_protector.data.queries import opening_key
from mllm_protector.data.sources import Source
from mllm_protector.data.tokenized import Balance, balanced, tokenized, with_prefixes
from mllm_protector.data.tokens import choose_pad_id, learnt_window
from mllm_protector.errors import InputError, RunError
from mllm_protector.files import content_key
from mllm_protector.guard.calibration import Aim, Sizes
from mllm_protector.metrics import DETECTION_METRICS, detection_metrics
from mllm_protector.models.backbone import Backbone
from mllm_protector.models.detector import score_logits, worst_logits
from mllm_protector.models.guard_file import GuardFile, Scale
from mllm_protector.models.parts import save_part
from mllm_protector.models.precomputed import AtPlaces, precompute, run_upper_blocks_only
from mllm_protector.models.probe import LinearProbe, new_probe
from mllm_protector.models.tuning import LoraTuning, ProbeTuning, Tuning
from mllm_protector.processes import Processes, first_process_first
from mllm_protector.protocols import Benchmark
from mllm_protector.ranges import Count, Seed, Share
from mllm_protector.records import LabelledAnswer, labelled_answers
from mllm_protector.training import loop
from mllm_protector.training.calibration import calibrated, calibration_metrics, summary, warn
from mllm_protector.training.checkpoints import Fitted, require_metric
from mllm_protector.training.logging import Tracker
from mllm_protector.training.loop import Run, Task, Weights
from mllm_protector.training.losses import detector_loss
from mllm_protector.training.part import open_backbone, train_part, tuned, unmeasured
from mllm_protector.training.probe import fit_probe
from mllm_protector.training.settings import CheckpointConfig, FitConfig, Resume

THRESHOLD = 0.5
"""Of the metrics before calibration."""

NOTE = "measured on the answers on which threshold, scale and weights were chosen"
"""Weights too, so a bound is a little too good; ``calibrate_detector`` gives one that holds."""


def train_detector(
    *,
    data: Source,
    benchmarks: Mapping[str, Benchmark],
    contaminated: Contaminated,
    balance: Balance,
    backbone: Callable[[], Backbone],
    tuning: Tuning | ProbeTuning,
    fit: FitConfig,
    checkpoint: CheckpointConfig,
    resume: Resume,
    tracker: Tracker,
    max_length: Count,
    prompt: str | None,
    prefixes: Share,
    augment: Augmentation,
    calibration: Aim,
    output_dir: str,
    seed: Seed,
) -> dict[str, Any]:
    """Train a harm detector and write it, with its metrics, to ``output_dir``.

    Scale and threshold of the kept weights come from their own scores of the validation split, where a long
    answer is read in windows as in use.

    ``configs/train_detector.yaml`` describes the arguments. ``backbone`` is called once.

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
    model: torch.nn.Module
    if isinstance(tuning, ProbeTuning):
        model = new_probe(base, tuning, closing=encoder.closing, max_length=max_length)
    else:
        pretrained, fresh = base.load_classifier(pad_id=encoder.pad_id)
        model = tuned(pretrained, "SEQ_CLS", fresh, tuning, max_length=max_length, packing=fit.packing)
    train = with_prefixes(labelled_answers(splits.train), share=prefixes, seed=seed)
    train = augment.added_to(train, template=encoder.prompt, seed=seed)
    content = content_key(splits.fingerprint, prefixes and [prefixes, seed], augment.identity(seed))
    with first_process_first():
        encoded = tokenized(encoder, train, content=content)
    examples: Sequence[EncodedAnswer] = balanced(encoded, balance, seed=seed)
    windows = _windows(encoder, validation, window)
    labels = [record.harmful for record in validation]
    queries = [opening_key(record.query) for record in validation]
    guard = unmeasured("detector", base, tuning, encoder, prepared.facts(), window=window)
    if isinstance(tuning, LoraTuning) and tuning.precompute and tuning.blocks:
        rows = [*(example.ids for example in encoded), *(row for each in windows for row in each)]
        with first_process_first():
            places = precompute(
                model,
                tuning.blocks,
                rows,
                base=content_key(asdict(base), guard.base_fingerprint),
                pad_id=encoder.pad_id,
                limit=fit.validation_batch,
            )
        run_upper_blocks_only(model, tuning.blocks, places, rows)
        examples = AtPlaces(examples, places)
        windows = [[array("i", places.of(row)) for row in each] for each in windows]

    def metrics_of(logits: list[float]) -> dict[str, float]:
        if not all(map(math.isfinite, logits)):
            raise RunError("a validation score is not a number; lower fit.learning_rate or look at the data")
        uncalibrated = detection_metrics(labels, Scale().scores(logits), threshold=THRESHOLD)
        return uncalibrated | calibration_metrics(labels, logits, calibration, queries)

    def evaluate(model: torch.nn.Module, processes: Processes[float]) -> dict[str, float]:
        score = partial(score_logits, model, encoder, limit=fit.validation_batch)
        worst = worst_logits(processes.mine(windows), score)
        return metrics_of(processes.gather(worst, len(windows)))

    def measured(metrics: dict[str, float]) -> GuardFile:
        """The guard file of weights with these metrics, which are enough for it after a resume too."""
        seen = {name: guard.data[name] for name in ("account", "fingerprint")} | {"part": "validation"}
        sizes = Sizes.of(labels, queries)
        found = calibrated(guard, metrics, calibration, sizes, data=seen, note=NOTE)
        return replace(found, metrics=_uncalibrated(metrics))

    def save(folder: Path, metrics: dict[str, float], weights: Weights) -> None:
        save_part(model, tokenizer, measured(metrics), folder, weights)

    learn: Callable[[], Fitted]
    if isinstance(model, LinearProbe) and isinstance(tuning, ProbeTuning):
        learn = partial(fit_probe, model, tuning, examples, windows, metrics_of, save, run, guard=guard)
    else:
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
            }
            | ({"augment": asdict(augment)} if augment.share else {}),
        )
        learn = partial(loop.fit, task, run)
    fitted = train_part(learn, guard, encoded)
    kept = measured(fitted.metrics)
    warn(kept)
    best, last = _uncalibrated(fitted.metrics), _uncalibrated(fitted.last_metrics)
    return replace(fitted, metrics=best, last_metrics=last).write(
        run.output_dir,
        examples=len(examples),
        validation_examples=len(validation),
        calibrated=summary(kept),
    )


def _uncalibrated(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in DETECTION_METRICS}


def _windows(
    encoder: DetectorEncoder, records: Sequence[LabelledAnswer], window: int
) -> "list[list[array[int]]]":
    """The windows of each answer, 4 bytes a token; few at a time as lists, which take more memory."""
    return [
        [array("i", row) for row in rows]
        for start in range(0, len(records), 1000)
        for some in [records[start : start + 1000]]
        for rows in encoder.windows(
            queries=[record.query for record in some],
            answers=[record.answer for record in some],
            window=window,
        )
    ]
