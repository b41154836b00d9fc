"""Near duplicates among a million texts, in memory that holds none of them.

Two texts are compared word by word, without regard to case, punctuation, Unicode form and spacing
(``queries.words``). Their share is that of the words which both have in the same order: the longest common
subsequence, divided by the length of the longer text. One changed word in a text of n leaves (n - 1) / n, so
with the threshold of 0.85 it is found from 7 words on, and shorter texts are duplicates only where all words
are equal.

Candidates are proposed by MinHash (signatures by ``rensa``), and the share alone decides: chance can hide a
duplicate, it never makes one. The hidden ones are few where a pair is clearly above the threshold.

It knows nothing of meaning: other words for the same, or sentences in another order, are another text.
"""

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq
from rensa import RMinHash
from tqdm import tqdm

from mllm_protector.data.queries import words
from mllm_protector.errors import InputError

THRESHOLD = 0.85
"""The least share of near duplicates: one word in seven may differ."""

_SLOTS = 128
_SLOTS_IN_BAND = 4
_GROUPINGS = 3
_NEIGHBOURS = 4
_KEPT = 4
_ROWS_AT_ONCE = 1024


def require_share(**given: float) -> None:
    """Refuse a least share that is none.

    Raises:
        InputError: it is not above 0.5, or above 1; the message begins with its name.
    """
    for name, share in given.items():
        if not 0.5 < share <= 1:
            raise InputError(f"{name}={share}: must lie above 0.5 and not above 1")


def least_common(threshold: float, count: int) -> int:
    """How many of so many words two texts must have in common to reach the threshold."""
    return math.ceil(threshold * count - 1e-9)


def near_duplicates(texts: Sequence[str], *, threshold: float) -> NDArray[np.int64]:
    """The first text of each text's group.

    A text joins the earliest group whose *first* text it is near to, by the share that the module describes.
    Nearness is not passed on: of a chain in which each is near to the next, only those near to the first
    join it. Another order of the rows gives other firsts, and with them may give other groups of a chain.

    The work grows as N log N, whatever the texts: each is compared with ``_KEPT`` others at most, and in each
    band's bucket (texts that agree in ``_SLOTS_IN_BAND`` slots) only signatures are compared, with those of
    the ``_NEIGHBOURS`` rows before and of the bucket's first. Memory is about 200 bytes a text.

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
    equal = _first_equal(digests)
    del digests
    distinct = np.flatnonzero(equal == np.arange(len(equal), dtype=np.int32)).astype(np.int32)
    # Each replaced word spoils two word pairs. Half of what then remains in common at the threshold is asked
    # for, since signatures only estimate it.
    remaining = (2 * threshold - 1) / (3 - 2 * threshold) / 2
    proposals = _propose(signatures, distinct, least=math.ceil(remaining * _SLOTS))
    del signatures
    first = np.arange(len(equal), dtype=np.int64)

    @lru_cache(maxsize=256)
    def words_of(row: int) -> list[str]:
        return words(texts[row])

    proposed = np.flatnonzero(proposals[:, 0] >= 0)
    for position in tqdm(proposed, desc="comparing texts", unit="text", disable=None):
        row = distinct[position]
        own = words(texts[int(row)])
        others = proposals[position]
        for candidate in np.unique(first[distinct[others[others >= 0]]]):
            other = words_of(int(candidate))
            least = least_common(threshold, max(len(own), len(other)))
            if LCSseq.similarity(own, other, score_cutoff=least) >= least:
                first[row] = candidate
                break
    return first[equal]


def _read(texts: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Signatures (N, _SLOTS) uint8, the low bytes of a MinHash of word pairs, and digests (N, 2) uint64."""
    signatures = np.empty((len(texts), _SLOTS), dtype=np.uint8)
    digests = np.empty((len(texts), 2), dtype=np.uint64)
    start = 0
    with tqdm(total=len(texts), desc="reading texts", unit="text", disable=None) as bar:
        for batch in _batches(texts):
            end = start + len(batch)
            rows = [words(text) for text in batch]
            hashes = RMinHash.digests_from_token_sets(list(map(_word_pairs, rows)), num_perm=_SLOTS, seed=0)
            signatures[start:end] = np.array(hashes, dtype=np.uint32).astype(np.uint8)
            joined = b"".join(
                hashlib.blake2b(" ".join(row).encode(), digest_size=16).digest() for row in rows
            )
            digests[start:end] = np.frombuffer(joined, dtype=np.uint64).reshape(-1, 2)
            start = end
            bar.update(len(batch))
    return signatures, digests


def _word_pairs(row: Sequence[str]) -> list[str]:
    """Each word with the next one; the first and the last also with the text's end."""
    return [f"{left} {right}" for left, right in zip(["", *row], [*row, ""], strict=True)]


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    stream = iter(texts)
    while batch := list(islice(stream, _ROWS_AT_ONCE)):
        yield batch


def _first_equal(digests: NDArray[np.uint64]) -> NDArray[np.int32]:
    """(N,) int32: the first row with the same digest."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    equal = np.empty(len(order), dtype=np.int32)
    equal[order] = order[_last_true(fresh)]
    return equal


def _last_true(fresh: NDArray[np.bool_]) -> NDArray[np.int32]:
    """For each place the nearest true one at or before it."""
    return np.maximum.accumulate(np.where(fresh, np.arange(len(fresh), dtype=np.int32), np.int32(0)))


def _propose(signatures: NDArray[np.uint8], distinct: NDArray[np.int32], *, least: int) -> NDArray[np.int32]:
    """For each distinct text the earlier ones that are most like it by their signatures.

    Args:
        signatures: (N, _SLOTS) uint8.
        distinct: (D,) int32, the rows to look at.
        least: slots that two signatures must have in common.

    Returns:
        (D, _KEPT) int32: positions in ``distinct``, -1 for none; the first is none only if all are.
    """
    proposals = np.full((len(distinct), _KEPT), -1, dtype=np.int32)
    agreements = np.zeros((len(distinct), _KEPT), dtype=np.uint8)
    shuffle = random.Random(0)
    bands = [
        slots[start : start + _SLOTS_IN_BAND]
        for slots in (shuffle.sample(range(_SLOTS), _SLOTS) for _ in range(_GROUPINGS))
        for start in range(0, _SLOTS, _SLOTS_IN_BAND)
    ]
    for slots in tqdm(bands, desc="comparing signatures", unit="band", disable=None):
        for later, earlier in _neighbours(signatures[distinct[:, None], slots]):
            for start in range(0, len(later), _ROWS_AT_ONCE):
                rows, others = later[start : start + _ROWS_AT_ONCE], earlier[start : start + _ROWS_AT_ONCE]
                new = (proposals[rows] != others[:, None]).all(axis=1)
                rows, others = rows[new], others[new]
                common = (signatures[distinct[rows]] == signatures[distinct[others]]).sum(axis=1)
                weakest = agreements[rows].argmin(axis=1)
                better = (common >= least) & (common > agreements[rows, weakest])
                proposals[rows[better], weakest[better]] = others[better]
                agreements[rows[better], weakest[better]] = common[better]
    return proposals


def _neighbours(band: NDArray[np.uint8]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Pairs (later, earlier) of rows that agree in a band (D, _SLOTS_IN_BAND) uint8; no later one twice."""
    keys = np.ascontiguousarray(band).view(np.uint32)[:, 0]
    order = np.argsort(keys, kind="stable").astype(np.int32)
    keys = keys[order]
    begin = _last_true(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
    place = np.arange(len(keys), dtype=np.int32) - begin
    for lag in range(1, _NEIGHBOURS + 1):
        later = np.flatnonzero(place >= lag)
        yield order[later], order[later - lag]
    later = np.flatnonzero(place > _NEIGHBOURS)
    yield order[later], order[begin[later]]
