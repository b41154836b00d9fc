"""One form of a text for a detector to read, however it was disguised.

A detector knows texts as people write them. The same words with zero-width characters between the letters,
in full-width or mathematical letters, all in capitals or with tabs for spaces are other tokens to it, and an
answer that it would flag passes. So what a detector reads, in training and in use, is the normalised text.
What a user sees never is.

What could only be guessed is left alone here: letters of another script that look alike, leetspeak, spaced
letters and encodings such as base64 (see ``deciphering``).
"""

import re
import unicodedata
from collections import Counter

VERSION = 2
"""Of these rules. Raise it with every change that may change a text, and so a score."""

MUCH = 0.1
"""From this share of changed characters on, a text is also read as it was written."""

MARKS = 4
"""The most combining marks on one letter; scripts that write their vowels as marks need no more."""

INVISIBLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
"""Characters without a shape of their own, for a regular expression: zero-width ones, fillers, variation
selectors, tags, those that turn the direction, and so on.
Source: ``Default_Ignorable_Code_Point`` in Unicode's DerivedCoreProperties.txt."""

_HIDDEN = re.compile(f"[{INVISIBLE}]")

_BLANK = "\u2800"
"""The Braille pattern without dots: a space to the eye, and none to Unicode."""

_EMPTY_LINES = re.compile("\n{3,}")
_WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|['’])+")


class _Shown(dict[int, int | None]):
    """For ``str.translate``: drops what cannot be seen. Each character is looked up once."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        unseen = unicodedata.category(character) in ("Cc", "Cf", "Cs") and not character.isspace()
        hidden = unseen or _HIDDEN.match(character)
        self[code] = ord(" ") if character == _BLANK else None if hidden else code
        return self[code]


_SHOWN = _Shown()


def normalised(text: str) -> str:
    """The text in one form, linear in its length.

    Invisible characters are gone: zero-width and joining ones (between Latin letters they only split words,
    and other scripts stay readable without), those that set a direction, tags, variation selectors, soft
    hyphens and control characters. White space of any kind and length is a space, a new line or an empty
    line, and the ends have none; where there are more new lines than spaces, all of it is spaces.
    Letters and digits have their usual form (NFKC). Of the marks on a Latin letter only those are left that
    make one character with it, and of more than ``MARKS`` on any letter none. A word with capitals behind its
    first letter is in small letters.
    """
    text = text.translate(_SHOWN)
    if not text.isascii():
        # Marks first: to sort a long run of them, as NFKC does, takes time that grows with its square.
        text = _thinned(unicodedata.normalize("NFKC", _thinned(text, MARKS)), 0)
    text = _spaced(text)
    return _WORD.sub(lambda word: word[0] if word[0][1:].islower() else _small(word[0]), text)


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen; of most texts the beginning tells."""
    return not (normalised(text[:64]) or normalised(text))


def _spaced(text: str) -> str:
    lines = (" ".join(line.split()) for line in text.splitlines())
    text = _EMPTY_LINES.sub("\n\n", "\n".join(lines).strip())
    return " ".join(text.split()) if text.count("\n") > text.count(" ") else text


def _small(word: str) -> str:
    return word.lower().replace("i\u0307", "i")  # the Turkish capital with a dot becomes two characters


def readings(*texts: str) -> list[tuple[str, ...]]:
    """How texts that belong together are read: normalised, and as written where that changes one much.

    Normalisation may remove what was harmful in an unusual text, so the higher of the two scores counts.
    """
    normal = tuple(map(normalised, texts))
    return [normal, texts] if any(map(_changes_much, texts, normal)) else [normal]


def _changes_much(text: str, normal: str) -> bool:
    """Whether a normalised text lacks much (``MUCH``) of what stood in the text itself."""
    return sum((Counter(text) - Counter(normal)).values()) > MUCH * len(text)


def _thinned(text: str, latin: int) -> str:
    """The text without the combining marks of letters that have too many.

    Args:
        text: of any length.
        latin: the most on a Latin letter, or on anything in ASCII; on others it is ``MARKS``.
    """
    kept: list[str] = []
    most = marks = 0
    for character in text:
        if unicodedata.category(character) in ("Mn", "Me"):
            marks += 1
            if marks == most + 1:
                del kept[len(kept) - most :]
            if marks > most:
                continue
        else:
            marks = 0
            most = latin if character < "\u0250" or "\u1e00" <= character <= "\u1eff" else MARKS
        kept.append(character)
    return "".join(kept)
