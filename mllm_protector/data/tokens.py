"""A tokenizer's own side: ids of a text, the special tokens around it, and text in one piece with a prompt.

A user's text is always encoded with ``split_special_tokens``: what looks like a special token stays words.

Most parts read a prompt and its texts tokenised apart (``encoding``). ``JoinedPrompt`` is for weights that
were trained elsewhere, on prompt and texts as one string: a tokenizer may then join a space of the prompt
with the word behind it, and to such a part other ids would be another text. Texts are cut there as text, at
the borders of their own tokens, and every row is tokenised anew.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from mllm_protector import prompts
from mllm_protector.data.layout import SENTENCE, ends, window_starts
from mllm_protector.errors import InputError
from mllm_protector.reading import whole_characters

SAVED = 8
"""Tokens, more than tokenising in one piece saves at the borders of two texts."""

GAP_POSITION = -1
"""Among the positions of a question's tokens: the mark of what was left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedRows:
    """A pair in as many rows as its answer needs.

    Attributes:
        rows: ids, in the answer's order.
        shortened: the length in tokens of a question of which only head and tail are there; else ``None``.
    """

    rows: list[list[int]]
    shortened: int | None


class JoinedPrompt:
    """Renders prompt, question and answer as one string that is tokenised at once."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int, room: int, pad_id: int
    ) -> None:
        """Bind the tokenizer to a prompt.

        Args:
            tokenizer: one that tells where in a text its tokens are; its own first and last special tokens
                are kept.
            prompt: a template with the fields ``query`` and ``answer``.
            max_length: the longest row in tokens.
            room: about how many tokens of the two texts fit into it beside the prompt.
            pad_id: an id that no row may contain.

        Raises:
            InputError: a tokenizer that does not tell.
        """
        if not tokenizer.is_fast:
            raise InputError(
                f"{type(tokenizer).__name__} does not tell where in a text its tokens are, which a detector "
                "that reads prompt and texts in one piece needs; give a folder with tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.max_length = max_length
        self.room = room
        self.pad_id = pad_id
        self._first, self._last = special_affixes(tokenizer)

    def windows(
        self, queries: Sequence[str], answers: Sequence[str], window: int | None, overlap: float
    ) -> list[JoinedRows]:
        """Each pair in rows of at most ``max_length``; see ``encoding.DetectorEncoder.windows``.

        Raises:
            InputError: not even one token of each text fits, or the pad id occurs in a text.
        """
        pairs = zip(token_texts(self.tokenizer, queries), token_texts(self.tokenizer, answers), strict=True)
        return [self._windows(query, answer, window, overlap) for query, answer in pairs]

    def _windows(self, query: list[str], answer: list[str], window: int | None, overlap: float) -> JoinedRows:
        wanted = len(answer) if window is None else min(len(answer), window)
        positions = list(range(len(query)))
        room = self.room + SAVED
        # How long a row is, only its tokenising tells. While one is too long, all are cut anew for less
        # room, so that together they still hold the whole answer.
        while room >= 2:
            kept, size = share(positions, wanted, room, [GAP_POSITION])
            asked = "".join(prompts.GAP if at == GAP_POSITION else query[at] for at in kept)
            starts = window_starts(len(answer), size, overlap)
            rows = [self._render(asked, "".join(answer[start : start + size])) for start in starts]
            excess = max(map(len, rows)) - self.max_length
            if excess <= 0:
                return JoinedRows(rows=rows, shortened=None if kept is positions else len(query))
            room -= excess
        raise InputError(f"max_length={self.max_length}: too short for the prompt and a token of each text")

    def _render(self, query: str, answer: str) -> list[int]:
        [ids] = encode_texts(self.tokenizer, [fill(self.prompt, query, answer)])
        return without_pad([*self._first, *ids, *self._last], self.pad_id)


def share(query: list[int], wanted: int, room: int, gap: list[int]) -> tuple[list[int], int]:
    """A question as it is rendered, and how many of ``wanted`` tokens of an answer fit beside it.

    The question gives way to the answer, but to no less than half of the room (see ``layout.ends``).
    """
    kept = ends(query, max(room - wanted, room // 2), gap)
    return kept, min(wanted, room - len(kept))


def fill(prompt: str, query: str, answer: str) -> str:
    """A template with its two texts, in one piece; braces in a text are left alone."""
    texts = {"query": query, "answer": answer, None: ""}
    return "".join(literal + texts[field] for literal, field in prompts.pieces(prompt))


def token_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[str]]:
    """Users' texts, each cut at the borders of its tokens: joined again, the pieces are the text.

    Of a character that takes several tokens, the last one has it and the others are empty.
    """
    if not texts:
        return []
    encoded: Any = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    cut = []
    for text, offsets in zip(texts, encoded["offset_mapping"], strict=True):
        starts = accumulate((start for start, _ in offsets[1:]), max)
        borders = [0, *starts, len(text)]
        cut.append([text[start:stop] for start, stop in pairwise(borders)] if text else [])
    return cut


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of users' texts: no special token is added, and none inside a text is recognised.

    Half of a surrogate pair, which no tokenizer takes, counts as U+FFFD.
    """
    if not texts:
        return []
    # verbose=False: no advice about lengths, which the encoders see to.
    whole = [whole_characters(text) for text in texts]
    encoded: Any = tokenizer(whole, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, queries: Sequence[str], answers: Sequence[str]
) -> Iterator[tuple[list[int], list[int]]]:
    """``encode_texts`` of each query and its answer."""
    return zip(encode_texts(tokenizer, queries), encode_texts(tokenizer, answers), strict=True)


def learnt_window(tokenizer: PreTrainedTokenizerBase, answers: Iterable[str], count: int) -> int:
    """The window for a detector that learns from these answers, in tokens.

    A detector is at home with texts as long as it was trained on, so it is the length that 99 % of the
    answers do not exceed, and at least ``SENTENCE``. Counted on 10,000 of them, evenly spread.

    Args:
        tokenizer: of the detector.
        answers: read once.
        count: how many there are.

    Raises:
        InputError: no answers.
    """
    if not count:
        raise InputError("no answers to learn a window from")
    some = list(islice(answers, 0, None, math.ceil(count / 10_000)))
    lengths = sorted(map(len, encode_texts(tokenizer, some)))
    return max(SENTENCE, lengths[math.ceil(0.99 * len(lengths)) - 1])


def encode_literal(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool = False
) -> list[int]:
    """Ids of our own words; with ``special_tokens`` those of a chat template are recognised."""
    if not text:
        return []
    encoded: Any = tokenizer(text, add_special_tokens=False, split_special_tokens=not special_tokens)
    return list(encoded["input_ids"])


def special_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind a text by itself (BOS; [CLS] and [SEP]; none)."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(dressed) - len(plain) + 1):
        if dressed[start : start + len(plain)] == plain:
            return dressed[:start], dressed[start + len(plain) :]
    raise InputError("the tokenizer changes a text when it adds its special tokens; it cannot be used")


def choose_pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A pad id that no rendered text contains.

    Texts are encoded without special tokens, so any special token will do that the tokenizer does not
    itself put around a text. The tokenizer's own pad token comes first, then eos, unk and the others.

    Raises:
        InputError: every special token is in use.
    """
    first, last = special_affixes(tokenizer)
    used = {*first, *last}
    candidates = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    candidates += tokenizer.all_special_ids
    for candidate in candidates:
        if candidate is not None and candidate not in used:
            return int(candidate)
    raise InputError("the tokenizer has no special token left to pad with; add a pad token to it")


def without_pad(ids: list[int], pad_id: int) -> list[int]:
    """The ids themselves.

    Raises:
        InputError: the pad id is one of them.
    """
    if pad_id in ids:
        raise InputError(f"the pad id {pad_id} occurs in a text; choose another pad token")
    return ids


def chat_layout(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The tokenizer's chat template around a prompt as the user's turn, up to where the reply begins.

    Raises:
        InputError: the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise InputError("chat=true, but the tokenizer has no chat template")
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    )
