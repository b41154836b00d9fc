"""Texts to token ids to tensors for the detoxifier, in training as in use (see ``encoding``)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from mllm_protector import prompts
from mllm_protector.data.encoding import Batch, EncodedCorrection, checked_prompt, collate_targets, padded
from mllm_protector.data.layout import fit, lay_out
from mllm_protector.data.tokens import (
    chat_layout,
    encode_literal,
    encode_pairs,
    encode_texts,
    special_affixes,
)
from mllm_protector.errors import InputError
from mllm_protector.records import Correction


class DetoxifierEncoder:
    """Renders (query, rejected answer) for the detoxifier, and the accepted answer behind it.

    Attributes:
        truncated: rows in which a text was too long, in training and in use.
        shortened: always 0; a row with a question that is too long is one of the ``truncated``.
    """

    example = EncodedCorrection

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pad_id: int,
        max_length: int,
        prompt: str = prompts.DETOXIFIER,
        chat: bool = False,
    ) -> None:
        """Bind the tokenizer to a prompt.

        Args:
            tokenizer: of a causal LM; it must have an end token.
            pad_id: fills batches; masked, so it may also be the end token.
            max_length: the longest sequence in tokens, prompt and target together.
            prompt: a template with the fields ``query`` and ``answer``.
            chat: send the prompt as a user's turn through the tokenizer's chat template.

        Raises:
            InputError: no end token, no chat template where one is asked for, or a prompt that does not fit.
        """
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end token, so a detoxifier could never stop")
        self.tokenizer = tokenizer
        self.pad_id = pad_id
        self.max_length = max_length
        self.prompt = checked_prompt(prompt)
        self.chat = chat
        self.end_id: int = tokenizer.eos_token_id
        own = partial(encode_literal, tokenizer)
        self._layout = (
            lay_out(checked_prompt(chat_layout(tokenizer, prompt)), partial(own, special_tokens=True))
            if chat
            else lay_out(prompt, own, first=special_affixes(tokenizer)[0])
        )
        self._gap = own(prompts.GAP)
        self.room()
        self.truncated = 0
        self.shortened = 0

    def identity(self) -> dict[str, Any]:
        """All that the ids of a text depend on beside the tokenizer and this code, for JSON.

        The prompt's own ids among them: a chat template may write the date.
        """
        return {
            "kind": "detoxifier",
            "prompt": self.prompt,
            "chat": self.chat,
            "max_length": self.max_length,
            "pad_id": self.pad_id,
            "end_id": self.end_id,
            "room": self.room(),
            "layout": self._layout.parts,
            "gap": self._gap,
        }

    def room(self, *, reserve: int = 0) -> int:
        """How many tokens the query and the answer may have, in training as in use.

        The room for what is to be written (``longest_target`` tokens) is never given to them, however short
        it turns out to be: what is read in use is what was read in training.

        Args:
            reserve: tokens to be written, where these are more.

        Raises:
            InputError: fewer than two are left.
        """
        reserve = max(reserve, self.longest_target)
        room = self.max_length - reserve - self._layout.size
        if room < 2:
            raise InputError(
                f"max_length={self.max_length}: too short; the prompt takes {self._layout.size} tokens and "
                f"{reserve} are kept for what is to be written, so {max(room, 0)} are left for two texts"
            )
        return room

    def encode(self, *, queries: Sequence[str], answers: Sequence[str], reserve: int = 0) -> list[list[int]]:
        """Prompt ids of each (query, harmful answer), which have at most ``room`` beside the prompt.

        Where they do not fit, the query is cut first, to no less than half of the room, then the answer. A
        text that is cut keeps its head and its tail, with ``prompts.GAP`` between them: harm may stand at
        either end. ``truncated`` counts such rows.

        Args:
            queries: what was asked.
            answers: what was flagged.
            reserve: as for ``room``.

        Raises:
            InputError: as ``room``.
        """
        room = self.room(reserve=reserve)
        rendered = []
        for query, answer in encode_pairs(self.tokenizer, queries, answers):
            self.truncated += len(query) + len(answer) > room
            rendered.append(self._layout.fill(*fit(query, answer, room, self._gap)))
        return rendered

    def encode_records(self, records: Sequence[Correction]) -> list[EncodedCorrection]:
        """Training records as prompt and target ids, prompts as ``encode`` makes them.

        Targets keep their first ``longest_target`` tokens: what is learnt to be written has no gap. One that
        is cut has no end token: it would teach to stop in the middle.
        """
        pairs = encode_pairs(
            self.tokenizer, [record.query for record in records], [record.rejected for record in records]
        )
        targets = encode_texts(self.tokenizer, [record.accepted for record in records])
        room = self.room()
        rendered = []
        for (query, answer), accepted in zip(pairs, targets, strict=True):
            target = [*accepted, self.end_id][: self.longest_target]
            self.truncated += len(query) + len(answer) > room or len(accepted) >= self.longest_target
            rendered.append(
                EncodedCorrection(self._layout.fill(*fit(query, answer, room, self._gap)), target)
            )
        return rendered

    @property
    def longest_target(self) -> int:
        """The longest text that is learnt, in tokens with its end token: half of ``max_length``."""
        return self.max_length // 2

    def pad_prompts(self, rows: Sequence[list[int]]) -> Batch:
        """``input_ids`` and ``attention_mask``, both (B, T) int64, padded on the left for generation."""
        return padded(rows, self.pad_id, side="left")

    def __call__(self, rows: Sequence[EncodedCorrection]) -> Batch:
        """The collate function: ``collate_targets``."""
        return collate_targets(rows, self.pad_id)
