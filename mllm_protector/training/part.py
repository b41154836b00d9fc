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
from mllm_protector.models.backbone import Backbone, require_length
from mllm_protector.models.guard_file import GuardFile, Kind, warn_of
from mllm_protector.models.packing import use_packed_attention
from mllm_protector.models.parts import library_versions, provenance
from mllm_protector.models.tuning import ProbeTuning, Tuning
from mllm_protector.models.tuning import Task as ModelTask
from mllm_protector.processes import first_process_first
from mllm_protector.training.checkpoints import Fitted

log = logging.getLogger(__name__)


def open_backbone(backbone: Callable[[], Backbone], seed: int) -> Backbone:
    """The backbone's description; one that has to be made first is made once, from the seed."""
    set_seed(seed)
    with first_process_first():
        return backbone()


def tuned(
    pretrained: PreTrainedModel,
    task: ModelTask,
    fresh: Sequence[str],
    tuning: Tuning,
    *,
    max_length: int,
    packing: bool,
) -> torch.nn.Module:
    """The model to train; ``fresh`` are its modules without pretrained weights.

    Raises:
        InputError: the model has fewer positions, cannot be tuned so, or cannot read packed texts.
    """
    require_length(pretrained, max_length)
    model = tuning.prepare(pretrained, task, fresh)
    if packing:
        use_packed_attention(model)
    return model


def unmeasured(
    kind: Kind,
    base: Backbone,
    tuning: Tuning | ProbeTuning,
    encoder: DetectorEncoder | DetoxifierEncoder,
    data: Mapping[str, Any],
    **own: Any,
) -> GuardFile:
    """The ``guard.json`` of a part before its training, with the fields of this kind of part."""
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


def train_part(learn: Callable[[], Fitted], guard: GuardFile, encoded: Tokenized[Any]) -> Fitted:
    """Train a part, with warnings of texts that are too long and of a part that guards nothing."""
    for count, words in (
        (encoded.shortened, "questions are too long for max_length=%d tokens: only head and tail are read"),
        (encoded.truncated, "texts are longer than max_length=%d tokens and were cut"),
    ):
        if count:
            log.warning("%d of %d training " + words, count, len(encoded), guard.max_length)  # noqa: G003
    warn_of(guard)
    fitted = learn()
    warn_of(guard)
    return fitted
