"""How measurements are shown: cells, and the columns of every table."""

from collections.abc import Callable, Mapping
from typing import Any

from mllm_protector.records import Outcome, Status
from mllm_protector.reporting.tables import decimal, p_value, percent, points, with_interval

Row = Mapping[str, Any]
"""A measurement as in ``asr.json``."""


def share_cell(row: Row) -> str:
    """A share with its interval in percent."""
    return with_interval(row["value"], row["low"], row["high"])


def counted_cell(row: Row) -> str:
    """A share with its interval in percent, and the counts."""
    if row["value"] is None:
        return "-"
    return f"{share_cell(row)} ({round(row['value'] * row['n']):,}/{row['n']:,})"


def count_cell(row: Row) -> str:
    """A count."""
    return f"{row['value']:,.0f}"


def of_cell(row: Row) -> str:
    """What a number rests on."""
    return f"{row['n']:,}"


def bounds_cell(row: Row) -> str:
    """The limits alone, in percent."""
    return f"{percent(row['low'])} to {percent(row['high'])}"


def points_cell(row: Row) -> str:
    """A difference with its interval, in percentage points."""
    return points(row["value"], row["low"], row["high"])


def p_cell(row: Row) -> str:
    """A p-value."""
    return p_value(row["value"])


def decimal_cell(row: Row) -> str:
    """A number with its interval."""
    value, low, high = (decimal(row[name], 3) for name in ("value", "low", "high"))
    return value if low == "-" else f"{value} [{low}, {high}]"


Cell = Callable[[Row], str]
Column = tuple[str, str, Cell]
"""A heading, a metric, and how it is shown."""

HEADLINE: tuple[Column, ...] = (
    ("macro", "macro_asr", share_cell),
    ("pooled", "asr", share_cell),
    ("unjudged", "unjudged", count_cell),
    ("bounds", "asr_bounds", bounds_cell),
    ("corrected", "corrected_asr", share_cell),
    ("difference", "asr_difference", points_cell),
    ("p", "asr_difference_p", p_cell),
)
IMAGE_EFFECT: tuple[Column, ...] = (
    ("n", "image_effect", of_cell),
    ("as text", "text_asr", share_cell),
    ("with image", "image_asr", share_cell),
    ("difference", "image_effect", points_cell),
    ("p", "image_effect_p", p_cell),
)
HARMLESS: tuple[Column, ...] = (
    ("changed", "changed", counted_cell),
    ("refused", "refused", counted_cell),
    ("mean score", "score", share_cell),
    ("correct answers lost", "lost", counted_cell),
    ("without an answer", "unanswered", count_cell),
)
OUTCOMES: tuple[Column, ...] = tuple(
    (str(outcome).replace("_", " "), f"outcome_{outcome}", count_cell) for outcome in Outcome
)
STATUSES: tuple[Column, ...] = tuple(
    (str(status).replace("_", " "), str(status), count_cell) for status in Status
)
REFERENCE: tuple[Column, ...] = (
    ("accuracy", "accuracy", counted_cell),
    *((name, name, count_cell) for name in ("tp", "fp", "fn", "tn")),
    ("kappa", "kappa", decimal_cell),
)
AGREEMENT: tuple[Column, ...] = (
    ("answers", "agreement", of_cell),
    ("agree", "agreement", share_cell),
    ("Cohen's kappa", "agreement_kappa", decimal_cell),
    ("Fleiss' kappa", "fleiss_kappa", decimal_cell),
)
CHANGED: tuple[Column, ...] = (
    ("made safe", "made_safe", count_cell),
    ("made harmful", "made_harmful", count_cell),
)
TRADE_OFF: tuple[Column, ...] = (
    ("attack success rate", "threshold_asr", share_cell),
    ("harmless answers flagged", "threshold_flagged", share_cell),
)
KNOWN = {
    "macro_asr_bounds",
    "correct",
    "cut",
    *(
        metric
        for columns in (
            *(HEADLINE, IMAGE_EFFECT, HARMLESS, OUTCOMES, STATUSES, REFERENCE, AGREEMENT, CHANGED, TRADE_OFF),
        )
        for _, metric, _ in columns
    ),
}
"""The metrics that have a table or a sentence of their own."""
