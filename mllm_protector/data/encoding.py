"""Texts to token ids to tensors for the detector: one renderer for training and for inference.

An encoder is the only way to feed a trained part. It is saved in the checkpoint, so a detector that was
trained on question and answer cannot be run on the answer alone (the official code trains with the
question and scores without it).

Each text is encoded on its own and the ids are joined, never re-tokenised: the border between prompt and
answer is exact. (A detector that was trained on prompt and texts in one piece reads them so: ``joined``.) A
user's text is encoded with ``split_special_tokens``: ``</s>`` in an answer is four characters, not the end
of the sequence.

What a detector reads is normalised (``normalisation``), in training as in use: the same words disguised are
the same words. A detoxifier reads texts as they are.

No text is dropped without a count. A detector reads a long answer in windows (``DetectorEncoder.windows``);
a detoxifier, which must read it at once, sees its head and its tail.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mllm_protector import normalisation, prompts
from mllm_protector.data.layout import OVERLAP, lay_out, window_starts
from mllm_protector.data.tokens import (
    JoinedPrompt,
    encode_literal,
    encode_pairs,
    share,
    special_affixes,
    without_pad,
)
from mllm_protector.errors import InputError
from mllm_protector.normalisation import normalised, readings
from mllm_protector.records import LabelledAnswer

log = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]

IGNORED = -100
"""The label of positions that carry no loss."""


@dataclass(frozen=True, slots=True)
class EncodedAnswer:
    """A rendered (question, answer): ids, and the label 1.0 for harmful."""

    ids: list[int]
    label: float

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class EncodedCorrection:
    """A rendered prompt and the ids to learn behind it, the end token included."""

    prompt: list[int]
    target: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


class DetectorEncoder:
    """Renders (question, answer) for the harm detector, padded on the right.

    Attributes:
        truncated: training answers of which only the head was rendered (``encode``).
        shortened: questions of which only head and tail were rendered, in training and in use.
    """

    example = EncodedAnswer

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pad_id: int,
        max_length: int,
        prompt: str = prompts.DETECTOR,
        joined: bool = False,
    ) -> None:
        """Bind the tokenizer to a prompt.

        Args:
            tokenizer: of the backbone; its own first and last special tokens (BOS, [CLS], [SEP]) are kept.
            pad_id: an id that no rendered text contains (``choose_pad_id``).
            max_length: the longest sequence in tokens (see ``encode`` and ``windows`` for longer ones).
            prompt: a template with the fields ``query`` and ``answer``.
            joined: the prompt and the texts are tokenised in one piece (``tokens.JoinedPrompt``).

        Raises:
            InputError: a prompt without those fields, or too long for ``max_length``, or ``joined`` with a
                tokenizer that does not tell where in a text its tokens are.
        """
        self.tokenizer = tokenizer
        self.pad_id = pad_id
        self.max_length = max_length
        self.prompt = checked_prompt(prompt)
        first, last = special_affixes(tokenizer)
        if pad_id in first + last:
            raise InputError(f"pad id {pad_id} is also one of the tokenizer's own first or last tokens")
        self._layout = lay_out(prompt, partial(encode_literal, tokenizer), first=first, last=last)
        self._gap = encode_literal(tokenizer, prompts.GAP)
        self._room = max_length - self._layout.size
        if self._room < 2:
            raise InputError(
                f"max_length={max_length}: too short for the prompt and two texts, "
                f"which take at least {self._layout.size + 2} tokens"
            )
        self.joined = joined
        self._whole = JoinedPrompt(tokenizer, prompt, max_length, self._room, pad_id) if joined else None
        self.truncated = 0
        self.shortened = 0

    def identity(self) -> dict[str, Any]:
        """All that the ids of a text depend on beside the tokenizer and this code, for JSON."""
        return {
            "kind": "detector",
            "normalisation": normalisation.VERSION,
            "prompt": self.prompt,
            "joined": self.joined,
            "max_length": self.max_length,
            "pad_id": self.pad_id,
            "layout": self._layout.parts,
            "gap": self._gap,
        }

    def encode(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[list[int]]:
        """Token ids of each rendered pair, normalised, one row each: what a detector learns from.

        A pair too long for ``max_length`` loses the end of its answer (``truncated`` counts it): its label is
        that of the whole answer, and the head is what an answer in use begins with. The question gives way
        as in ``windows``.
        """
        queries, answers = [*map(normalised, queries)], [*map(normalised, answers)]
        if self._whole is not None:
            each = self._windows(queries, answers, None, OVERLAP)
            self.truncated += sum(len(rows) > 1 for rows in each)
            return [rows[0] for rows in each]
        rendered = []
        for query, answer in encode_pairs(self.tokenizer, queries, answers):
            self.truncated += len(query) + len(answer) > self._room
            query, size = self._share(query, len(answer))
            rendered.append(self._render(query, answer[:size]))
        return rendered

    def windows(
        self,
        *,
        queries: Sequence[str],
        answers: Sequence[str],
        window: int | None = None,
        overlap: float = OVERLAP,
    ) -> list[list[list[int]]]:
        """Token ids of each pair in as many rows as its answer needs, each with the question.

        An answer that fits gives the one row that ``encode`` gives. Of a longer one every token is in at
        least one row; ``layout.window_starts`` says how the rows overlap. A question gives way only where
        the pair does not fit, to what the answer (or one window of it) leaves and never to less than half of
        the room: its head and tail stay, with ``prompts.GAP`` between them. ``shortened`` counts it. A pair
        that normalisation changes much is read as it was written, too, in further rows.

        Args:
            queries: what was asked.
            answers: of any length; the number of rows grows in proportion to it.
            window: the most tokens of an answer in one row; ``None`` for as many as fit.
            overlap: the share of a window that its neighbour repeats.

        Returns:
            The rows of each answer, in the answer's order.
        """
        each = [readings(*pair) for pair in zip(queries, answers, strict=True)]
        asked, said = zip(*(pair for pairs in each for pair in pairs), strict=True) if each else ((), ())
        rows = iter(self._windows(asked, said, window, overlap))
        return [[row for _ in pairs for row in next(rows)] for pairs in each]

    def _windows(
        self, queries: Sequence[str], answers: Sequence[str], window: int | None, overlap: float
    ) -> list[list[list[int]]]:
        if self._whole is not None:
            pairs = self._whole.windows(queries, answers, window, overlap)
            for pair in pairs:
                if pair.shortened:
                    self._count_shortened(pair.shortened)
            return [pair.rows for pair in pairs]
        rendered = []
        for query, answer in encode_pairs(self.tokenizer, queries, answers):
            query, size = self._share(query, len(answer) if window is None else min(len(answer), window))
            starts = window_starts(len(answer), size, overlap)
            rendered.append([self._render(query, answer[start : start + size]) for start in starts])
        return rendered

    def encode_records(self, records: Sequence[LabelledAnswer]) -> list[EncodedAnswer]:
        """Training records as ids and label."""
        ids = self.encode(queries=[r.query for r in records], answers=[r.answer for r in records])
        return [EncodedAnswer(i, float(r.harmful)) for i, r in zip(ids, records, strict=True)]

    def pad(self, rows: Sequence[Sequence[int]]) -> Batch:
        """``input_ids`` and ``attention_mask``, both (B, T) int64, padded on the right."""
        return padded(rows, self.pad_id, side="right")

    def __call__(self, rows: Sequence[EncodedAnswer]) -> Batch:
        """The collate function: ``pad`` plus ``labels`` (B,) float32."""
        batch = self.pad([row.ids for row in rows])
        batch["labels"] = torch.tensor([row.label for row in rows], dtype=torch.float32)
        return batch

    def _share(self, query: list[int], wanted: int) -> tuple[list[int], int]:
        """The question as it is rendered, and how many of ``wanted`` tokens of an answer fit beside it."""
        kept, size = share(query, wanted, self._room, self._gap)
        if kept is not query:
            self._count_shortened(len(query))
        return kept, size

    def _count_shortened(self, length: int) -> None:
        if not self.shortened:
            log.warning(
                "a question of %d tokens is too long for max_length=%d: its head and tail are read, "
                "and its middle is left out; further ones are only counted",
                length,
                self.max_length,
            )
        self.shortened += 1

    def _render(self, query: list[int], answer: list[int]) -> list[int]:
        return without_pad(self._layout.fill(query, answer), self.pad_id)


def collate_targets(rows: Sequence[EncodedCorrection], pad_id: int) -> Batch:
    """Right-padded ids and mask, and ``labels`` (B, T) int64: the target's ids at the target's positions,
    ``IGNORED`` elsewhere.
    """
    batch = padded([row.prompt + row.target for row in rows], pad_id, side="right")
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for index, row in enumerate(rows):
        start = len(row.prompt)
        labels[index, start : start + len(row.target)] = torch.tensor(row.target)
    batch["labels"] = labels
    return batch


def checked_prompt(prompt: str) -> str:
    """The prompt itself.

    Raises:
        InputError: it does not have the fields ``query`` and ``answer``.
    """
    try:
        return prompts.require_fields(prompt, {"query", "answer"})
    except ValueError as error:
        raise InputError(f"prompt={prompt}: {error}") from None


def padded(rows: Sequence[Sequence[int]], pad_id: int, *, side: str) -> Batch:
    """``input_ids`` and ``attention_mask``, both (B, T) int64, padded on the ``left`` or ``right``."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, where] = torch.tensor(row)
        mask[index, where] = 1
    return {"input_ids": ids, "attention_mask": mask}
