"""Which questions of a benchmark are in the training data.

A text holds a question if one passage of it, as long as the question, has nearly all of its words in its
order; words are compared as among duplicates. One word replaced, inserted or left out in a question of n
words leaves a share of (n - 1) / n. With the threshold of 0.85 this is found from 7 words on; shorter
questions must be there word by word, and those of fewer than 4 words must be the whole text.

Two questions that differ in one word of seven are the same here, though that word may turn the meaning
around; and a question in other words is not found.
"""

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
class Finding:
    """What of one benchmark was found.

    Attributes:
        questions: how many different ones were looked for.
        fingerprint: sha256 over their sorted digests.
        threshold: the least share of a question's words.
        rows: texts with at least one of them.
        found: for the digest of each question that was found, the number of texts.
        examples: the first few, as ``{"row", "question", "text", "share"}``.
    """

    questions: int
    fingerprint: str
    threshold: float
    rows: int
    found: dict[str, int]
    examples: list[dict[str, Any]]


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


def question_digest(text: str) -> str:
    """16 hexadecimal digits that stand for a question: the same for the same words."""
    return hashlib.sha256(query_key(text).encode()).hexdigest()[:16]


def check_contamination(
    texts: Iterable[str], benchmarks: Mapping[str, Sequence[str]], *, threshold: float = THRESHOLD
) -> Contamination:
    """Look for the questions of benchmarks in training texts, in memory that grows with the questions alone.

    Args:
        texts: read once; the queries, or whole dialogues.
        benchmarks: their questions by name. Equal ones count once, and those without a word never.
        threshold: the least share of a question's words, above 0.5; 1 for all of them.

    Raises:
        InputError: a threshold out of range.
    """
    require_share(threshold=threshold)
    searches = {name: _Search(questions, threshold) for name, questions in benchmarks.items()}
    rows = array("q")
    for row, text in enumerate(texts):
        as_words = words(text)
        if sum(search.look(as_words, row) for search in searches.values()):
            rows.append(row)
    return Contamination(
        rows=np.array(rows, np.int64),
        findings={name: search.finding() for name, search in searches.items()},
    )


class _Search:
    """The search for one benchmark's questions, text after text.

    If at most m words of a question may be missing, one of its m + 1 rarest words must be in the text. So a
    text is only compared with the questions that have one of its words among their rarest, and nothing is
    overlooked. (In questions of more than 64 words the best passage is searched for by a heuristic.)
    """

    def __init__(self, questions: Sequence[str], threshold: float) -> None:
        self._questions = {question_digest(question): question for question in questions if words(question)}
        self._words = {name: words(question) for name, question in self._questions.items()}
        self._threshold = threshold
        self._by_word: defaultdict[str, list[str]] = defaultdict(list)
        frequencies = Counter(word for each in self._words.values() for word in set(each))
        for name, each in self._words.items():
            rarest = sorted(set(each), key=lambda word: (frequencies[word], word))
            for word in rarest[: len(each) - self._least(name) + 1]:
                self._by_word[word].append(name)
        self._order = {name: place for place, name in enumerate(self._questions)}
        self._rows = 0
        self._found: Counter[str] = Counter()
        self._examples: list[dict[str, Any]] = []

    def look(self, text: Sequence[str], row: int) -> bool:
        """Whether any question is in the text, given in words; what is found is counted."""
        distinct = frozenset(text)
        candidates = {name for word in distinct & self._by_word.keys() for name in self._by_word[word]}
        found = False
        for name in sorted(candidates, key=self._order.__getitem__):
            question = self._words[name]
            if len(set(question) - distinct) > len(question) - self._least(name):
                continue
            start, common = _best_passage(question, text)
            if common < self._least(name):
                continue
            found = True
            self._found[name] += 1
            if len(self._examples) < _EXAMPLES:
                passage = " ".join(
                    text[max(0, start - _WORDS_AROUND) : start + len(question) + _WORDS_AROUND]
                )
                example = {"row": row, "question": self._questions[name], "text": passage[:_EXCERPT]}
                self._examples.append({**example, "share": round(common / len(question), 4)})
        self._rows += found
        return found

    def finding(self) -> Finding:
        """What was found so far."""
        return Finding(
            questions=len(self._questions),
            fingerprint=hashlib.sha256("\n".join(sorted(self._questions)).encode()).hexdigest(),
            threshold=self._threshold,
            rows=self._rows,
            found=dict(sorted(self._found.items())),
            examples=self._examples,
        )

    def _least(self, name: str) -> int:
        return least_common(self._threshold, len(self._words[name]))


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
