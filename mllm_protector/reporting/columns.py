"""The columns of the tables: each has a heading, a metric, and how its values are shown."""

from mllm_protector.records import Outcome, Status
from mllm_protector.reporting.tables import (
    Column,
    bounds,
    count,
    counted,
    decimal,
    p_value,
    points,
    share,
    total,
)

HEADLINE: tuple[Column, ...] = (
    ("macro", "macro_asr", share),
    ("pooled", "asr", share),
    ("unjudged", "unjudged", count),
    ("bounds", "asr_bounds", bounds),
    ("corrected", "corrected_asr", share),
    ("macro difference", "macro_asr_difference", points),
    ("p", "macro_asr_difference_p", p_value),
    ("pooled difference", "asr_difference", points),
    ("pooled p", "asr_difference_p", p_value),
)
IMAGE_EFFECT: tuple[Column, ...] = (
    ("n", "image_effect", total),
    ("as text", "text_asr", share),
    ("with image", "image_asr", share),
    ("difference", "image_effect", points),
    ("p", "image_effect_p", p_value),
)
HARMLESS: tuple[Column, ...] = (
    ("changed", "changed", counted),
    ("refused", "refused", counted),
    ("mean score", "score", share),
    ("correct answers lost", "lost", counted),
    ("without an answer", "unanswered", count),
)
TWINS: tuple[Column, ...] = (
    ("both right", "twins_right", counted),
    ("difference", "twins_difference", points),
    ("p", "twins_difference_p", p_value),
)
OUTCOMES: tuple[Column, ...] = tuple(
    (str(outcome).replace("_", " "), f"outcome_{outcome}", count) for outcome in Outcome
)
STATUSES: tuple[Column, ...] = tuple((str(status).replace("_", " "), str(status), count) for status in Status)
REFERENCE: tuple[Column, ...] = (
    ("accuracy", "accuracy", counted),
    *((name, name, count) for name in ("tp", "fp", "fn", "tn")),
    ("kappa", "kappa", decimal),
)
AGREEMENT: tuple[Column, ...] = (
    ("answers", "agreement", total),
    ("agree", "agreement", share),
    ("Cohen's kappa", "agreement_kappa", decimal),
    ("Fleiss' kappa", "fleiss_kappa", decimal),
)
CHANGED: tuple[Column, ...] = (
    ("made safe", "made_safe", count),
    ("made harmful", "made_harmful", count),
)
LABELLED: tuple[Column, ...] = (
    ("harmful and unchanged", "labelled_asr", counted),
    ("harmful answers stopped", "stopped", counted),
    ("safe answers changed", "safe_changed", counted),
)
ARMS: tuple[Column, ...] = (
    ("attack success rate", "macro_asr", share),
    ("unjudged", "unjudged", count),
    ("difference", "macro_asr_difference", points),
    ("harmless questions refused", "refused", counted),
    ("harmless answers changed", "changed", counted),
    ("pairs of twins right", "twins_right", counted),
    ("ms added, median", "latency_median_ms", count),
)
TRADE_OFF: tuple[Column, ...] = (
    ("attack success rate", "threshold_asr", share),
    ("harmless answers flagged", "threshold_flagged", share),
)
_TABLES = (
    *(HEADLINE, IMAGE_EFFECT, HARMLESS, TWINS, OUTCOMES, STATUSES),
    *(REFERENCE, AGREEMENT, CHANGED, LABELLED, TRADE_OFF),
)
KNOWN = {"macro_asr_bounds", "correct", "cut"} | {metric for table in _TABLES for _, metric, _ in table}
"""The metrics that have a table or a sentence of their own."""
