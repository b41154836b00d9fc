"""What a text seems to say in a code or a disguise that normalisation leaves alone.

Such a guess never replaces a text: a detector reads it beside the text itself, and the higher score counts.
So a guess that is wrong costs time and perhaps a false positive, and one is only made on signs that ordinary
texts do not show.
"""

import base64
import binascii
import codecs
import re

VERSION = 1
"""Of these rules. Raise it with every change that may change what is read, and so a score."""

MANY = 10
"""Signs of spaced letters in a text, at least."""

_BLOB = re.compile(r"[\w+/-]{20,}={0,2}", re.ASCII)
"""A line of base64."""

_COMMON = {
    *("the", "and", "to", "of", "in", "is", "you", "that"),
    *("it", "for", "with", "on", "are", "this", "your", "can"),
}
"""Frequent English words of which none becomes another one under rot13."""

_WORD = re.compile(r"[^\W_]+")
_GAPS = [re.compile(rf"(?<![^\W_][^\W_])(?<=[^\W_])[{mark}](?=[^\W_](?![^\W_])|[,.;:!?])") for mark in " ._-"]
"""One mark behind a single letter or digit, before another one or the end of a phrase."""

_LEET = str.maketrans("431057@$", "aeiostas")
_MIXED = re.compile(r"[^\W\d_][431057@$]|[431057@$][^\W\d_]")

# Cyrillic, then Greek.
_LOOKALIKES = dict(
    zip(
        map(ord, "асеіорхуѕјһԁѵАВСЕНІЈКМОРЅТХУ" + "οανρΑΒΕΖΗΙΚΜΝΟΡΤΥΧ"),
        "aceiopxysjhdvABCEHIJKMOPSTXY" + "oavpABEZHIKMNOPTYX",
        strict=True,
    )
)
_LATIN = re.compile("[A-Za-z]")


def deciphered(text: str) -> list[str]:
    """The text with what seems to be coded or disguised in plain letters, for each guess; mostly empty.

    Guessed are base64 of readable text, rot13 of English, single letters with a mark between them, digits for
    letters, and Cyrillic or Greek letters that look like the Latin ones beside them.
    """
    guesses = (
        _BLOB.sub(_decoded, text),
        _without_rot13(text),
        _joined(text),
        _without_leet(text),
        _latin(text),
    )
    return [guess for guess in dict.fromkeys(guesses) if guess is not None and guess != text]


def _decoded(found: re.Match[str]) -> str:
    """What a blob says, or itself if that is no text."""
    blob = found[0]
    line = blob.rstrip("=")
    try:
        data = base64.b64decode(line + "=" * (-len(line) % 4), altchars="-_" if {*line} & {*"-_"} else None)
    except binascii.Error:
        return blob
    plain = data.decode(errors="ignore")  # a line may end within a character
    readable = sum(each.isalpha() or each.isspace() for each in plain)
    return plain if readable > 0.7 * len(data) else blob


def _without_rot13(text: str) -> str | None:
    turned = codecs.encode(text, "rot13")
    words = _WORD.findall(turned.lower())
    signs = [word for word in words if word in _COMMON]
    if len({*signs}) < 3 or len(signs) < 0.05 * len(words):
        return None
    lines = zip(text.splitlines(), turned.splitlines(), strict=True)
    return "\n".join(other if _english(other) >= _english(line) else line for line, other in lines)


def _english(line: str) -> int:
    return sum(word in _COMMON for word in _WORD.findall(line.lower()))


def _joined(text: str) -> str | None:
    for gap in _GAPS:
        joined, count = gap.subn("", text)
        if count >= MANY and count > 0.4 * sum(map(str.isalnum, text)):
            return joined
    return None


def _without_leet(text: str) -> str | None:
    words = text.split()
    mixed = sum(_MIXED.search(word) is not None for word in words)
    return text.translate(_LEET) if mixed >= 3 and mixed >= 0.3 * len(words) else None


def _latin(text: str) -> str | None:
    if text.isascii():
        return None
    words = _WORD.findall(text)
    mixed = sum(
        bool(_LATIN.search(word)) and any(ord(each) in _LOOKALIKES for each in word) for word in words
    )
    return text.translate(_LOOKALIKES) if mixed >= 3 else None
