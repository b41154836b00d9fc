"""Texts to ids: the special tokens around them, a prompt with two texts in it, and texts that are too long.

A user's text is always encoded with ``split_special_tokens``: what looks like a special token stays words.

Most parts read a prompt and its texts tokenised apart (``Layout``). ``JoinedPrompt`` is for weights that
were trained elsewhere, on prompt and texts as one string: a tokenizer may then join a space of the prompt
with the word behind it, and to such a part other ids would be another text. Texts are cut there as text, at
the borders of their own tokens, and every row is tokenised again.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from mllm_protector import prompts
from mllm_protector.errors import InputError
from mllm_protector.reading import whole_characters

OVERLAP = 0.25
"""The share of a window that its neighbour repeats, at least (see ``window_starts``)."""

SENTENCE = 32
"""Tokens that neighbouring windows share where they are long enough: a sentence of this length is cut by no
border, but lies whole in one of the two."""

_SAVED = 8
"""Tokens, more than tokenising in one piece saves at the borders of two texts."""

_GAP_POSITION = -1
"""Among the positions of a question's tokens: the mark of the part that was left out."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A prompt as ids, with a gap for each of the two texts.

    Attributes:
        parts: our own ids, and the name of the text behind them (``None`` behind the last).
    """

    parts: list[tuple[list[int], str | None]]

    @property
    def size(self) -> int:
        """How many ids are ours."""
        return sum(len(ids) for ids, _ in self.parts)

    def fill(self, query: list[int], answer: list[int]) -> list[int]:
        """The prompt with the two texts in their gaps."""
        texts: dict[str | None, list[int]] = {"query": query, "answer": answer, None: []}
        return [token for ids, name in self.parts for token in (*ids, *texts[name])]


def lay_out(
    template: str, encode: Callable[[str], list[int]], *, first: Sequence[int] = (), last: Sequence[int] = ()
) -> Layout:
    """A template with the fields ``query`` and ``answer`` as ids, between ``first`` and ``last``."""
    parts = [(encode(text), name) for text, name in prompts.pieces(template)]
    parts[0] = ([*first, *parts[0][0]], parts[0][1])
    parts[-1] = ([*parts[-1][0], *last], None)
    return Layout(parts)


def share(query: list[int], wanted: int, room: int, gap: list[int]) -> tuple[list[int], int]:
    """A question as it is rendered, and how many of ``wanted`` tokens of an answer fit beside it.

    The question gives way to the answer, but to no less than half of the room (see ``ends``).
    """
    kept = ends(query, max(room - wanted, room // 2), gap)
    return kept, min(wanted, room - len(kept))


def ends(ids: list[int], size: int, gap: list[int]) -> list[int]:
    """A text in ``size`` ids: whole if it fits, or else its head and its tail with ``gap`` between them.

    The head has the odd id. Where nothing but the mark would fit, the mark is left out.
    """
    if len(ids) <= size:
        return ids
    if size < len(gap) + 2:
        gap = []
    kept = size - len(gap)
    return [*ids[: kept - kept // 2], *gap, *ids[len(ids) - kept // 2 :]]


def window_starts(length: int, size: int) -> list[int]:
    """Where the windows of a text of ``length`` tokens begin: each has ``size``, and they cover the text.

    Neighbours share ``OVERLAP`` of a window, and at least ``SENTENCE`` tokens; but no more than half of a
    window, so that no token is read more than about twice. (A window shorter than twice ``SENTENCE``
    therefore only keeps sentences of half its own size whole.) The last window ends where the text ends and
    is as long as the others, so that no scrap of a few words is judged on its own. A text that fits, the
    empty one included, gives ``[0]``.
    """
    if length <= size:
        return [0]
    shared = min(max(math.ceil(OVERLAP * size), SENTENCE), size // 2)
    return [*range(0, length - size, size - shared), length - size]


class JoinedPrompt:
    """Renders prompt, question and answer as one string that is tokenised at once."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int, room: int, pad_id: int
    ) -> None:
        """Bind the tokenizer to a prompt.

        Args:
            tokenizer: a fast one; its own first and last special tokens are kept.
            prompt: a template with the fields ``query`` and ``answer``.
            max_length: the longest row in tokens.
            room: about how many tokens of the two texts fit into it beside the prompt.
            pad_id: an id that no row may contain.

        Raises:
            InputError: a tokenizer that does not tell where in a text its tokens are.
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
        self, queries: Sequence[str], answers: Sequence[str], window: int | None
    ) -> Iterator[tuple[list[list[int]], int | None]]:
        """Each pair in rows of at most ``max_length``; see ``encoding.DetectorEncoder.windows``.

        Returns:
            Rows of ids, in the answer's order; and the tokens of a question of which only head and tail are
            there, else ``None``.

        Raises:
            InputError: not even one token of each text fits, or the pad id occurs in a text.
        """
        pairs = zip(token_texts(self.tokenizer, queries), token_texts(self.tokenizer, answers), strict=True)
        return (self._windows(query, answer, window) for query, answer in pairs)

    def _windows(
        self, query: list[str], answer: list[str], window: int | None
    ) -> tuple[list[list[int]], int | None]:
        wanted = len(answer) if window is None else min(len(answer), window)
        positions = list(range(len(query)))
        room = self.room + _SAVED
        # Only tokenising shows how long a row is. While one is too long, all are cut again for less
        # room, so that together they still hold the whole answer.
        while room >= 2:
            kept, size = share(positions, wanted, room, [_GAP_POSITION])
            asked = "".join(prompts.GAP if at == _GAP_POSITION else query[at] for at in kept)
            starts = window_starts(len(answer), size)
            rows = [self._render(asked, "".join(answer[start : start + size])) for start in starts]
            excess = max(map(len, rows)) - self.max_length
            if excess <= 0:
                return rows, None if kept is positions else len(query)
            room -= excess
        raise InputError(f"max_length={self.max_length}: too short for the prompt and a token of each text")

    def _render(self, query: str, answer: str) -> list[int]:
        [ids] = encode_texts(self.tokenizer, [fill(self.prompt, query, answer)])
        return without_pad([*self._first, *ids, *self._last], self.pad_id)


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
    encoded = _encode(tokenizer, texts, return_offsets_mapping=True)
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
    return [list(ids) for ids in _encode(tokenizer, [*map(whole_characters, texts)])["input_ids"]]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: Any) -> Any:
    # verbose=False: no advice about lengths, which the encoders see to.
    return tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False, **options
    )


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, queries: Sequence[str], answers: Sequence[str]
) -> Iterator[tuple[list[int], list[int]]]:
    """``encode_texts`` of each query and its answer."""
    return zip(encode_texts(tokenizer, queries), encode_texts(tokenizer, answers), strict=True)


def learnt_window(tokenizer: PreTrainedTokenizerBase, harmful: Iterable[str], count: int) -> int:
    """The window, in tokens, for a detector that learns from ``count`` harmful answers.

    A detector knows harm as long as it was trained on. In a window with room for more, a harmful passage
    stands among harmless words, as none in its training did. So it is the length that 90 % of the harmful
    answers do not exceed, and at least ``SENTENCE``. Counted on 10,000 of them, evenly spread.

    Raises:
        InputError: no answers.
    """
    if not count:
        raise InputError("no answers to learn a window from")
    some = list(islice(harmful, 0, None, math.ceil(count / 10_000)))
    lengths = sorted(map(len, encode_texts(tokenizer, some)))
    return max(SENTENCE, lengths[math.ceil(0.9 * len(lengths)) - 1])


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
    itself put around a text: its own pad token, else eos, unk or another one.

    Raises:
        InputError: every special token is in use.
    """
    first, last = special_affixes(tokenizer)
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    for candidate in (*known, *tokenizer.all_special_ids):
        if candidate is not None and candidate not in (*first, *last):
            return int(candidate)
    raise InputError("the tokenizer has no special token left to pad with; add a pad token to it")


def without_pad(ids: list[int], pad_id: int) -> list[int]:
    """The ids themselves; an ``InputError`` if the pad id is one of them."""
    if pad_id in ids:
        raise InputError(f"the pad id {pad_id} occurs in a text; choose another pad token")
    return ids
