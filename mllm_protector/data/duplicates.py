"""Rows that say the same: equal texts whose labels are voted on, and near duplicates among a million texts.

Near duplicates are compared word by word, without regard to case, punctuation, Unicode form and spacing
(``queries.words``). Their share is the longest common subsequence of words, divided by the length of the
longer text. One changed word in a text of n leaves (n - 1) / n, so with the threshold of 0.85 it is found
from 7 words on, and shorter texts are duplicates only where all words are equal. Meaning plays no part.

MinHash (``rensa``) proposes candidates and the share decides. Chance can hide a duplicate, though rarely one
clearly above the threshold; it never makes one.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq
from rensa import RMinHash
from tqdm import tqdm

from mllm_protector.data.queries import digest, words
from mllm_protector.data.table import in_batches
from mllm_protector.errors import InputError
from mllm_protector.records import AnswerPair, LabelledAnswer

THRESHOLD = 0.85
"""The least share of near duplicates: one word in seven may differ."""

_SLOTS = 128
_SLOTS_IN_BAND = 4
_GROUPINGS = 3
_NEIGHBOURS = 4
_KEPT = 4
_PAIRS_AT_ONCE = 1024


def text_of(record: AnswerPair | LabelledAnswer, separator: str = "\n") -> str:
    """The question and its one or two answers as one text."""
    if isinstance(record, AnswerPair):
        return separator.join((record.query, record.accepted, record.rejected))
    return separator.join((record.query, record.answer))


def label_of(record: AnswerPair | LabelledAnswer) -> int:
    """One number below 4 for each combination of a record's labels."""
    if isinstance(record, AnswerPair):
        return 2 * record.accepted_harmful + record.rejected_harmful
    return int(record.harmful)


def first_equal(values: NDArray[Any]) -> NDArray[np.int64]:
    """For each value the first place where it stands."""
    _, first, group = np.unique(values, return_index=True, return_inverse=True)
    places: NDArray[np.int64] = first[group]
    return places


def distinct(
    texts: NDArray[np.uint64], labels: NDArray[np.uint8], dropped: Counter[str]
) -> NDArray[np.int64]:
    """The places of the records to keep, where texts may occur several times.

    Equal texts with equal labels are kept once, the first. Where labels differ, because several people
    labelled an answer, the most frequent one wins; with a tie the text is dropped.

    Args:
        texts: (N,) a digest of each record's words.
        labels: (N,) below 4.
        dropped: gets the number of dropped records by reason.
    """
    _, group = np.unique(texts, return_inverse=True)
    voted, first, votes = np.unique(
        group.astype(np.int64) * 4 + labels, return_index=True, return_counts=True
    )
    ranked = np.lexsort((-votes, voted // 4))  # by text, the most frequent label first
    leads = np.diff(voted[ranked] // 4, prepend=-1) != 0
    winner, behind = ranked[leads], ranked[~leads]
    best = np.zeros(int(group.max(initial=-1)) + 1, np.int64)
    best[voted[winner] // 4] = votes[winner]
    tied = np.zeros(len(best), np.bool_)
    tied[voted[behind][votes[behind] == best[voted[behind] // 4]] // 4] = True
    kept = winner[~tied[voted[winner] // 4]]
    everything = np.bincount(group, minlength=len(best))
    counts = {
        "exact duplicate": (votes[kept] - 1).sum(),
        "outvoted label": everything[~tied].sum() - votes[kept].sum(),
        "contradictory labels": everything[tied].sum(),
    }
    dropped.update({reason: int(count) for reason, count in counts.items() if count})
    places: NDArray[np.int64] = np.sort(first[kept])
    return places


def require_share(**given: float) -> None:
    """Refuse a least share that is none.

    Raises:
        InputError: it is not above 0.5, or above 1; the message begins with its name.
    """
    for name, share in given.items():
        if not 0.5 < share <= 1:
            raise InputError(f"{name}={share}: must lie above 0.5 and not above 1")


def least_common(threshold: float, count: int) -> int:
    """How many of ``count`` words two texts must share to reach the threshold."""
    return math.ceil(threshold * count - 1e-9)


def near_duplicates(texts: Sequence[str], *, threshold: float) -> NDArray[np.int64]:
    """The first text of each text's group.

    A text joins the earliest group whose *first* text it is near to. Nearness is not passed on: of a chain in
    which each is near to the next, only those near to the first join it, so another order of the rows may
    give other groups.

    The work grows as N log N, whatever the texts: each is compared with ``_KEPT`` others at most, and in each
    band's bucket (texts that agree in ``_SLOTS_IN_BAND`` slots) only signatures are compared, with those of
    the ``_NEIGHBOURS`` rows before and of the bucket's first. Memory is about 300 bytes a text.

    Args:
        texts: read in order once, and some of them again by index; never held.
        threshold: the least share of two texts of a group, above 0.5; 1 for equal words only.

    Returns:
        (N,) int64: for each text the index of its group's first, its own if it is near to none.

    Raises:
        InputError: a threshold out of range.
    """
    require_share(threshold=threshold)
    signatures, digests = _read(texts)
    equal = first_equal(digests)
    apart = np.flatnonzero(equal == np.arange(len(equal))).astype(np.int32)
    signatures = signatures[apart]
    # Each replaced word spoils two word pairs. Half of what then remains in common at the threshold is asked
    # for, since signatures only estimate it.
    remaining = (2 * threshold - 1) / (3 - 2 * threshold) / 2
    proposals = _propose(signatures, least=math.ceil(remaining * _SLOTS))
    del signatures
    first = np.arange(len(equal))

    @lru_cache(maxsize=256)
    def words_of(row: int) -> list[str]:
        return words(texts[row])

    proposed = np.flatnonzero(proposals[:, 0] >= 0)
    for position in tqdm(proposed, desc="comparing texts", unit="text", disable=None):
        row, others = apart[position], proposals[position]
        own = words(texts[int(row)])
        for candidate in np.unique(first[apart[others[others >= 0]]]):
            other = words_of(int(candidate))
            least = least_common(threshold, max(len(own), len(other)))
            if LCSseq.similarity(own, other, score_cutoff=least) >= least:
                first[row] = candidate
                break
    return first[equal]


def _read(texts: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Signatures (N, _SLOTS), the low bytes of a MinHash of word pairs, and a digest (N,) of the words."""
    signatures = np.empty((len(texts), _SLOTS), np.uint8)
    digests = np.empty(len(texts), np.uint64)
    start = 0
    with tqdm(total=len(texts), desc="reading texts", unit="text", disable=None) as bar:
        for batch in in_batches(texts):
            end = start + len(batch)
            rows = [words(text) for text in batch]
            hashes = RMinHash.digests_from_token_sets(list(map(_word_pairs, rows)), num_perm=_SLOTS, seed=0)
            signatures[start:end] = np.array(hashes, np.uint32).astype(np.uint8)
            digests[start:end] = [digest(0, " ".join(row)) for row in rows]
            start = end
            bar.update(len(batch))
    return signatures, digests


def _word_pairs(row: Sequence[str]) -> list[str]:
    """Each word with the next one; the first and the last also with the text's end."""
    return [f"{left} {right}" for left, right in zip(["", *row], [*row, ""], strict=True)]


def _propose(signatures: NDArray[np.uint8], *, least: int) -> NDArray[np.int32]:
    """For each text the earlier ones that are most like it by their signatures.

    Args:
        signatures: (D, _SLOTS) of texts that all differ.
        least: slots that two signatures must have in common.

    Returns:
        (D, _KEPT) int32: positions, -1 for none; the first is none only if all are.
    """
    proposals = np.full((len(signatures), _KEPT), -1, np.int32)
    agreements = np.zeros((len(signatures), _KEPT), np.uint8)
    shuffle = random.Random(0)
    bands = [
        slots[start : start + _SLOTS_IN_BAND]
        for slots in (shuffle.sample(range(_SLOTS), _SLOTS) for _ in range(_GROUPINGS))
        for start in range(0, _SLOTS, _SLOTS_IN_BAND)
    ]
    for slots in tqdm(bands, desc="comparing signatures", unit="band", disable=None):
        for later, earlier in _neighbours(signatures[:, slots]):
            for start in range(0, len(later), _PAIRS_AT_ONCE):
                rows, others = later[start : start + _PAIRS_AT_ONCE], earlier[start : start + _PAIRS_AT_ONCE]
                new = (proposals[rows] != others[:, None]).all(axis=1)
                rows, others = rows[new], others[new]
                common = (signatures[rows] == signatures[others]).sum(axis=1)
                weakest = agreements[rows].argmin(axis=1)
                better = (common >= least) & (common > agreements[rows, weakest])
                proposals[rows[better], weakest[better]] = others[better]
                agreements[rows[better], weakest[better]] = common[better]
    return proposals


def _neighbours(band: NDArray[np.uint8]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Pairs (later, earlier) of rows that agree in a band (D, _SLOTS_IN_BAND), no later one twice."""
    keys = np.ascontiguousarray(band).view(np.uint32)[:, 0]
    order = np.argsort(keys, kind="stable").astype(np.int32)
    begin = np.searchsorted(keys[order], keys[order])  # of each row's bucket
    place = np.arange(len(keys)) - begin
    for lag in range(1, _NEIGHBOURS + 1):
        later = np.flatnonzero(place >= lag)
        yield order[later], order[later - lag]
    later = np.flatnonzero(place > _NEIGHBOURS)
    yield order[later], order[begin[later]]
