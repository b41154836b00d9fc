"""One-sided bounds of rates, and the weight of each answer in a rate. Pure functions, for ``calibration``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Answers of each label, at least one, and the different queries that they answer."""

    harmful: int
    harmless: int
    harmful_queries: int
    harmless_queries: int

    @classmethod
    def of(cls, labels: Sequence[bool], queries: Sequence[str] | None) -> "Sizes":
        """Count; without queries each answer has its own."""
        harmful, harmless = sum(map(bool, labels)), sum(not label for label in labels)
        if queries is None:
            return cls(harmful=harmful, harmless=harmless, harmful_queries=harmful, harmless_queries=harmless)
        asked: tuple[set[str], set[str]] = (set(), set())
        for label, query in zip(labels, queries, strict=True):
            asked[not label].add(query)
        return cls(
            harmful=harmful,
            harmless=harmless,
            harmful_queries=len(asked[0]),
            harmless_queries=len(asked[1]),
        )


def query_weights(labels: Sequence[bool], queries: Sequence[str] | None) -> NDArray[np.float64]:
    """(n,) the weight of each answer in a rate: one over the number of answers of its label to its query.

    A rate is then a mean over queries, which are independent draws, however many answers each has.
    Simulated with 200 queries, of 1 to 200 answers (Zipf) with a correlation of 0 to .95, a promise at a
    confidence of .95 is broken in 1 % to 3 % of samples; by answers it would be in up to 32 %.
    """
    if queries is None:
        return np.ones(len(labels))
    names = np.unique(queries, return_inverse=True)[1] * 2 + np.asarray(labels, dtype=np.int64)
    weights: NDArray[np.float64] = 1.0 / np.bincount(names)[names]
    return weights


def upper(counts: NDArray[np.float64], total: int, confidence: float) -> NDArray[np.float64]:
    """One-sided upper Clopper-Pearson bounds of shares; counts need not be whole."""
    from statsmodels.stats.proportion import proportion_confint  # takes a second to import

    return np.asarray(proportion_confint(counts, total, alpha=2 * (1 - confidence), method="beta")[1])


def bound(count: float, total: int, confidence: float, limit: float | None) -> float:
    """The upper bound of a share; where a limit chose the threshold, one that allows for the choice.

    That is the bound of the largest whole count within the limit, which without ties is the count itself.
    With ties the count may be smaller by chance, and its own bound would fail too often.
    """
    own = float(upper(np.array(count), total, confidence))
    if limit is None or own > limit:
        return own
    allowed = upper(np.arange(int(limit * total) + 1.0), total, confidence)
    return max(own, float(allowed[allowed <= limit].max()))


def band(total: int, confidence: float) -> float:
    """How far a share may lie from the truth, to one side, at all thresholds at once."""
    return math.sqrt(-math.log(1 - confidence) / (2 * total))
