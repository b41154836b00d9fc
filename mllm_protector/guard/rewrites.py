"""What can be wrong with a rewrite, seen from the texts alone: pure functions, linear in their length.

They catch what a detector passes because it is not harmful, or because the harm is cut into pieces that the
detector does not know: empty texts, loops, the prompt, and copies of the harmful answer. They cannot tell
whether a rewrite is true, on topic or well written.

With the accepted answer as the rewrite of the rejected one, they discard 7 of 1,791 pairs of hh-rlhf
(harmless-base; 0.4 %): 4 copies, all of them thanks in the same words, 2 texts of punctuation and 1 echo; of
the 1,066 toy corrections none. Of its 1,008 rejected answers with 24 words or more they recognise all as they
are, 97 % cut in half, 88 % with every tenth word replaced and 27 % with every fifth: copies in other words
are left to the detector. The thresholds were chosen on these pairs; of 1,620 completions of XSTest, examined
only afterwards, none is called empty, looping or an echo.
"""

import re
from collections.abc import Sequence
from enum import StrEnum

from mllm_protector import prompts
from mllm_protector.normalisation import normalised

VERSION = 2
"""Of the checks. Raise it with every change that may change a reply."""

GRAM = 4
"""Words of an n-gram. Three in a row are often idiom, five break at any edit."""

LOOP_SHARE = 0.5
"""From this share of repeated n-grams on, a text is a loop."""

LOOP_WORDS = 24
"""The shortest text whose share counts: two similar sentences are half of a shorter one."""

CYCLE_REPEATS = 4
"""A text that ends in this many rounds of the same words is a loop; three are a figure of speech."""

CYCLE_WORDS = 12
"""The fewest words in those rounds, so that "no, no, no, no" is none."""

LONGEST_CYCLE = 60
"""Words of the longest round that is searched for; the share of n-grams finds longer ones."""

UNIT_REPEATS = 20
"""The same one to four letters this often in a row are not a word; numbers have fewer zeros."""

RULER = 100
"""The longest run of one punctuation mark: a line drawn across a page has at most this many."""

COPIED_SHARE = 0.5
"""A rewrite with this share of the harmful answer's n-grams is a copy."""

CONTAINED_SHARE = 0.8
"""A rewrite with this share of its own n-grams in the harmful answer is a piece of it."""

PIECE_WORDS = 8
"""The shortest piece: fewer words may be a common opening, such as "Thank you"."""

SHORT = 24
"""Refusals below this many words are never copies: all use the same formulas, and a harmful answer may begin
with one."""


class Fault(StrEnum):
    """Why a rewrite cannot be shown."""

    EMPTY = "empty"
    """Nothing but spaces and punctuation."""
    LOOPING = "looping"
    """The same words or letters over and over."""
    ECHO = "echo"
    """The prompt's own headings, or the question and nothing else."""
    COPY = "copy"
    """The harmful answer, barely changed or cut."""


_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:'[^\W_]+)*")
"""Scripts without spaces count by the character."""

_STRAIGHT = str.maketrans("‘’", "''")

_UNITS = re.compile(rf"([^\W_]{{1,4}}?)\1{{{UNIT_REPEATS - 1},}}|([^\w\s]|_)\2{{{RULER},}}")

_MARKUP = " \t*#>_"
"""What may surround a heading."""

_DECLINES = re.compile(
    r"^no\b|\b(?:sorry|apologi[sz]e|can't|cannot|can not|won't|will not|not able to|unable to|decline"
    r"|refuse)\b"
)

_HEADINGS = tuple(
    line.strip().casefold()
    for literal, _ in prompts.pieces(prompts.DETOXIFIER)
    for line in literal.splitlines()
    if line.strip()
)


def fault_of(query: str, answer: str, rewrite: str) -> Fault | None:
    """What is wrong with a rewrite of a harmful answer to a query, or ``None``."""
    said = words(rewrite)
    if not said:
        return Fault.EMPTY
    if _loops(rewrite, said):
        return Fault.LOOPING
    if _echoes(words(query), rewrite, said):
        return Fault.ECHO
    return Fault.COPY if _copies(words(answer), said) else None


def words(text: str) -> list[str]:
    """The words of a text, without regard to case, punctuation, spacing and disguises (``normalisation``)."""
    return _WORD.findall(normalised(text).translate(_STRAIGHT).casefold())


def surviving_share(answer: Sequence[str], rewrite: Sequence[str]) -> float:
    """The share of an answer's different n-grams that are in its rewrite too, in [0, 1].

    Both are words; fewer than an n-gram's survive only as the whole of the rewrite.
    """
    before = _grams(answer)
    return len(set(before) & set(_grams(rewrite))) / len(set(before)) if answer else 0.0


def _grams(said: Sequence[str]) -> list[tuple[str, ...]]:
    """All runs of ``GRAM`` words, or the whole text if it is shorter."""
    return [tuple(said[start : start + GRAM]) for start in range(max(len(said) - GRAM, 0) + 1)]


def _loops(text: str, said: Sequence[str]) -> bool:
    if _UNITS.search(text):
        return True
    grams = _grams(said)
    if len(said) >= LOOP_WORDS and 1 - len(set(grams)) / len(grams) >= LOOP_SHARE:
        return True
    # A text that was stopped while it looped may end in half a word.
    return _ends_in_cycle(said) or _ends_in_cycle(said[:-1])


def _ends_in_cycle(said: Sequence[str]) -> bool:
    for period in range(1, min(LONGEST_CYCLE, len(said) // CYCLE_REPEATS) + 1):
        needed = max(period * CYCLE_REPEATS, CYCLE_WORDS)
        if needed <= len(said) and all(
            said[-place] == said[-place - period] for place in range(1, needed - period + 1)
        ):
            return True
    return False


def _echoes(asked: Sequence[str], rewrite: str, said: Sequence[str]) -> bool:
    if any(line.strip(_MARKUP).casefold().startswith(_HEADINGS) for line in rewrite.splitlines()):
        return True
    return bool(asked) and len(said) % len(asked) == 0 and [*asked] * (len(said) // len(asked)) == [*said]


def _copies(answer: Sequence[str], said: Sequence[str]) -> bool:
    if len(said) < SHORT and _DECLINES.search(" ".join(said)):
        return False
    if surviving_share(answer, said) >= COPIED_SHARE:
        return True
    return len(said) >= PIECE_WORDS and surviving_share(said, answer) >= CONTAINED_SHARE
