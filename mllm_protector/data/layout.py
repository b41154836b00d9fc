"""Where ids go: our own prompt, the two texts in its gaps, and what happens to a text that is too long.

Pure functions over token ids. Nothing here knows a tokenizer or a model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mllm_protector import prompts

OVERLAP = 0.25
"""The share of a window that its neighbour repeats, at least (see ``window_starts``)."""

SENTENCE = 32
"""Tokens that neighbouring windows share where they are long enough: a sentence of this length is cut by no
border, but lies whole in one of the two."""


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
        texts = {"query": query, "answer": answer}
        filled: list[int] = []
        for ids, name in self.parts:
            filled += ids
            if name is not None:
                filled += texts[name]
        return filled


def lay_out(
    template: str, encode: Callable[[str], list[int]], *, first: Sequence[int] = (), last: Sequence[int] = ()
) -> Layout:
    """A template as ids.

    Args:
        template: with the fields ``query`` and ``answer``.
        encode: gives the ids of our own words.
        first: ids that go in front of everything.
        last: ids that go behind everything.
    """
    parts = [(encode(text), name) for text, name in prompts.pieces(template)]
    parts[0] = ([*first, *parts[0][0]], parts[0][1])
    parts[-1] = ([*parts[-1][0], *last], None)
    return Layout(parts)


def fit(query: list[int], answer: list[int], room: int, gap: list[int]) -> tuple[list[int], list[int]]:
    """Both texts cut to ``room`` ids together, each by its middle; neither is cut to nothing.

    The query gives way first, but keeps at least half of the room.
    """
    query = ends(query, max(room - len(answer), room // 2), gap)
    return query, ends(answer, room - len(query), gap)


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


def window_starts(length: int, size: int, overlap: float = OVERLAP) -> list[int]:
    """Where the windows of a text begin: each is ``size`` long, and together they cover the text.

    Neighbours share ``overlap`` of a window, and at least ``SENTENCE`` tokens; but no more than half of a
    window, so that no token is read more than about twice. (A window shorter than twice ``SENTENCE``
    therefore only keeps sentences of half its own size whole.) The last window ends where the text ends and
    is as long as the others, so that no scrap of a few words is judged on its own.

    Args:
        length: of the text, in tokens.
        size: of a window, in tokens.
        overlap: the share, from 0 on.

    Returns:
        ``[0]`` for a text that fits into one window, the empty one included.
    """
    if length <= size:
        return [0]
    shared = min(max(math.ceil(overlap * size), SENTENCE), size // 2)
    return [*range(0, length - size, size - shared), length - size]
