"""Texts to token ids to tensors: one renderer for training and for inference; here that of the detector.

An encoder is the only way to feed a trained part. It is saved in the checkpoint, so a detector that was
trained on question and answer cannot be run on the answer alone (the official code trains with the
question and scores without it).

Each text is encoded on its own and the ids are joined, never re-tokenised: the border between prompt and
answer is exact. (A detector that was trained on prompt and texts in one piece reads them so: ``joined``.)

A detector reads normalised texts (``normalisation``), in training as in use: the same words disguised are
the same words. It reads a long answer in windows. A detoxifier reads texts as they are, and of a long one the
head and the tail. No text is cut without a count.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from mllm_protector import normalisation, prompts
from mllm_protector.data.tokens import (
    JoinedPrompt,
    Layout,
    encode_literal,
    encode_pairs,
    lay_out,
    share,
    special_affixes,
    window_starts,
    without_pad,
)
from mllm_protector.deciphering import deciphered
from mllm_protector.errors import InputError
from mllm_protector.normalisation import normalised, readings
from mllm_protector.records import LabelledAnswer

log = logging.getLogger(__name__)

R = TypeVar("R")
E = TypeVar("E", bound=Sized)

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


class PromptEncoder(ABC, Generic[R, E]):
    """The common part of both encoders, of records as examples.

    Attributes:
        example: what a record is encoded as.
        truncated: answers that were cut: of the detector in training, of the detoxifier always. A pair of the
            detoxifier with a question that was cut is one of them.
        shortened: questions of the detector of which only head and tail were rendered.
    """

    example: type[E]

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_id: int, max_length: int, prompt: str) -> None:
        self.tokenizer = tokenizer
        self.pad_id = pad_id
        self.max_length = max_length
        self.prompt = checked_prompt(prompt)
        self.truncated = 0
        self.shortened = 0
        self._layout = Layout([])
        self._gap = encode_literal(tokenizer, prompts.GAP)

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that the ids of a text depend on beside the tokenizer and this code, for JSON."""

    @abstractmethod
    def encode_records(self, records: Sequence[R]) -> list[E]:
        """One example for each record."""

    def _identity(self, kind: str, **own: Any) -> dict[str, Any]:
        # The prompt's own ids are among it: a chat template may write the date.
        return {
            "kind": kind,
            "prompt": self.prompt,
            "max_length": self.max_length,
            "pad_id": self.pad_id,
            "layout": self._layout.parts,
            "gap": self._gap,
            **own,
        }


class DetectorEncoder(PromptEncoder[LabelledAnswer, EncodedAnswer]):
    """Renders (question, answer) for the harm detector, padded on the right."""

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
        super().__init__(tokenizer, pad_id, max_length, prompt)
        first, last = special_affixes(tokenizer)
        if pad_id in first + last:
            raise InputError(f"pad id {pad_id} is also one of the tokenizer's own first or last tokens")
        self._layout = lay_out(prompt, partial(encode_literal, tokenizer), first=first, last=last)
        self._room = max_length - self._layout.size
        if self._room < 2:
            raise InputError(
                f"max_length={max_length}: too short for the prompt and two texts, "
                f"which take at least {self._layout.size + 2} tokens"
            )
        self.joined = joined
        self._whole = JoinedPrompt(tokenizer, prompt, max_length, self._room, pad_id) if joined else None

    def identity(self) -> dict[str, Any]:
        """Everything that the ids of a text depend on beside the tokenizer and this code, for JSON."""
        return self._identity("detector", normalisation=normalisation.VERSION, joined=self.joined)

    @property
    def closing(self) -> int:
        """How many tokens of the prompt end every row; 1 where it ends with the answer."""
        return max(1, len(self._layout.parts[-1][0]))

    def encode(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[list[int]]:
        """Token ids of each rendered pair, normalised, one row each: a detector learns from these.

        A pair too long for ``max_length`` loses the end of its answer (``truncated`` counts it): its label is
        that of the whole answer, and the head is what an answer in use begins with. The question gives way
        as in ``windows``.
        """
        each = self._windows([*map(normalised, queries)], [*map(normalised, answers)], None)
        self.truncated += sum(len(rows) > 1 for rows in each)
        return [rows[0] for rows in each]

    def windows(
        self,
        *,
        queries: Sequence[str],
        answers: Sequence[str],
        window: int | None = None,
        decipher: bool = True,
    ) -> list[list[list[int]]]:
        """Token ids of each pair in as many rows as its answer needs, each with the question.

        An answer that fits gives the one row that ``encode`` gives. Of a longer one every token is in at
        least one row; ``tokens.window_starts`` says how the rows overlap. A question gives way only where
        the pair does not fit, to what the answer (or one window of it) leaves and never to less than half of
        the room: its head and tail stay, with ``prompts.GAP`` between them. ``shortened`` counts it. A pair
        that normalisation changes much is read as it was written, too, in further rows; so is what an answer
        seems to say in a code (``deciphering``).

        Args:
            queries: one for each answer.
            answers: of any length; the number of rows grows in proportion to it.
            window: the most tokens of an answer in one row; ``None`` for as many as fit.
            decipher: read what an answer seems to say in a code, too.

        Returns:
            The rows of each answer, in the answer's order.
        """
        each = [
            [
                pair
                for text in (answer, *(deciphered(answer) if decipher else ()))
                for pair in readings(query, text)
            ]
            for query, answer in zip(queries, answers, strict=True)
        ]
        asked, said = zip(*(pair for pairs in each for pair in pairs), strict=True) if each else ((), ())
        rows = iter(self._windows(asked, said, window))
        return [[row for _ in pairs for row in next(rows)] for pairs in each]

    def _windows(
        self, queries: Sequence[str], answers: Sequence[str], window: int | None
    ) -> list[list[list[int]]]:
        rendered = []
        if self._whole is not None:
            for rows, shortened in self._whole.windows(queries, answers, window):
                self._count_shortened(shortened)
                rendered.append(rows)
            return rendered
        for query, answer in encode_pairs(self.tokenizer, queries, answers):
            wanted = len(answer) if window is None else min(len(answer), window)
            kept, size = share(query, wanted, self._room, self._gap)
            self._count_shortened(None if kept is query else len(query))
            starts = window_starts(len(answer), size)
            ids = (self._layout.fill(kept, answer[start : start + size]) for start in starts)
            rendered.append([without_pad(row, self.pad_id) for row in ids])
        return rendered

    def _count_shortened(self, length: int | None) -> None:
        if length is None:
            return
        if not self.shortened:
            log.warning(
                "a question of %d tokens is too long for max_length=%d: its head and tail are read, "
                "and its middle is left out; further ones are only counted",
                length,
                self.max_length,
            )
        self.shortened += 1

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


def collate_targets(rows: Sequence[EncodedCorrection], pad_id: int) -> Batch:
    """Right-padded ids and mask, and ``labels`` (B, T) int64: the target's ids at the target's positions,
    ``IGNORED`` elsewhere.
    """
    batch = padded([row.prompt + row.target for row in rows], pad_id, side="right")
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for index, row in enumerate(rows):
        labels[index, len(row.prompt) : len(row)] = torch.tensor(row.target)
    batch["labels"] = labels
    return batch


def padded(rows: Sequence[Sequence[int]], pad_id: int, *, side: str) -> Batch:
    """``input_ids`` and ``attention_mask``, both (B, T) int64, padded on the ``left`` or ``right``."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, where] = torch.tensor(row)
        mask[index, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def checked_prompt(prompt: str) -> str:
    """The prompt itself; an ``InputError`` if it lacks a field ``query`` or ``answer``."""
    try:
        return prompts.require_fields(prompt, {"query", "answer"})
    except ValueError as error:
        raise InputError(f"prompt={prompt}: {error}") from None
