"""Texts that repeat others: equal ones, near duplicates, and benchmark questions in the training data.

Near texts are compared word by word (``queries.words``). Their share is the longest common subsequence of
words, divided by the length of the longer text. One changed word in a text of n leaves (n - 1) / n, so with
the threshold of 0.85 it is found from 7 words on, and shorter texts are duplicates only where all words are
equal. Meaning plays no part: a text in other words is not found, and one word that turns the meaning around
does not separate two texts.
"""

import hashlib
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq
from rapidfuzz.fuzz import partial_ratio_alignment
from rensa import RMinHash

from mllm_protector.data.queries import digest, query_key, words
from mllm_protector.data.table import in_batches
from mllm_protector.errors import InputError
from mllm_protector.progress import Progress, followed
from mllm_protector.records import AnswerPair, LabelledAnswer

THRESHOLD = 0.85
"""The least share of near duplicates: one word in seven may differ."""

_BANDS, _HASHES_IN_BAND = 40, 3
_MIX = np.array([1, 0x9E3779B1, 0x85EBCA6B], np.uint32)
"""Odd numbers that make one hash of those of a band, modulo 2**32."""

_COMPARED = 4
"""Candidates that a text is compared with."""

_WHOLE_TEXT_BELOW = 4
_EXAMPLES = 10
_EXCERPT = 200
_WORDS_AROUND = 5


def text_of(record: AnswerPair | LabelledAnswer) -> str:
    """The question and its one or two answers as one text."""
    if isinstance(record, AnswerPair):
        return "\0".join((record.query, record.accepted, record.rejected))
    return "\0".join((record.query, record.answer))


def label_of(record: AnswerPair | LabelledAnswer) -> int:
    """One number below 4 for each combination of a record's labels."""
    if isinstance(record, AnswerPair):
        return 2 * record.accepted_harmful + record.rejected_harmful
    return int(record.harmful)


def first_equal(values: NDArray[Any]) -> NDArray[np.int64]:
    """For each value the first place where it occurs."""
    _, first, group = np.unique(values, return_index=True, return_inverse=True)
    places: NDArray[np.int64] = first[group]
    return places


def distinct(
    texts: NDArray[np.uint64], labels: NDArray[np.uint8], dropped: Counter[str]
) -> NDArray[np.int64]:
    """The places of the records to keep, where texts may occur several times.

    Equal texts with equal labels are kept once, the first. Where labels differ, because several people
    labelled an answer, the most frequent one wins; with a tie the text is dropped. ``dropped`` gets the
    number of dropped records by reason.
    """
    rows = pd.DataFrame({"text": texts, "label": labels, "place": np.arange(len(texts))})
    votes = rows.groupby(["text", "label"])["place"].agg(["size", "min"]).reset_index()
    of_text = votes.groupby("text")["size"]
    votes["all"], best = of_text.transform("sum"), of_text.transform("max")
    winners = votes[votes["size"] == best]
    tied = winners["text"].duplicated(keep=False)
    kept, split = winners[~tied], winners[tied].drop_duplicates("text")
    counts = {
        "exact duplicate": (kept["size"] - 1).sum(),
        "outvoted label": (kept["all"] - kept["size"]).sum(),
        "contradictory labels": split["all"].sum(),
    }
    dropped.update({reason: int(count) for reason, count in counts.items() if count})
    return np.sort(kept["min"].to_numpy(np.int64))


def near_duplicates(texts: Sequence[str], *, threshold: float) -> NDArray[np.int64]:
    """For each text the first one that it nearly repeats; its own place if there is none.

    A group's first is near to all of the group; two others need not be. MinHash proposes candidates: of the
    rows that agree in a band of hashes the first, and the one before. Each text is compared with
    ``_COMPARED`` of them, so the work grows as N log N. Chance can hide a duplicate, though rarely one
    clearly above the threshold; it never makes one. Memory is about 500 bytes a text.

    Args:
        texts: read in order twice, and some of them again by index; never held.
        threshold: the least share, above 0.5; 1 for equal words only.

    Raises:
        InputError: a threshold out of range.
    """
    if not 0.5 < threshold <= 1:
        raise InputError(f"threshold={threshold}: must lie above 0.5 and not above 1")
    proposals, equal = _read(texts)
    first = np.arange(len(texts))

    @lru_cache(maxsize=256)
    def words_of(row: int) -> list[str]:
        return words(texts[row])

    for row, text in enumerate(followed(texts, "comparing texts", "text")):
        others = equal[proposals[row]]
        if equal[row] != row or not (others := others[others != row]).size:
            continue
        likely = Counter(first[others].tolist()).most_common(_COMPARED)
        own = words(text)
        for candidate, _ in likely:
            other = words_of(candidate)
            least = least_common(threshold, max(len(own), len(other)))
            if LCSseq.similarity(own, other, score_cutoff=least) >= least:
                first[row] = candidate
                break
    return first[equal]


def _read(texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Earlier rows that agree with each row in a band (N, 2 * _BANDS), or the row itself where there is none;
    and the first row (N,) with the same words.
    """
    bands, digests = np.empty((_BANDS, len(texts)), np.uint32), np.empty(len(texts), np.uint64)
    start = 0
    with Progress("reading texts", "text", len(texts)) as bar:
        for batch in in_batches(texts):
            rows, end = list(map(words, batch)), start + len(batch)
            pairs = list(map(_word_pairs, rows))
            hashes = RMinHash.digests_from_token_sets(pairs, num_perm=_BANDS * _HASHES_IN_BAND, seed=0)
            groups = np.array(hashes, np.uint32).reshape(len(batch), _BANDS, _HASHES_IN_BAND)
            bands[:, start:end] = (groups @ _MIX).T
            digests[start:end] = [digest(0, " ".join(row)) for row in rows]
            start = end
            bar.update(len(batch))
    found = np.empty((len(texts), 2 * _BANDS), np.int32)
    for band, keys in enumerate(bands):
        order = np.argsort(keys, kind="stable")
        begin = np.searchsorted(keys[order], keys[order])  # of each row's bucket
        found[order, 2 * band] = order[begin]
        found[order, 2 * band + 1] = order[np.maximum(begin, np.arange(len(keys)) - 1)]
    return found, first_equal(digests)


def _word_pairs(row: Sequence[str]) -> list[str]:
    """Each word with the next one; the first and the last also with the text's end."""
    return [f"{left} {right}" for left, right in zip(["", *row], [*row, ""], strict=True)]


def least_common(threshold: float, count: int) -> int:
    """How many of ``count`` words two texts must share to reach the threshold."""
    return math.ceil(threshold * count - 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The questions of one benchmark that were found.

    Attributes:
        questions: how many different ones were looked for; ``fingerprint`` is of their sorted digests.
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
    """``rows`` (R,) int64, ascending: the texts with a question of any benchmark; and each one's findings."""

    rows: NDArray[np.int64]
    findings: Mapping[str, Finding]

    def as_json(self) -> dict[str, Any]:
        """The findings by name, for a file."""
        return {name: asdict(finding) for name, finding in self.findings.items()}


def question_digest(text: str) -> str:
    """16 hexadecimal digits for a question: the same for the same words."""
    return hashlib.sha256(query_key(text).encode()).hexdigest()[:16]


def check_contamination(texts: Iterable[str], benchmarks: Mapping[str, Sequence[str]]) -> Contamination:
    """Look for the questions of benchmarks in training texts, in memory that grows with the questions alone.

    A text holds a question if one passage of it, as long as the question, has ``THRESHOLD`` of its words in
    its order. Questions of fewer than 7 words must be there word by word, and those of fewer than 4 words
    must be the whole text.

    Args:
        texts: read once; the queries, or whole dialogues.
        benchmarks: their questions by name. Equal ones count once, and those without a word never.
    """
    searches = {name: _Search(questions) for name, questions in benchmarks.items()}
    rows = array("q")
    for row, text in enumerate(texts):
        as_words = words(text)
        if sum(search.look(as_words, row) for search in searches.values()):
            rows.append(row)
    findings = {name: search.finding() for name, search in searches.items()}
    return Contamination(rows=np.array(rows, np.int64), findings=findings)


class _Search:
    """The search for one benchmark's questions, text after text.

    If at most m words of a question may be missing, one of its m + 1 rarest words must be in the text. So a
    text is only compared with the questions that have one of its words among their rarest, and nothing is
    overlooked. (In questions of more than 64 words a heuristic looks for the best passage.)
    """

    def __init__(self, questions: Sequence[str]) -> None:
        self._questions = {question_digest(question): question for question in questions if words(question)}
        self._words = {name: words(question) for name, question in self._questions.items()}
        self._by_word: defaultdict[str, list[str]] = defaultdict(list)
        frequencies = Counter(word for each in self._words.values() for word in set(each))
        for name, each in self._words.items():
            rarest = sorted(set(each), key=lambda word: (frequencies[word], word))
            for word in rarest[: len(each) - least_common(THRESHOLD, len(each)) + 1]:
                self._by_word[word].append(name)
        self._order = {name: place for place, name in enumerate(self._questions)}
        self._rows = 0
        self._found: Counter[str] = Counter()
        self._examples: list[dict[str, Any]] = []

    def look(self, text: Sequence[str], row: int) -> bool:
        """Whether any question is in the text, given in words; each find is counted."""
        distinct = frozenset(text)
        candidates = {name for word in distinct & self._by_word.keys() for name in self._by_word[word]}
        found = False
        for name in sorted(candidates, key=self._order.__getitem__):
            question = self._words[name]
            least = least_common(THRESHOLD, len(question))
            if len(set(question) - distinct) > len(question) - least:
                continue
            start, common = _best_passage(question, text)
            if common < least:
                continue
            found = True
            self._found[name] += 1
            if len(self._examples) < _EXAMPLES:
                end = start + len(question) + _WORDS_AROUND
                passage = " ".join(text[max(0, start - _WORDS_AROUND) : end])[:_EXCERPT]
                share = round(common / len(question), 4)
                example = {"row": row, "question": self._questions[name], "text": passage, "share": share}
                self._examples.append(example)
        self._rows += found
        return found

    def finding(self) -> Finding:
        """Everything found so far."""
        return Finding(
            questions=len(self._questions),
            fingerprint=hashlib.sha256("\n".join(sorted(self._questions)).encode()).hexdigest(),
            threshold=THRESHOLD,
            rows=self._rows,
            found=dict(sorted(self._found.items())),
            examples=self._examples,
        )


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
