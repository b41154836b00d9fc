"""Training the response detoxifier: its encoder, its metrics, its entry function."""

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from mllm_protector import prompts
from mllm_protector.data.batching import pack_corrections
from mllm_protector.data.detoxifier_encoding import DetoxifierEncoder
from mllm_protector.data.preparation import Contaminated, prepare
from mllm_protector.data.sources import Source
from mllm_protector.data.tokenized import tokenized
from mllm_protector.data.tokens import choose_pad_id
from mllm_protector.errors import InputError
from mllm_protector.files import content_key
from mllm_protector.metrics import perplexity
from mllm_protector.models.backbone import Backbone
from mllm_protector.models.parts import save_part
from mllm_protector.models.tuning import ProbeTuning, Tuning
from mllm_protector.processes import Processes, first_process_first
from mllm_protector.protocols import Benchmark
from mllm_protector.ranges import Count, Seed, Share
from mllm_protector.records import AnswerPair, Correction, corrections
from mllm_protector.refusals import find_refusal
from mllm_protector.training import loop
from mllm_protector.training.checkpoints import require_metric
from mllm_protector.training.logging import Tracker
from mllm_protector.training.loop import Run, Task, Weights
from mllm_protector.training.losses import LanguageLoss, mean_loss
from mllm_protector.training.part import open_backbone, train_part, tuned, unmeasured
from mllm_protector.training.settings import CheckpointConfig, FitConfig, Resume

log = logging.getLogger(__name__)

METRICS = ("loss", "perplexity", "perplexity_shuffled_rejected")
"""The metrics of a validation; see ``train_detoxifier``."""


def train_detoxifier(
    *,
    data: Source,
    benchmarks: Mapping[str, Benchmark],
    contaminated: Contaminated,
    both_harmful: Literal["drop", "safer"],
    refusals: Share,
    backbone: Callable[[], Backbone],
    tuning: Tuning | ProbeTuning,
    fit: FitConfig,
    checkpoint: CheckpointConfig,
    resume: Resume,
    tracker: Tracker,
    max_length: Count,
    prompt: str | None,
    chat: bool,
    output_dir: str,
    seed: Seed,
) -> dict[str, Any]:
    """Train a detoxifier and write it, with its metrics, to ``output_dir``.

    ``configs/train_detoxifier.yaml`` describes the arguments. ``backbone`` is called once.

    Returns:
        The content of ``metrics.json``: ``loss`` (nats per target token, or per example, as
        ``fit.normalise`` says), ``perplexity`` (per token), and ``perplexity_shuffled_rejected``, the same
        with the rejected answers exchanged. A model that reads what it corrects is worse there.

    Raises:
        InputError: the data, the backbone or the settings cannot be used.
    """
    require_metric(fit.best_metric, METRICS)
    if isinstance(tuning, ProbeTuning):
        raise InputError("tuning=probe: is for detectors; use full or lora")
    if getattr(tuning, "precompute", False):
        raise InputError("tuning.precompute=true: is for detectors; use false")
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

    def learnt(part: Iterable[Any]) -> Iterator[Correction]:
        return _with_share(corrections(_pairs(part), both_harmful), refusals, seed)

    train, validation = learnt(splits.train), list(learnt(splits.validation))
    if len(validation) < 2:
        which = "" if refusals == 1 else f", with refusals={refusals}"
        raise InputError(
            f"the validation split has fewer than two harmful answers with a harmless one beside{which}"
        )

    base = open_backbone(backbone, seed)
    tokenizer = base.load_tokenizer()
    encoder = DetoxifierEncoder(
        tokenizer,
        pad_id=choose_pad_id(tokenizer),
        max_length=max_length,
        prompt=prompts.DETOXIFIER if prompt is None else prompt,
        chat=chat,
    )
    pretrained = base.load_causal_lm()
    model = tuned(pretrained, "CAUSAL_LM", [], tuning, max_length=max_length, packing=fit.packing)
    loss = LanguageLoss(model)
    content = splits.fingerprint, both_harmful, refusals < 1 and [refusals, seed]
    with first_process_first():
        encoded, encoded_validation, shuffled = (
            tokenized(encoder, rows, content=content_key(*content, part))
            for rows, part in (
                (train, ["train"]),
                (validation, ["validation"]),
                (shuffle_rejected(validation, seed), ["shuffled", seed]),
            )
        )
    log.info("%d and %d pairs show a harmful answer made harmless", len(encoded), len(validation))
    target_tokens = sum(len(row.target) for row in encoded_validation)
    data_facts = {**prepared.facts(), "both_harmful": both_harmful, "refusals": refusals}
    guard = unmeasured("detoxifier", base, tuning, encoder, data_facts, chat=chat)

    def evaluate(model: torch.nn.Module, processes: Processes[tuple[float, int]]) -> dict[str, float]:
        limit = fit.validation_batch
        per_token = mean_loss(model, loss, encoded_validation, encoder, processes, limit=limit)
        control = mean_loss(model, loss, shuffled, encoder, processes, limit=limit)
        tokens = 1 if fit.normalise == "tokens" else target_tokens / len(validation)
        return {
            "loss": per_token * tokens,
            "perplexity": perplexity(per_token),
            "perplexity_shuffled_rejected": perplexity(control),
        }

    def save(folder: Path, metrics: dict[str, float], weights: Weights) -> None:
        save_part(model, tokenizer, replace(guard, metrics=metrics), folder, weights)

    task = Task(
        model=model,
        examples=encoded,
        collate=pack_corrections if fit.packing else encoder,
        loss=loss,
        evaluate=evaluate,
        save=save,
        identity=guard.origin() | {"base": asdict(base), "tuning": str(tuning)},
    )
    fitted = train_part(partial(loop.fit, task, run), guard, encoded)
    return fitted.write(run.output_dir, examples=len(encoded), validation_examples=len(validation))


def shuffle_rejected(records: Sequence[Correction], seed: int) -> list[Correction]:
    """The same records, each with another one's rejected answer: a random rotation, so none keeps its own."""
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    donor = dict(zip(order, order[1:] + order[:1], strict=True))
    return [replace(record, rejected=records[donor[index]].rejected) for index, record in enumerate(records)]


def _with_share(found: Iterable[Correction], refusals: float, seed: int) -> Iterator[Correction]:
    """Only this share of those whose accepted answer refuses, drawn at random."""
    draw = random.Random(seed)
    for each in found:
        if refusals == 1 or not find_refusal(each.accepted) or draw.random() < refusals:
            yield each


def _pairs(records: Iterable[Any]) -> Iterator[AnswerPair]:
    for record in records:
        if not isinstance(record, AnswerPair):
            raise InputError(
                "data: this source has single labelled answers; the detoxifier learns from pairs"
            )
        yield record
