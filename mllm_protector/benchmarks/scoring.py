"""How right an answer is, by its words alone.

The rules are ours, in the manner of the field: case, punctuation, articles and the way numbers are written do
not matter, and a known answer counts wherever the text contains it as whole words. So a text that names
several answers, or denies one, can count as right, and other words for the same thing count as wrong: the
scores tell one arm of an evaluation from another and are not those of the official scripts.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mllm_protector.reading import required, text_field
from mllm_protector.refusals import find_refusal

Scorer = Literal["exact", "yes_no", "option", "consensus"]
"""How an answer is compared: with any of the known answers, with yes or no, with an option by its letter or
words, or with what several people answered."""

# fmt: off
_NUMBERS = {word: str(number) for number, word in enumerate([
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
])}
# fmt: on
_ARTICLES = {"a", "an", "the"}
_WORD = re.compile(r"(?<!\w)-?\d+(?:\.\d+)?(?!\w)|\w+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_DENIAL = re.compile(r"\b(?:not|cannot|none|nothing|neither|never|without)\b|n['\u2019]t\b", re.IGNORECASE)
_LATER_YES_OR_NO = re.compile(r"[.!?:\n]\W*(yes|no)\s*(?:[.,!;:*]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Exact:
    """Any of these answers is right.

    As in MM-Vet, ``<OR>`` within an answer parts alternatives, and ``<AND>`` what a text has to say together.
    MM-Vet's own score is given by GPT-4; this one is lower for answers in other words.
    """

    answers: tuple[str, ...]

    def score(self, text: str) -> float:
        """The best alternative's share of parts that the text contains; only the first yes or no counts."""
        return max(_share_in(each, text) for answer in self.answers for each in answer.split("<OR>"))


@dataclass(frozen=True, slots=True)
class Consensus:
    """What several people answered, one answer each (VQA: Antol et al., arXiv 1505.00468)."""

    answers: tuple[str, ...]

    def score(self, text: str) -> float:
        """VQA's accuracy: min(1, n / 3) for an answer of n people, averaged over all sets of all but one.

        The answer is what the text contains: the longest of answers of which one is part of the other, and
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
    """Yes or no, also read out of a sentence as POPE's ``evaluate.py`` does.

    There a text is a no if its first sentence has "no" or "not", else a yes. Here an explicit yes or no goes
    first, and a refusal is neither: otherwise it would be right for half of the questions.
    """

    yes: bool

    def said(self, text: str) -> bool | None:
        """Whether the text says yes; ``None`` for a refusal and an empty text."""
        sentence = re.split(r"[.!?\n]", text.strip(), maxsplit=1)[0]
        later = _LATER_YES_OR_NO.search(text)
        explicit = _first_yes_or_no(sentence) or (later.group(1).lower() if later else None)
        if explicit:
            return explicit == "yes"
        if not words(text) or find_refusal(text) is not None:
            return None
        return _DENIAL.search(sentence) is None

    def score(self, text: str) -> float:
        """1 if the text says the right one, else 0."""
        return float(self.said(text) is self.yes)


@dataclass(frozen=True, slots=True)
class Option:
    """One of several options, called A, B, C and so on."""

    options: tuple[str, ...]
    right: int

    def score(self, text: str) -> float:
        """1 if the text chooses the right one, by letter or in words, else 0."""
        return float(self._chosen(text) == self.right)

    def _chosen(self, text: str) -> int | None:
        letters = string.ascii_uppercase[: len(self.options)]
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
        if len(in_words := _longest_in(text, self.options)) == 1:
            return in_words[0]
        vague: list[str] = re.findall(cue, text)
        return letters.index(vague[-1]) if vague else None


KnownAnswer = Exact | Consensus | YesNo | Option
"""What an answer is compared with; ``score`` says how right a text is, in [0, 1]."""


def known_answer(scorer: Scorer, row: Mapping[str, Any], name: str, options: Sequence[str]) -> KnownAnswer:
    """What answers to a row's question are compared with.

    Args:
        scorer: how.
        row: a row of a file.
        name: the field with what is right: a text or a list of texts (or of objects with ``answer``, as in
            VQAv2); for ``option`` its place from 0, its letter or its words.
        options: of the question.

    Raises:
        ValueError: a field that is missing or does not fit the scorer.
    """
    value = required(row, name)
    if scorer == "option":
        return Option(tuple(options), _place(value, options, name))
    if scorer == "yes_no":
        said = {"yes": True, "no": False, "true": True, "false": False}.get(str(value).strip().lower())
        if said is None:
            raise ValueError(f"field '{name}' must be yes or no")
        return YesNo(said)
    values = value if isinstance(value, list) else [value]
    told = [each if isinstance(each, dict) else {"answer": each} for each in values]
    if not told:
        raise ValueError(f"field '{name}' must be a text or a list of texts")
    answers = tuple(text_field(each, "answer", allow_empty=scorer == "consensus") for each in told)
    if scorer == "consensus":
        return Consensus(answers)
    parts = [part for answer in answers for each in answer.split("<OR>") for part in each.split("<AND>")]
    if not all(part.strip() for part in parts):
        raise ValueError(f"field '{name}' has an alternative without words")
    if {"yes", "no"} <= {" ".join(words(part)) for part in parts}:
        raise ValueError(
            f"field '{name}' accepts both yes and no, so no answer would be wrong; if these are the answers "
            "of several people, use scorer=consensus"
        )
    return Exact(answers)


def _place(value: Any, options: Sequence[str], name: str) -> int:
    """Of the right option."""
    letters = string.ascii_uppercase[: len(options)]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
        return value
    if isinstance(value, str) and value in options:
        return list(options).index(value)
    if isinstance(value, str) and len(value) == 1 and value in letters:
        return letters.index(value)
    raise ValueError(
        f"field '{name}' must be the place (from 0), letter or words of one of {len(options)} options"
    )


def _share_in(answer: str, text: str) -> float:
    wanted = " ".join(words(answer))
    if wanted in ("yes", "no"):
        return float(_first_yes_or_no(text) == wanted)
    parts = answer.split("<AND>")
    return sum(stands_in(part, text) for part in parts) / len(parts)


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
    """The places of the answers that the text contains, except parts of a longer one that it contains."""
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
