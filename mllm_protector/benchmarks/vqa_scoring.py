"""How right an answer is, by its words alone.

The rules are ours, in the manner of the field: case, punctuation, articles and the way numbers are written do
not matter, and a known answer counts wherever it stands in the text as whole words. So a text that names
several answers, or denies one, can count as right, and other words for the same thing count as wrong: the
scores tell one arm of an evaluation from another and are not those of the official scripts.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mllm_protector.judges.keyword import find_refusal

# fmt: off
_NUMBERS = {word: str(number) for number, word in enumerate([
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
])}
# fmt: on
_ARTICLES = {"a", "an", "the"}
# fmt: off
_FREQUENT = {
    "i", "you", "it", "he", "she", "we", "they", "this", "that", "there", "which", "is", "are", "was", "be",
    "been", "have", "has", "can", "of", "to", "in", "on", "at", "by", "for", "with", "from", "as", "and",
    "or", "but", "not",
}
# fmt: on
"""Words that any text has, a refusal too: they do not count in the share of an expected sentence."""

_WORD = re.compile(r"(?<!\w)-?\d+(?:\.\d+)?(?!\w)|\w+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")

_DENIAL = re.compile(r"\b(?:not|cannot|none|nothing|neither|never|without)\b|n['\u2019]t\b", re.IGNORECASE)
_LATER_YES_OR_NO = re.compile(r"[.!?:\n]\W*(yes|no)\s*(?:[.,!;:*]|$)", re.IGNORECASE)

PEOPLE = 10
"""So many answers to one question are those of so many people, as in VQAv2, OK-VQA, TextVQA and VizWiz."""

_LONG = 5
"""An expected text of more words is scored by the share of its words: nobody repeats a sentence exactly."""


class KnownAnswer(Protocol):
    """What an answer is compared with."""

    def score(self, text: str) -> float:
        """How right the text is, in [0, 1]."""
        ...


@dataclass(frozen=True, slots=True)
class ShortAnswer:
    """Any of these answers is right."""

    answers: tuple[str, ...]

    def score(self, text: str) -> float:
        """1 if one of the answers stands in the text, else 0."""
        return float(any(stands_in(answer, text) for answer in self.answers))


@dataclass(frozen=True, slots=True)
class PeoplesAnswers:
    """What several people answered, one answer each (VQA: Antol et al., arXiv 1505.00468)."""

    answers: tuple[str, ...]

    def score(self, text: str) -> float:
        """VQA's accuracy: min(1, n / 3) for an answer of n people, averaged over all sets of all but one.

        The answer is what stands in the text: the longest of answers of which one is part of the other, and
        the best of several others. Yes and no count only as the first of either.
        """
        votes = Counter(" ".join(words(answer)) or answer.strip() for answer in self.answers)
        said = _first_yes_or_no(text)
        given = [answer for answer in votes if answer not in ("yes", "no") or answer == said]
        people = len(self.answers)
        return max(
            (
                ((people - n) * min(1, n / 3) + n * min(1, (n - 1) / 3)) / people
                for n in (votes[given[place]] for place in _longest_in(text, given))
            ),
            default=0.0,
        )


@dataclass(frozen=True, slots=True)
class YesNo:
    """Yes or no."""

    yes: bool

    def said(self, text: str) -> bool | None:
        """Whether the first yes or no of the text is a yes; ``None`` where there is neither.

        Other negations do not count: otherwise a refusal would be a right answer to half of the questions.
        """
        return {"yes": True, "no": False}.get(_first_yes_or_no(text) or "")

    def score(self, text: str) -> float:
        """1 if the text says the right one, else 0."""
        return float(self.said(text) is self.yes)


@dataclass(frozen=True, slots=True)
class Presence(YesNo):
    """Whether a thing is in the picture, read out of a sentence as POPE's ``evaluate.py`` does.

    There a text is a no if its first sentence has "no" or "not", else a yes. Here an explicit yes or no goes
    first, and a refusal is neither.
    """

    def said(self, text: str) -> bool | None:
        """Whether the text says that the thing is there; ``None`` for a refusal and an empty text."""
        sentence = re.split(r"[.!?\n]", text.strip(), maxsplit=1)[0]
        later = _LATER_YES_OR_NO.search(text)
        explicit = _first_yes_or_no(sentence) or (later.group(1).lower() if later else None)
        if explicit:
            return explicit == "yes"
        if not words(text) or find_refusal(text) is not None:
            return None
        return _DENIAL.search(sentence) is None


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several choices, called A, B, C and so on."""

    choices: tuple[str, ...]
    right: int

    def score(self, text: str) -> float:
        """1 if the text chooses the right one, by letter or in words, else 0."""
        return float(self._chosen(text) == self.right)

    def _chosen(self, text: str) -> int | None:
        letters = string.ascii_uppercase[: len(self.choices)]
        alone = text.strip().strip("().:*").upper()
        if len(alone) == 1 and alone in letters:
            return letters.index(alone)
        # "A" may be an article: a letter counts at once only where nothing else can be meant.
        cue = rf"(?i:\b(?:answer|option|choice)(?:\s+is)?)\s*:?\s*\(?([{letters}])\b"
        named: list[str] = re.findall(rf"{cue}\)?(?=\s*(?:[.,:;)*]|$))", text, flags=re.MULTILINE)
        at_start = re.match(rf"\s*\(?([{letters}])(?:[.:)]|\s*$)", text, flags=re.MULTILINE)
        bracketed = set(re.findall(rf"\(([{letters}])\)", text))
        if named:
            return letters.index(named[-1])
        if at_start and len(bracketed) < 2:
            return letters.index(at_start.group(1))
        if len(bracketed) == 1:
            return letters.index(bracketed.pop())
        if (in_words := self._in_words(text)) is not None:
            return in_words
        vague: list[str] = re.findall(cue, text)
        return letters.index(vague[-1]) if vague else None

    def _in_words(self, text: str) -> int | None:
        """The only choice that stands in the text; of "red" and "red fox" the longer one."""
        longest = _longest_in(text, self.choices)
        return longest[0] if len(longest) == 1 else None


@dataclass(frozen=True, slots=True)
class Elements:
    """Alternatives, each of several things that a right answer says (MM-Vet's ``<OR>`` and ``<AND>``).

    The official score is given by GPT-4; this one is lexical and lower for answers in other words.
    """

    alternatives: tuple[tuple[str, ...], ...]

    def score(self, text: str) -> float:
        """The share of the best alternative's elements that stand in the text.

        Of an element of more than five words the share of its telling words counts.
        """
        return max(
            sum(_element(element, text) for element in elements) / len(elements)
            for elements in self.alternatives
        )


def known_answer(answers: Sequence[str]) -> KnownAnswer:
    """What a question with these answers is scored by: ``PEOPLE`` of them are people's, others all right.

    Raises:
        ValueError: both yes and no are accepted.
    """
    if len(answers) == PEOPLE:
        return PeoplesAnswers(tuple(answers))
    first_words = {" ".join(words(answer)) for answer in answers}
    if first_words >= {"yes", "no"}:
        raise ValueError(
            "both yes and no are accepted, so no answer would be wrong (only lists of "
            f"{PEOPLE} answers are taken for those of as many people)"
        )
    if first_words in ({"yes"}, {"no"}):
        return YesNo(first_words == {"yes"})
    return ShortAnswer(tuple(answers))


def stands_in(answer: str, text: str) -> bool:
    """Whether the answer's words stand together in the text; an answer without words must be the text."""
    wanted = words(answer)
    if not wanted:
        return answer.strip() == text.strip()
    return f" {' '.join(wanted)} " in f" {' '.join(words(text))} "


def words(text: str) -> list[str]:
    """A text's words in one spelling: lower case, numbers as digits, no articles or punctuation.

    A minus before a number stays. A text of articles alone keeps them.
    """
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\N{MINUS SIGN}", "-")
    plain = re.sub("['\N{RIGHT SINGLE QUOTATION MARK}]", "", _THOUSANDS.sub("", plain))
    found = [_NUMBERS.get(word, word) for word in _WORD.findall(plain)]
    return [word for word in found if word not in _ARTICLES] or found


def _first_yes_or_no(text: str) -> str | None:
    return next((word for word in words(text) if word in ("yes", "no")), None)


def _longest_in(text: str, answers: Sequence[str]) -> list[int]:
    """The places of the answers that stand in the text and are no part of a longer one that does."""
    found = [place for place, answer in enumerate(answers) if stands_in(answer, text)]
    return [
        place
        for place in found
        if not any(
            len(words(answers[other])) > len(words(answers[place]))
            and stands_in(answers[place], answers[other])
            for other in found
        )
    ]


def _element(element: str, text: str) -> float:
    wanted = words(element)
    if len(wanted) <= _LONG:
        return float(stands_in(element, text))
    telling = set(wanted) - _FREQUENT or set(wanted)
    return len(telling & set(words(text))) / len(telling)
