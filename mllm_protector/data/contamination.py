"""Which questions of a benchmark stand in the training data.

A text holds a question if one passage of it, as long as the question, has nearly all of its words in its
order; words are compared as among duplicates. The share is that of the question's words: one word replaced,
inserted or left out in a question of n words leaves (n - 1) / n. With the threshold of 0.85 this is found
from 7 words on; shorter questions must stand there word by word, and those of fewer than 4 words alone in the
text, since as part of a text they are anyone's words.

Two questions that differ in one word of seven are one and the same here, though that word may turn the
meaning around; and a question in other words is not found at all.
"""

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq
from rapidfuzz.fuzz import partial_ratio_alignment

from mllm_protector.data.duplicates import THRESHOLD, least_common, require_share
from mllm_protector.data.queries import query_key, words

_WHOLE_TEXT_BELOW = 4
_EXAMPLES = 10
_EXCERPT = 200
_WORDS_AROUND = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A question in a text.

    Attributes:
        row: of the text, from 0.
        question: its index.
        share: of the question's words that the passage has.
        passage: the words compared and a few around them, at most 200 characters.
    """

    row: int
    question: int
    share: float
    passage: str


class QuestionIndex:
    """Finds questions in texts, in memory that grows with the questions alone.

    If at most m words of a question may be missing, one of its m + 1 rarest words must stand in the text. So
    a text is only compared with the questions that have one of its words among their rarest, and nothing is
    overlooked. (In questions of more than 64 words the best passage is searched for by a heuristic.)
    """

    def __init__(self, questions: Sequence[str], *, threshold: float = THRESHOLD) -> None:
        """Index the questions; of equal ones the first, and none without a word.

        Args:
            questions: of any length.
            threshold: the least share of a question's words, above 0.5; 1 for all of them.

        Raises:
            InputError: a threshold out of range.
        """
        require_share(threshold=threshold)
        indices: dict[tuple[str, ...], int] = {}
        for index, question in enumerate(questions):
            indices.setdefault(tuple(words(question)), index)
        self._words = {index: list(distinct) for distinct, index in indices.items()}
        self._sets = {index: frozenset(each) for index, each in self._words.items()}
        self._least = {index: least_common(threshold, len(each)) for index, each in self._words.items()}
        frequencies = Counter(word for each in self._sets.values() for word in each)
        self._by_word: defaultdict[str, list[int]] = defaultdict(list)
        for index, each in self._words.items():
            rarest = sorted(self._sets[index], key=lambda word: (frequencies[word], word))
            for word in rarest[: len(each) - self._least[index] + 1]:
                self._by_word[word].append(index)

    def find(self, texts: Iterable[str]) -> Iterator[Match]:
        """Every question that a text holds, text by text, a text's by their index."""
        for row, text in enumerate(texts):
            yield from self.find_in(words(text), row)

    def find_in(self, text: Sequence[str], row: int) -> Iterator[Match]:
        """The questions in one text that is given in words (``queries.words``)."""
        distinct = frozenset(text)
        candidates = {index for word in distinct & self._by_word.keys() for index in self._by_word[word]}
        for index in sorted(candidates):
            question, least = self._words[index], self._least[index]
            if len(self._sets[index] - distinct) > len(question) - least:
                continue
            start, common = _best_passage(question, text)
            if common >= least:
                passage = text[max(0, start - _WORDS_AROUND) : start + len(question) + _WORDS_AROUND]
                share = common / len(question)
                yield Match(row=row, question=index, share=share, passage=" ".join(passage)[:_EXCERPT])


def _best_passage(question: Sequence[str], text: Sequence[str]) -> tuple[int, int]:
    """Where in a text a passage of a question's length has most of its words in order, and how many."""
    if len(question) < _WHOLE_TEXT_BELOW:
        return 0, len(question) if list(text) == list(question) else 0
    # Blanks on both sides let a passage reach over the text's ends, so that all have the same length.
    blanks = [""] * len(question)
    padded = [*blanks, *text, *blanks]
    found = partial_ratio_alignment(question, padded)
    if found is None:
        return 0, 0
    common = LCSseq.similarity(question, padded[found.dest_start : found.dest_end])
    return max(0, found.dest_start - len(blanks)), common


def question_digest(text: str) -> str:
    """16 hexadecimal digits that stand for a question: the same for the same words."""
    return hashlib.sha256(query_key(text).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What of one benchmark was found.

    Attributes:
        questions: the different ones that were looked for.
        fingerprint: sha256 over their sorted digests.
        threshold: see ``QuestionIndex``.
        rows: texts with at least one of them.
        found: for the digest of each question that was found, the number of texts.
        examples: the first few, as ``{"row", "question", "text", "share"}``.
    """

    questions: int
    fingerprint: str
    threshold: float
    rows: int = 0
    found: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contamination:
    """What of all benchmarks was found.

    Attributes:
        rows: (R,) int64, ascending: the texts that hold a question of any benchmark.
        findings: by the benchmark's name.
    """

    rows: NDArray[np.int64]
    findings: Mapping[str, Finding]

    def as_json(self) -> dict[str, Any]:
        """The findings by name, for a file."""
        return {name: asdict(finding) for name, finding in self.findings.items()}


def check_contamination(
    texts: Iterable[str], benchmarks: Mapping[str, Sequence[str]], *, threshold: float = THRESHOLD
) -> Contamination:
    """Look for the questions of benchmarks in training texts.

    Args:
        texts: read once; the queries, or whole dialogues.
        benchmarks: their questions by name; equal ones count once.
        threshold: see ``QuestionIndex``.

    Raises:
        InputError: a threshold out of range.
    """
    searches = {name: _Search(questions, threshold) for name, questions in benchmarks.items()}
    rows = array("q")
    for row, text in enumerate(texts):
        as_words = words(text)
        if sum(search.look(as_words, row) for search in searches.values()):
            rows.append(row)
    return Contamination(
        rows=np.array(rows, dtype=np.int64),
        findings={name: search.finding() for name, search in searches.items()},
    )


class _Search:
    """The search for one benchmark's questions, text after text."""

    def __init__(self, questions: Sequence[str], threshold: float) -> None:
        self._questions = {question_digest(question): question for question in questions if words(question)}
        self._digests = list(self._questions)
        self._threshold = threshold
        self._index = QuestionIndex(list(self._questions.values()), threshold=threshold)
        self._found: Counter[str] = Counter()
        self._rows = 0
        self._examples: list[dict[str, Any]] = []

    def look(self, text: Sequence[str], row: int) -> bool:
        """Whether any question stands in the text."""
        matches = list(self._index.find_in(text, row))
        self._rows += bool(matches)
        self._found.update(self._digests[match.question] for match in matches)
        for match in matches[: _EXAMPLES - len(self._examples)]:
            question = self._questions[self._digests[match.question]]
            self._examples.append(
                {"row": row, "question": question, "text": match.passage, "share": round(match.share, 4)}
            )
        return bool(matches)

    def finding(self) -> Finding:
        """What was found so far."""
        return Finding(
            questions=len(self._digests),
            fingerprint=hashlib.sha256("\n".join(sorted(self._digests)).encode()).hexdigest(),
            threshold=self._threshold,
            rows=self._rows,
            found=dict(sorted(self._found.items())),
            examples=self._examples,
        )
