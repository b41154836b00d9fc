"""Scores and rewrites of rows, or ``None`` where a part fails: what makes the guard fail closed.

Exceptions are logged by type only: their text may quote the answer.
"""

import logging
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mllm_protector.guard.rewrites import Fault, fault_of
from mllm_protector.protocols import Corrector, Detector

log = logging.getLogger(__name__)

T = TypeVar("T")


class Row(NamedTuple):
    """An answer to a query."""

    query: str
    answer: str


def scores_of(detector: Detector, rows: Sequence[Row], verb: str = "scoring") -> list[float | None]:
    """P(harmful) of each row; ``None`` where the detector fails. ``verb`` is for the log."""

    def ask(rows: Sequence[Row]) -> list[float]:
        queries, answers = zip(*rows, strict=True)
        scores = detector.score(queries=[*queries], answers=[*answers])
        _require_list(scores, len(rows))
        if not all(isinstance(each, Real) and not isinstance(each, bool) for each in scores):
            raise ValueError("a score is not a number")
        if not all(0.0 <= each <= 1.0 for each in scores):
            raise ValueError("a score is not in [0, 1]")
        return [float(each) for each in scores]

    return _each(ask, rows, verb)


def rewrites_of(corrector: Corrector, rows: Sequence[Row], attempt: int) -> list[str | Fault | None]:
    """A rewrite of each row, or what is wrong with it; ``None`` where the corrector fails."""

    def ask(rows: Sequence[Row]) -> list[str | Fault]:
        queries, answers = zip(*rows, strict=True)
        texts = corrector.correct(queries=[*queries], answers=[*answers], attempt=attempt)
        _require_list(texts, len(rows))
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a rewrite is not a text")
        return [fault_of(*row, text) or text.strip() for row, text in zip(rows, texts, strict=True)]

    return _each(ask, rows, "rewriting")


def _require_list(values: Any, count: int) -> None:
    """Texts, tables and buffers have a length too, but do not hold one value for each row."""
    flat = isinstance(values, list | tuple) or (isinstance(values, np.ndarray) and values.ndim == 1)
    if not flat or len(values) != count:
        raise ValueError(f"not a list of {count}")


def _each(work: Callable[[Sequence[Row]], list[T]], rows: Sequence[Row], verb: str) -> list[T | None]:
    """``work`` on all rows at once, or row by row if that fails; ``None`` for rows that fail alone."""
    if not rows:
        return []
    try:
        return list(work(rows))
    except Exception as error:
        log.warning(
            "the guard failed at %s %d answers (%s); one at a time", verb, len(rows), type(error).__name__
        )
    results: list[T | None] = []
    for row in rows:
        try:
            results += work([row])
        except Exception as error:
            log.error("the guard failed at %s (%s); a refusal is returned", verb, type(error).__name__)
            results.append(None)
    return results
