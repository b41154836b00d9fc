"""The harm detector: an LLM backbone whose last layer is a linear layer with one output.

Source: paper arXiv 2401.02906, section 3. It scores (question, answer) together, in training and in use;
the encoder, which turns them into ids, is part of the checkpoint.

A long answer is scored in overlapping windows and counts as harmful as the worst of them. A detector only
knows texts of the lengths that it was trained on: read as one long text, a harmful sentence among many
harmless ones is missed even where all of it fits. Texts are read normalised (``normalisation``), and where
that changes one much, as written too, and so is what an answer seems to say in a code (``deciphering``); the
highest score counts.
"""

import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mllm_protector import deciphering, normalisation
from mllm_protector.arguments import require_texts
from mllm_protector.data.batching import MicroBatchLimit, by_length
from mllm_protector.data.encoding import DetectorEncoder
from mllm_protector.data.tokens import OVERLAP, SENTENCE
from mllm_protector.errors import InputError, RunError
from mllm_protector.models.backbone import Backbone, inference, pick_device, to_device
from mllm_protector.models.guard_file import GuardFile, read_guard_file
from mllm_protector.models.parts import adapter_weights, add_adapter, part_backbone, save_part
from mllm_protector.models.probe import load_probe
from mllm_protector.progress import Progress
from mllm_protector.protocols import Card
from mllm_protector.records import LabelledAnswer

BATCH_TOKENS = 4096
"""Positions that are scored at once."""

Row = Sequence[int]
"""Token ids."""

AT_ONCE = 1024
"""Answers between two steps of a progress bar."""

REMEMBERED = 65_536
"""Rows whose logits a detector keeps."""


class HarmDetector:
    """A trained detector, ready to score.

    An answer that fits (into ``max_length`` with its question, and into ``window``) costs one row of a
    forward pass. A longer one of n tokens costs about n / (window - overlap) rows, each with the question
    and the prompt again: time grows in proportion to n, and memory stays what ``batch_tokens`` allows. The
    overlap is a quarter of a window, at least 32 tokens, and at most half a window.

    The worst of many windows is more often high by chance than one window: where answers are long, choose
    the threshold on answers as long as these.

    Attributes:
        known: logits of rows that were scored, which are not computed again. Give it an empty dict where
            answers grow, as in a judged stream: then only the new end is read. ``None``, the default, to keep
            none.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        encoder: DetectorEncoder,
        guard: GuardFile,
        *,
        batch_tokens: int = BATCH_TOKENS,
        window: int | None = None,
        decipher: bool = True,
    ) -> None:
        """Bind a sequence classifier with one output, perhaps wrapped by PEFT, to how it is used.

        ``batch_tokens`` are positions in one forward pass, padding included; ``window`` is the most tokens of
        an answer that are read at once, ``None`` for what ``guard`` says. With ``decipher`` it also reads
        what an answer seems to say in a code or a disguise (``deciphering``).

        Raises:
            InputError: a window of no tokens.
        """
        self.model = model
        self.encoder = encoder
        self.guard = guard
        self.limit = MicroBatchLimit(tokens=batch_tokens)
        self.window = guard.window if window is None else window
        self.decipher = decipher
        self.known: dict[bytes, float] | None = None
        if self.window is not None and self.window < 1:
            raise InputError(f"window={self.window}: must be at least 1 token")

    @property
    def threshold(self) -> float:
        """Scores at or above it are harmful."""
        return self.guard.harmful_from

    def logits(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The logit of each answer to its query: the worst of its windows and readings, NaN if one is."""
        require_texts(queries=queries, answers=answers)
        windows = self.encoder.windows(
            queries=queries, answers=answers, window=self.window, decipher=self.decipher
        )
        score = partial(score_logits, self.model, self.encoder, limit=self.limit)
        return worst_logits(windows, score, self.known)

    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        """P(harmful) in [0, 1] of each answer to its query.

        Raises:
            InputError: not two lists of texts of the same length.
        """
        return self.guard.scale.scores(self.logits(queries=queries, answers=answers))

    @property
    def card(self) -> Card:
        """What the scores depend on: weights, prompt, lengths, scale, threshold."""
        return card_of(self.guard, self.window, decipher=self.decipher)

    def save(self, folder: Path) -> None:
        """Write weights, tokenizer and ``guard.json`` (last) to a folder."""
        save_part(self.model, self.encoder.tokenizer, self.guard, folder)


def logits_of(detector: HarmDetector, records: Sequence[LabelledAnswer]) -> list[float]:
    """The logit of each answer, with a progress bar.

    Raises:
        RunError: one is not a number.
    """
    logits: list[float] = []
    with Progress("scoring", "answer", len(records)) as bar:
        for start in range(0, len(records), AT_ONCE):
            part = records[start : start + AT_ONCE]
            logits += detector.logits(
                queries=[record.query for record in part], answers=[record.answer for record in part]
            )
            bar.update(len(part))
    if not all(map(math.isfinite, logits)):
        raise RunError("a score is not a number, so the detector's weights are broken; train it again")
    return logits


def card_of(guard: GuardFile, window: int | None, *, decipher: bool = True) -> Card:
    """The card of the detector that a guard file describes, without loading it."""
    return Card(
        identity={
            **guard.identity,
            "joined": guard.joined,
            "normalisation": normalisation.VERSION,
            "deciphering": deciphering.VERSION if decipher else None,
            "window": window,
            "overlap": {"share": OVERLAP, "tokens": SENTENCE},
            "temperature": guard.temperature,
            "offset": guard.offset,
            "threshold": guard.harmful_from,
        }
    )


def load_detector(
    folder: str | Path,
    *,
    base: str | None = None,
    device: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    window: int | None = None,
    decipher: bool = True,
    trust_remote_code: bool = False,
) -> HarmDetector:
    """Load a trained detector.

    Args:
        folder: what ``train_detector`` wrote.
        base: where the backbone of an adapter is now; ``None`` to look where it was, and near the folder.
        device: ``None`` takes the GPU if there is one.
        batch_tokens: as in ``HarmDetector``.
        window: as in ``HarmDetector``; ``max_length`` or more for as many tokens as fit.
        decipher: as in ``HarmDetector``.
        trust_remote_code: run code that comes with the model. Leave it off unless you have read that code.

    Raises:
        InputError: not a detector, another prompt or other files than it was saved with, another base than
            it was trained on, its head is missing, or a window of no tokens.
    """
    folder = Path(folder)
    guard = read_guard_file(folder, "detector")
    where = pick_device(device)
    encoder = detector_encoder(folder, guard, trust_remote_code=trust_remote_code)
    backbone = part_backbone(guard, folder, base, trust_remote_code=trust_remote_code)
    model = load_classifier(folder, guard, backbone).to(where)
    return HarmDetector(model, encoder, guard, batch_tokens=batch_tokens, window=window, decipher=decipher)


def load_classifier(folder: Path, guard: GuardFile, backbone: Backbone) -> torch.nn.Module:
    """A detector's weights in evaluation mode, on the CPU; ``backbone`` as by ``part_backbone``.

    Raises:
        InputError: the weights cannot be loaded, or the head is missing.
    """
    if guard.tuning == "probe":
        return load_probe(folder, backbone).eval()
    model, untrained = backbone.load_classifier(pad_id=guard.pad_id)
    if guard.tuning == "lora":
        keys = adapter_weights(folder).keys()
        untrained = [module for module in untrained if not any(f".{module}." in key for key in keys)]
    if untrained:
        raise InputError(
            f"{folder}: the trained head ({', '.join(untrained)}) is missing; scores would be random"
        )
    return (add_adapter(model, folder) if guard.tuning == "lora" else model).eval()


def detector_encoder(folder: Path, guard: GuardFile, *, trust_remote_code: bool = False) -> DetectorEncoder:
    """The renderer that a detector was trained with."""
    return DetectorEncoder(
        Backbone(name=str(folder), trust_remote_code=trust_remote_code).load_tokenizer(),
        pad_id=guard.pad_id,
        max_length=guard.max_length,
        prompt=guard.prompt,
        joined=guard.joined,
    )


def score_logits(
    model: torch.nn.Module, encoder: DetectorEncoder, rows: Sequence[Row], *, limit: MicroBatchLimit
) -> list[float]:
    """The logit of each row of ids, batched by length so that little is padded.

    ``model`` maps (B, T) ids and mask to logits (B, 1); ``limit`` is of one forward pass.
    """
    logits = [0.0] * len(rows)
    with inference(model):
        for chosen in by_length([len(row) for row in rows], limit):
            output = model(**to_device(encoder.pad([rows[index] for index in chosen]), model))
            for index, logit in zip(chosen, output.logits[:, 0].float().tolist(), strict=True):
                logits[index] = logit
    return logits


def worst_logits(
    windows: Sequence[Sequence[Row]],
    score: Callable[[Sequence[Row]], list[float]],
    known: dict[bytes, float] | None = None,
) -> list[float]:
    """The highest logit among the rows of each answer; NaN if one is, which ``max`` alone may overlook.

    Args:
        windows: the rows of each answer.
        score: gives the logit of each row; called once, with rows that all differ.
        known: logits of earlier calls, which are not computed again; filled with new ones, ``REMEMBERED`` at
            most.
    """
    known = {} if known is None else known
    keys = [hashlib.sha256(array("i", row)).digest() for rows in windows for row in rows]
    rows = dict(zip(keys, (row for rows in windows for row in rows), strict=True))
    found = {key: logit for key in rows if (logit := known.get(key)) is not None}
    new = [key for key in rows if key not in found]
    scored = dict(zip(new, score([rows[key] for key in new]), strict=True))
    known.update((key, logit) for key, logit in scored.items() if math.isfinite(logit))
    if (excess := len(known) - REMEMBERED) > 0:
        for oldest in [*known][:excess]:
            known.pop(oldest, None)  # another thread may have done so
    found |= scored
    return worst_of([found[key] for key in keys], windows)


def worst_of(logits: Sequence[float], windows: Sequence[Sequence[Any]]) -> list[float]:
    """The highest logit of each answer, whose rows follow one another; NaN if one is."""
    rest = iter(logits)
    each = [list(islice(rest, len(rows))) for rows in windows]
    return [math.nan if any(map(math.isnan, found)) else max(found) for found in each]
