"""From logits to scores, and from scores to a threshold with a stated promise.

Pure functions of labels (True for harmful), logits and scores. Every rate comes with a one-sided bound. It
holds with the aim's confidence for new answers of the same kind, if the given ones were drawn independently
and the detector has not learnt from them. Several answers to one query are not independent, so each query
counts once in a rate: its answers share its weight (``query_weights``).

- The rate that was aimed at: Clopper-Pearson (exact). Thresholds are tested one after the other, from the one
  that serves the aim best, up to the first that fails, so the bound holds although the threshold is chosen on
  the same answers. Source: fixed-sequence testing in Angelopoulos et al., "Learn then Test"
  (arXiv 2110.01052), section 2.
- A rate that the choice of the threshold may have favoured: the band of Dvoretzky, Kiefer and Wolfowitz with
  Massart's constant (Annals of Probability 18, 1990), which holds for all thresholds at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mllm_protector.errors import InputError
from mllm_protector.guard.bounds import Sizes, band, bound, query_weights, upper
from mllm_protector.models.scale import Scale

AimKind = Literal["false_positive_rate", "recall", "f1", "fixed"]

PROMISED = ("false_positive_rate", "recall")
"""The aims that promise a rate."""

AT_ENDS = (("fixed", 0.0), ("fixed", 1.0))

TEMPERATURES = (1e-3, 1e3)
"""The limits of a temperature. Logits that say nothing, or the opposite, reach the upper one."""


def require_threshold(name: str, value: Any) -> None:
    """Refuse what is no number from 0 to 1.

    Args:
        name: of the key, for the message.
        value: as it was given; true and false are no numbers here.

    Raises:
        InputError: it cannot be a threshold.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{name}={value}: must be a number from 0 to 1")


@dataclass(frozen=True, slots=True)
class Aim:
    """What a threshold is chosen for.

    Attributes:
        kind: ``false_positive_rate``: the lowest threshold at which at most ``target`` of the harmless
            answers are flagged. ``recall``: the highest one at which at least ``target`` of the harmful
            answers are flagged. ``f1``: the best F1 on the data. ``fixed``: ``target`` itself.
        target: strictly between 0 and 1 (of ``fixed`` also 0 or 1); ``None`` for ``f1``.
        confidence: of the bounds.
    """

    kind: AimKind
    target: float | None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.kind not in (*PROMISED, "f1", "fixed"):
            raise InputError(f"kind={self.kind}: choose false_positive_rate, recall, f1 or fixed")
        if self.kind == "f1":
            if self.target is not None:
                raise InputError(f"target={self.target}: f1 takes none; give null")
        elif (
            self.target is None
            or isinstance(self.target, bool)
            or not (0 < self.target < 1 or (self.kind, self.target) in AT_ENDS)
        ):
            raise InputError(f"target={self.target}: {self.kind} takes a number between 0 and 1")
        if not 0.5 <= self.confidence < 1:
            raise InputError(f"confidence={self.confidence}: must be at least 0.5 and below 1")


def fit_scale(labels: Sequence[bool], logits: Sequence[float]) -> Scale:
    """The temperature and the offset with the least mean log loss.

    Labels are smoothed as in Platt, "Probabilistic outputs for support vector machines" (1999), equation 3.
    Otherwise answers that are told apart without a mistake would give a temperature of 0.

    Args:
        labels: of answers that the detector has not learnt from; both kinds must occur.
        logits: finite numbers.

    Raises:
        InputError: one kind of label only, or a logit that is not finite.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    harmful, values = checked(labels, logits)
    positives, negatives = int(harmful.sum()), int((~harmful).sum())
    target = np.where(harmful, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    centre, spread = float(values.mean()), float(values.std()) or 1.0
    standard = (values - centre) / spread

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scaled = weights[0] * standard + weights[1]
        wrong = expit(scaled) - target
        gradient = np.array([np.mean(wrong * standard), np.mean(wrong)])
        return float(np.mean(np.logaddexp(0.0, scaled) - target * scaled)), gradient

    # Logistic regression, convex in the slope (1 / temperature) and the intercept.
    slopes = (spread / TEMPERATURES[1], spread / TEMPERATURES[0])
    precision = {"ftol": 1e-15, "gtol": 1e-10}
    found = minimize(loss, [slopes[0], 0.0], jac=True, bounds=[slopes, (None, None)], options=precision)
    temperature = spread / float(found.x[0])
    return Scale(temperature=temperature, offset=float(found.x[1]) * temperature - centre)


@dataclass(frozen=True, slots=True)
class Choice:
    """A threshold and why it is this one.

    Attributes:
        threshold: in [0, 1]; scores at or above it are harmful.
        how: one sentence.
        facts: JSON: the aim, the counts, both rates with their bounds, F1, and ``promised``, which is false
            where the answers at hand are too few, or too hard, for what was aimed at (``None`` for an aim
            that promises nothing).
    """

    threshold: float
    how: str
    facts: dict[str, Any]


def choose_threshold(
    labels: Sequence[bool], scores: Sequence[float], aim: Aim, queries: Sequence[str] | None = None
) -> Choice:
    """The threshold that an aim asks for.

    It stands in the middle between two neighbouring scores, so that rounding moves no answer across it.
    Where a promise cannot be kept, the threshold with the best bound is taken (of equals, the one that does
    the other rate the least harm), and the choice says so; the caller should say it too.

    Args:
        labels: both kinds must occur.
        scores: in [0, 1].
        aim: what it is for.
        queries: what each answer is an answer to (see ``query_weights``); ``None`` if no two answers share
            one.

    Raises:
        InputError: one kind of label only, or a score that is no number.
    """
    harmful, score = checked(labels, scores)
    weights, sizes = query_weights(labels, queries), Sizes.of(labels, queries)
    # Candidates from the strictest down: above all scores, then one for each distinct score.
    values, where = np.unique(score, return_inverse=True)

    def flagged(weight: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.append(0.0, np.bincount(where, weights=weight, minlength=len(values))[::-1].cumsum())

    recalls = np.minimum(flagged(weights * harmful) / sizes.harmful_queries, 1.0)
    alarm_rates = np.minimum(flagged(weights * ~harmful) / sizes.harmless_queries, 1.0)
    found, alarms = flagged(harmful.astype(float)), flagged((~harmful).astype(float))
    f1 = 2 * found / (found + alarms + sizes.harmful)
    if aim.kind == "fixed" and aim.target is not None:
        threshold, index = aim.target, int((values >= aim.target).sum())
    else:
        index = 1 + _pick(aim, recalls[1:], alarm_rates[1:], f1[1:], sizes)
        threshold = _below(values, len(values) - index)
    return describe(
        aim,
        threshold,
        recall=float(recalls[index]),
        false_positive_rate=float(alarm_rates[index]),
        f1=float(f1[index]),
        sizes=sizes,
    )


def describe(
    aim: Aim, threshold: float, *, recall: float, false_positive_rate: float, f1: float, sizes: Sizes
) -> Choice:
    """A choice with its figures, from the rates at its threshold.

    Args:
        aim: what the threshold was chosen for.
        threshold: in [0, 1].
        recall: of harmful answers, the share at or above it; each query counts once.
        false_positive_rate: of harmless answers, likewise.
        f1: of the answers as they are.
        sizes: of what the rates were measured on.
    """
    chosen = aim.target if aim.kind in PROMISED else None
    alarms, misses = false_positive_rate * sizes.harmless_queries, (1 - recall) * sizes.harmful_queries
    alarm_bound = min(1.0, false_positive_rate + band(sizes.harmless_queries, aim.confidence))
    miss_bound = min(1.0, 1 - recall + band(sizes.harmful_queries, aim.confidence))
    if aim.kind in ("false_positive_rate", "fixed"):
        alarm_bound = bound(alarms, sizes.harmless_queries, aim.confidence, chosen)
    if aim.kind in ("recall", "fixed"):
        miss_bound = bound(
            misses, sizes.harmful_queries, aim.confidence, None if chosen is None else 1 - chosen
        )
    facts: dict[str, Any] = {
        "aim": aim.kind,
        "target": aim.target,
        "confidence": aim.confidence,
        "n": sizes.harmful + sizes.harmless,
        "positives": sizes.harmful,
        "negatives": sizes.harmless,
        "independent_positives": sizes.harmful_queries,
        "independent_negatives": sizes.harmless_queries,
        "false_positive_rate": false_positive_rate,
        "false_positive_rate_bound": alarm_bound,
        "recall": recall,
        "recall_bound": 1 - miss_bound,
        "f1": f1,
        "promised": None,
    }
    if aim.kind == "false_positive_rate":
        facts["promised"] = facts["false_positive_rate_bound"] <= aim.target
    elif aim.kind == "recall":
        facts["promised"] = facts["recall_bound"] >= aim.target
    return Choice(threshold, _how(aim, facts), facts)


def _pick(
    aim: Aim,
    recalls: NDArray[np.float64],
    alarm_rates: NDArray[np.float64],
    f1: NDArray[np.float64],
    sizes: Sizes,
) -> int:
    """The place of the threshold to take, counted from the strictest."""
    if aim.target is None:
        return len(f1) - 1 - int(np.argmax(f1[::-1]))  # of equals the lowest threshold, which finds most
    # Rates only grow on the way down, and the bounds with them: all before the first failure pass.
    if aim.kind == "false_positive_rate":
        queries = sizes.harmless_queries
        passed = int((upper(alarm_rates * queries, queries, aim.confidence) <= aim.target).sum())
        return (passed or int((alarm_rates == alarm_rates[0]).sum())) - 1
    queries = sizes.harmful_queries
    passed = int((upper((1 - recalls) * queries, queries, aim.confidence) <= 1 - aim.target).sum())
    return len(recalls) - (passed or int((recalls == recalls[-1]).sum()))


def _below(values: NDArray[np.float64], place: int) -> float:
    """Halfway between a score and the next lower one or 0; the score itself where no number is between."""
    score, lower = float(values[place]), float(values[place - 1]) if place else 0.0
    middle = (score + lower) / 2
    return middle if middle > lower else score


def _how(aim: Aim, facts: dict[str, Any]) -> str:
    """A choice in one sentence."""
    if aim.kind == "fixed":
        return "fixed"
    if aim.target is None:
        return f"best F1 ({facts['f1']:.3f}) on {facts['n']:,} answers"
    name, wanted, kind = (
        ("false positive rate", f"at most {aim.target:g}", "harmless")
        if aim.kind == "false_positive_rate"
        else ("recall", f"at least {aim.target:g}", "harmful")
    )
    count = facts["independent_negatives" if kind == "harmless" else "independent_positives"]
    seen = f"{facts[aim.kind]:.3f} on {count:,} {kind} answers, bound {facts[f'{aim.kind}_bound']:.3f}"
    if facts["promised"]:
        which = "lowest" if kind == "harmless" else "highest"
        return f"{which} threshold with a {name} of {wanted} at confidence {aim.confidence:g} ({seen})"
    words = (
        f"a {name} of {wanted} cannot be promised at confidence {aim.confidence:g} ({seen}); "
        "the threshold that comes nearest was taken"
    )
    right = 1 - aim.target if kind == "harmless" else aim.target
    fewest = math.ceil(math.log(1 - aim.confidence) / math.log(right))  # so many, if all of them are right
    return words if count >= fewest else f"{words}; at least {fewest:,} {kind} answers are needed"


def checked(
    labels: Sequence[bool], numbers: Sequence[float]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Labels and numbers as arrays of shape (n,).

    Raises:
        InputError: one kind of label only, or a number that is not finite.
    """
    if len(labels) != len(numbers):
        raise ValueError(f"{len(labels)} labels but {len(numbers)} numbers")
    harmful, values = np.asarray(labels, dtype=bool), np.asarray(numbers, dtype=np.float64)
    if harmful.all() or not harmful.any():
        raise InputError(
            f"{int(harmful.sum()):,} harmful and {int((~harmful).sum()):,} harmless answers: "
            "both kinds are needed to calibrate"
        )
    if not np.isfinite(values).all():
        raise InputError("a logit or score is not a finite number, so nothing can be calibrated")
    return harmful, values
