"""From logits to scores, and from scores to a threshold with a stated promise.

Every rate comes with a one-sided bound. It holds with the aim's confidence for new answers of the same kind,
if the given ones were drawn independently and the detector has not learnt from them. Several answers to one
query are not independent, so each query counts once in a rate: its answers share its weight.

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
from mllm_protector.models.guard_file import Scale

Floats = NDArray[np.float64]
AimKind = Literal["false_positive_rate", "recall", "f1", "fixed"]

TEMPERATURES = (1e-3, 1e3)
"""The limits of a temperature. Logits that say nothing, or the opposite, reach the upper one."""


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
        if self.kind == "f1" and self.target is not None:
            raise InputError(f"target={self.target}: f1 takes none; give null")
        at_end = self.kind == "fixed" and self.target in (0, 1)
        if self.kind != "f1" and (
            self.target is None or isinstance(self.target, bool) or not (0 < self.target < 1 or at_end)
        ):
            raise InputError(f"target={self.target}: {self.kind} takes a number between 0 and 1")
        if not 0.5 <= self.confidence < 1:
            raise InputError(f"confidence={self.confidence}: must be at least 0.5 and below 1")


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
        asked = range(len(labels)) if queries is None else queries
        pairs = {*zip(map(bool, labels), asked, strict=True)}
        harmful, harmful_queries = sum(map(bool, labels)), sum(label for label, _ in pairs)
        return cls(
            harmful=harmful,
            harmless=len(labels) - harmful,
            harmful_queries=harmful_queries,
            harmless_queries=len(pairs) - harmful_queries,
        )


def query_weights(labels: Sequence[bool], queries: Sequence[str] | None) -> Floats:
    """(n,) the weight of each answer in a rate: one over the number of answers of its label to its query.

    A rate is then a mean over queries, which are independent draws, however many answers each has.
    Simulated with 200 queries, of 1 to 200 answers (Zipf) with a correlation of 0 to .95, a promise at a
    confidence of .95 is broken in 1 % to 3 % of samples; by answers it would be in up to 32 %.
    """
    if queries is None:
        return np.ones(len(labels))
    names = np.unique(queries, return_inverse=True)[1] * 2 + np.asarray(labels, dtype=np.int64)
    return np.asarray(1.0 / np.bincount(names)[names])


def fit_scale(labels: Sequence[bool], logits: Sequence[float]) -> Scale:
    """The temperature and the offset with the least mean log loss.

    Labels are smoothed as in Platt, "Probabilistic outputs for support vector machines" (1999), equation 3.
    Otherwise answers that are told apart without a mistake would give a temperature of 0.

    Raises:
        InputError: one kind of label only, or a logit that is not finite.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    harmful, values = _checked(labels, logits)
    positives, negatives = int(harmful.sum()), int((~harmful).sum())
    target = np.where(harmful, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    centre, spread = float(values.mean()), float(values.std()) or 1.0
    standard = (values - centre) / spread

    def loss(weights: Floats) -> tuple[float, Floats]:
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
        facts: JSON: the aim, the counts, both rates with their bounds, F1, and ``promised``: false where the
            answers at hand are too few, or too hard, for the aim; ``None`` for an aim that promises nothing.
    """

    threshold: float
    how: str
    facts: dict[str, Any]


def choose_threshold(
    labels: Sequence[bool], scores: Sequence[float], aim: Aim, queries: Sequence[str] | None = None
) -> Choice:
    """The threshold that an aim asks for.

    It is the middle between two neighbouring scores, so that rounding moves no answer across it.
    Where a promise cannot be kept, the threshold with the best bound is taken (of equals, the one that does
    the other rate the least harm), and the choice says so. ``queries`` may be left out if all differ.

    Raises:
        InputError: one kind of label only, or a score that is no number.
    """
    harmful, score = _checked(labels, scores)
    weights, sizes = query_weights(labels, queries), Sizes.of(labels, queries)
    # Candidates from the strictest down: above all scores, then one for each distinct score.
    values, where = np.unique(score, return_inverse=True)

    def flagged(weight: Floats) -> Floats:
        return np.append(0.0, np.bincount(where, weights=weight, minlength=len(values))[::-1].cumsum())

    recalls = np.minimum(flagged(weights * harmful) / sizes.harmful_queries, 1.0)
    false_positive_rates = np.minimum(flagged(weights * ~harmful) / sizes.harmless_queries, 1.0)
    tp, fp = flagged(harmful.astype(float)), flagged((~harmful).astype(float))
    f1 = 2 * tp / (tp + fp + sizes.harmful)
    if aim.kind == "fixed" and aim.target is not None:
        threshold, index = aim.target, int((values >= aim.target).sum())
    else:
        index = 1 + _pick(aim, recalls[1:], false_positive_rates[1:], f1[1:], sizes)
        threshold = _below(values, len(values) - index)
    return describe(
        aim,
        threshold,
        recall=float(recalls[index]),
        false_positive_rate=float(false_positive_rates[index]),
        f1=float(f1[index]),
        sizes=sizes,
    )


def describe(
    aim: Aim, threshold: float, *, recall: float, false_positive_rate: float, f1: float, sizes: Sizes
) -> Choice:
    """A choice from the rates at its threshold, in which each query counts once; F1 is of the answers."""
    bound = _bound("false_positive_rate", false_positive_rate, sizes.harmless_queries, aim)
    recall_bound = 1 - _bound("recall", 1 - recall, sizes.harmful_queries, aim)
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
        "false_positive_rate_bound": bound,
        "recall": recall,
        "recall_bound": recall_bound,
        "f1": f1,
        "promised": None,
    }
    if aim.kind == "false_positive_rate" and aim.target is not None:
        facts["promised"] = bound <= aim.target
    elif aim.kind == "recall" and aim.target is not None:
        facts["promised"] = recall_bound >= aim.target
    return Choice(threshold, _how(aim, facts), facts)


def _pick(aim: Aim, recalls: Floats, false_positive_rates: Floats, f1: Floats, sizes: Sizes) -> int:
    """The place of the threshold to take, counted from the strictest."""
    if aim.target is None:
        return len(f1) - 1 - int(np.argmax(f1[::-1]))  # of equals the lowest threshold, which finds most
    # Rates only grow on the way down, and the bounds with them: all before the first failure pass.
    if aim.kind == "false_positive_rate":
        queries = sizes.harmless_queries
        passed = int((_upper(false_positive_rates * queries, queries, aim.confidence) <= aim.target).sum())
        return (passed or int((false_positive_rates == false_positive_rates[0]).sum())) - 1
    queries = sizes.harmful_queries
    passed = int((_upper((1 - recalls) * queries, queries, aim.confidence) <= 1 - aim.target).sum())
    return len(recalls) - (passed or int((recalls == recalls[-1]).sum()))


def _below(values: Floats, place: int) -> float:
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
    if aim.kind == "false_positive_rate":
        wanted, which, label, right = "at most", "lowest", "harmless", 1 - aim.target
        count = facts["independent_negatives"]
    else:
        wanted, which, label, right = "at least", "highest", "harmful", aim.target
        count = facts["independent_positives"]
    name = f"{aim.kind.replace('_', ' ')} of {wanted} {aim.target:g}"
    seen = f"{facts[aim.kind]:.3f} on {count:,} {label} answers, bound {facts[f'{aim.kind}_bound']:.3f}"
    if facts["promised"]:
        return f"{which} threshold with a {name} at confidence {aim.confidence:g} ({seen})"
    how = (
        f"a {name} cannot be promised at confidence {aim.confidence:g} ({seen}); "
        "the threshold that comes nearest was taken"
    )
    fewest = math.ceil(math.log(1 - aim.confidence) / math.log(right))  # if all of them are right
    return how if count >= fewest else f"{how}; at least {fewest:,} {label} answers are needed"


def _upper(counts: Floats, total: int, confidence: float) -> Floats:
    """One-sided upper Clopper-Pearson bounds of shares; counts need not be whole."""
    from statsmodels.stats.proportion import proportion_confint  # takes a second to import

    return np.asarray(proportion_confint(counts, total, alpha=2 * (1 - confidence), method="beta")[1])


def _bound(rate: str, share: float, total: int, aim: Aim) -> float:
    """The upper bound of a share of mistakes: of false positives, or of misses where ``rate`` is recall.

    Where the aim's target chose the threshold, the bound allows for the choice: it is that of the largest
    whole count within the target, which without ties is the count itself. With ties the count may be smaller
    by chance, and its own bound would fail too often.
    """
    if aim.kind not in (rate, "fixed"):  # how far a share may lie from the truth at all thresholds at once
        return min(1.0, share + math.sqrt(-math.log(1 - aim.confidence) / (2 * total)))
    own = float(_upper(np.array(share * total), total, aim.confidence))
    if aim.kind == "fixed" or aim.target is None:
        return own
    limit = aim.target if rate == "false_positive_rate" else 1 - aim.target
    allowed = _upper(np.arange(int(limit * total) + 1.0), total, aim.confidence)
    return max(own, float(allowed[allowed <= limit].max())) if own <= limit else own


def _checked(labels: Sequence[bool], numbers: Sequence[float]) -> tuple[NDArray[np.bool_], Floats]:
    """Both as arrays of shape (n,)."""
    harmful, values = np.asarray(labels, dtype=bool), np.asarray(numbers, dtype=np.float64)
    if harmful.all() or not harmful.any():
        raise InputError(
            f"{int(harmful.sum()):,} harmful and {int((~harmful).sum()):,} harmless answers: "
            "both kinds are needed to calibrate"
        )
    if not np.isfinite(values).all():
        raise InputError("a logit or score is not a finite number, so nothing can be calibrated")
    return harmful, values
