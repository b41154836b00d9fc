"""The path that both parts of the guard share in training; they differ in encoder, loss and metrics."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from mllm_protector.data.detoxifier_encoding import DetoxifierEncoder
from mllm_protector.data.encoding import DetectorEncoder
from mllm_protector.data.tokenized import Tokenized
from mllm_protector.models.backbone import Backbone
from mllm_protector.models.guard_file import GuardFile, Kind, library_versions, warn_of
from mllm_protector.models.packing import use_packed_attention
from mllm_protector.models.parts import provenance
from mllm_protector.models.tuning import Task as ModelTask
from mllm_protector.models.tuning import Tuning
from mllm_protector.processes import first_process_first
from mllm_protector.training.best import Fitted
from mllm_protector.training.loop import Task, fit
from mllm_protector.training.settings import Run

log = logging.getLogger(__name__)


def open_backbone(backbone: Callable[[], Backbone], seed: int) -> Backbone:
    """The backbone's description; one that has to be made first is made once, from the seed."""
    set_seed(seed)
    with first_process_first():
        return backbone()


def tuned(
    pretrained: PreTrainedModel, task: ModelTask, fresh: Sequence[str], tuning: Tuning, *, packing: bool
) -> torch.nn.Module:
    """The model to train.

    Args:
        pretrained: as loaded.
        task: what it is trained for.
        fresh: its modules without pretrained weights.
        tuning: adapters or everything.
        packing: texts will be packed.

    Raises:
        InputError: the model cannot be tuned so, or cannot read packed texts.
    """
    model = tuning.prepare(pretrained, task, fresh)
    if packing:
        use_packed_attention(model)
    return model


def unmeasured(
    kind: Kind,
    base: Backbone,
    tuning: Tuning,
    encoder: DetectorEncoder | DetoxifierEncoder,
    data: Mapping[str, Any],
    **own: Any,
) -> GuardFile:
    """The ``guard.json`` of a part before its training: no metrics yet.

    Args:
        kind: which part it is.
        base: what it is trained from.
        tuning: adapters or everything.
        encoder: renders its input.
        data: facts about the training data.
        own: fields of this kind of part.
    """
    return GuardFile(
        kind=kind,
        tuning=tuning.kind,
        **provenance(base),
        prompt=encoder.prompt,
        max_length=encoder.max_length,
        pad_id=encoder.pad_id,
        data=dict(data),
        metrics={},
        versions=library_versions(),
        **own,
    )


def train_part(task: Task, run: Run, guard: GuardFile, encoded: Tokenized[Any]) -> Fitted:
    """Train a part, with the warnings that its user needs.

    Args:
        task: what to learn.
        run: how and where.
        guard: from ``unmeasured``.
        encoded: the training rows, which know how many texts were too long.
    """
    if encoded.shortened:
        log.warning(
            "%d of %d training questions are too long for max_length=%d tokens: only head and tail are read",
            encoded.shortened,
            len(encoded),
            guard.max_length,
        )
    if encoded.truncated:
        log.warning(
            "%d of %d training texts are longer than max_length=%d tokens and were cut",
            encoded.truncated,
            len(encoded),
            guard.max_length,
        )
    warn_of(guard)
    fitted = fit(task, run)
    warn_of(guard)
    return fitted
