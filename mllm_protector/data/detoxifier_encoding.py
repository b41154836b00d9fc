"""Texts to token ids to tensors for the detoxifier, in training as in use (see ``encoding``)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from mllm_protector import prompts
from mllm_protector.data.encoding import (
    Batch,
    EncodedCorrection,
    PromptEncoder,
    checked_prompt,
    collate_targets,
    padded,
)
from mllm_protector.data.tokens import (
    encode_literal,
    encode_pairs,
    encode_texts,
    ends,
    lay_out,
    share,
    special_affixes,
)
from mllm_protector.errors import InputError
from mllm_protector.records import Correction


class DetoxifierEncoder(PromptEncoder[Correction, EncodedCorrection]):
    """Renders (query, rejected answer) for the detoxifier, and the accepted answer behind it."""

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
        super().__init__(tokenizer, pad_id, max_length, prompt)
        self.chat = chat
        self.end_id: int = tokenizer.eos_token_id
        own = partial(encode_literal, tokenizer)
        self._layout = (
            lay_out(checked_prompt(chat_layout(tokenizer, prompt)), partial(own, special_tokens=True))
            if chat
            else lay_out(prompt, own, first=special_affixes(tokenizer)[0])
        )
        self.room()

    def identity(self) -> dict[str, Any]:
        """Everything that the ids of a text depend on beside the tokenizer and this code, for JSON."""
        return self._identity("detoxifier", chat=self.chat, end_id=self.end_id, room=self.room())

    def room(self, *, reserve: int = 0) -> int:
        """How many tokens the query and the answer may have, in training as in use.

        The room for the target (``longest_target`` tokens, or ``reserve`` where that is more) is never given
        to them, however short it turns out to be: training and use read the same.

        Raises:
            InputError: fewer than two are left.
        """
        reserve = max(reserve, self.longest_target)
        room = self.max_length - reserve - self._layout.size
        if room < 2:
            raise InputError(
                f"max_length={self.max_length}: too short; the prompt takes {self._layout.size} tokens and "
                f"{reserve} are kept for the text to write, so {max(room, 0)} are left for two texts"
            )
        return room

    @property
    def longest_target(self) -> int:
        """The longest text that is learnt, in tokens with its end token: half of ``max_length``."""
        return self.max_length // 2

    def encode(self, *, queries: Sequence[str], answers: Sequence[str], reserve: int = 0) -> list[list[int]]:
        """Prompt ids of each (query, harmful answer), which have at most ``room`` beside the prompt.

        Where they do not fit, the query is cut first, to no less than half of the room, then the answer. A
        text that is cut keeps its head and its tail, with ``prompts.GAP`` between them: harm may stand at
        either end.
        """
        rendered = self._prompts(queries, answers, self.room(reserve=reserve))
        self.truncated += sum(cut for _, cut in rendered)
        return [ids for ids, _ in rendered]

    def encode_records(self, records: Sequence[Correction]) -> list[EncodedCorrection]:
        """Training records as prompt and target ids, prompts as ``encode`` makes them.

        Targets keep their first ``longest_target`` tokens. One that is cut has no end token, which would
        teach to stop in the middle.
        """
        queries, answers = [record.query for record in records], [record.rejected for record in records]
        targets = encode_texts(self.tokenizer, [record.accepted for record in records])
        rendered = []
        for (prompt, cut), target in zip(self._prompts(queries, answers, self.room()), targets, strict=True):
            self.truncated += cut or len(target) >= self.longest_target
            rendered.append(EncodedCorrection(prompt, [*target, self.end_id][: self.longest_target]))
        return rendered

    def _prompts(
        self, queries: Sequence[str], answers: Sequence[str], room: int
    ) -> list[tuple[list[int], bool]]:
        """Prompt ids of each pair, and whether one of its texts was cut."""
        rendered = []
        for query, answer in encode_pairs(self.tokenizer, queries, answers):
            asked, _ = share(query, len(answer), room, self._gap)
            ids = self._layout.fill(asked, ends(answer, room - len(asked), self._gap))
            rendered.append((ids, len(query) + len(answer) > room))
        return rendered

    def pad_prompts(self, rows: Sequence[list[int]]) -> Batch:
        """``input_ids`` and ``attention_mask``, both (B, T) int64, padded on the left for generation."""
        return padded(rows, self.pad_id, side="left")

    def __call__(self, rows: Sequence[EncodedCorrection]) -> Batch:
        """The collate function: ``collate_targets``."""
        return collate_targets(rows, self.pad_id)


def chat_layout(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The tokenizer's chat template around a prompt as the user's turn, up to where the reply begins."""
    if not tokenizer.chat_template:
        raise InputError("chat=true, but the tokenizer has no chat template")
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
