"""From logits to scores that mean what they say: the simplest scale that the answers at hand do not reject.

score = sigmoid((logit + offset) / temperature). A temperature mends scores that are too sure or not sure
enough; an offset mends scores that are all too high or all too low. On few answers both are mostly noise, so
they are taken only where a test asks for them. Pure functions, in float64 so that strong scores stay apart.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mllm_protector.guard.calibration import checked
from mllm_protector.models.scale import LEVEL, Floats, Scale

TEMPERATURES = (1e-3, 1e3)
"""The limits of a temperature; the upper one is reached by logits that tell nothing, or the opposite."""


def fit_scale(labels: Sequence[bool], logits: Sequence[float], queries: Sequence[str] | None = None) -> Scale:
    """The simplest of three scales that the answers do not reject.

    Two likelihood ratio tests, at ``LEVEL``, in this order:

    1. The scores as they are, against a temperature and an offset (2 degrees of freedom). Not rejected: the
       scores stay as they are.
    2. A temperature, against a temperature and an offset (1 degree of freedom). Not rejected: the
       temperature. Rejected: both.

    The tests compare likelihoods of the labels as they are. The fits are to labels smoothed as in Platt,
    "Probabilistic outputs for support vector machines" (1999), equation 3: without that, answers that are
    told apart without a mistake would give a temperature of 0. A fit thus gains a little less than could be
    gained, and a test rejects a little too seldom. Answers to one query are not independent, so a gain is
    divided by a design effect that is estimated from them. (That each query counts once, as in the
    thresholds' bounds, would hide scores that are off: a bound may be too careful, a test may not.)

    Sources: temperature scaling, Guo et al. (arXiv 1706.04599), section 4.2; the offset, Platt; the design
    effect, Rao and Scott (Annals of Statistics 12, 1984), its first-order correction.

    Args:
        labels: both kinds must occur.
        logits: finite numbers.
        queries: what each answer is an answer to; ``None`` if no two answers share one.

    Raises:
        InputError: one kind of label only, or a logit that is no finite number.
    """
    from scipy.stats import chi2

    harmful, logit = checked(labels, logits)
    positives, negatives = int(harmful.sum()), int((~harmful).sum())
    smoothed = np.where(harmful, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    unchanged, temperature = Scale(), _fit(logit, smoothed, with_offset=False)
    both = _fit(logit, smoothed, with_offset=True)
    effect = 1.0 if queries is None else _design_effect(harmful, both.logits(logit), queries)

    def p_value(simple: Scale, degrees: int) -> float:
        gain = _loss(simple.logits(logit), harmful) - _loss(both.logits(logit), harmful)
        return float(chi2.sf(2 * max(gain, 0.0) * len(harmful) / effect, degrees))

    p_unchanged, p_temperature = p_value(unchanged, 2), p_value(temperature, 1)
    chosen = unchanged if p_unchanged >= LEVEL else temperature if p_temperature >= LEVEL else both
    return Scale(
        temperature=chosen.temperature,
        offset=chosen.offset,
        p_unchanged=p_unchanged,
        p_temperature=p_temperature,
    )


def _design_effect(harmful: NDArray[np.bool_], logits: Floats, queries: Sequence[str]) -> float:
    """How many times the variance of the fit grows because answers share queries; at least 1.

    The variance of the two derivatives of the likelihood, from their sums over each query, beside the one
    that independent answers would have.
    """
    from scipy.special import expit

    score, (names, query) = expit(logits), np.unique(queries, return_inverse=True)
    directions = np.stack([np.ones_like(logits), logits], axis=1)
    independent = directions.T @ ((score * (1 - score))[:, None] * directions)
    sums = np.zeros((len(names), 2))
    np.add.at(sums, query, (harmful - score)[:, None] * directions)
    clustered = sums.T @ sums * len(names) / max(len(names) - 1, 1)
    return max(1.0, float(np.trace(np.linalg.pinv(independent) @ clustered)) / 2)


def _fit(logit: Floats, target: Floats, *, with_offset: bool) -> Scale:
    """The scale of the least mean log loss, its temperature within ``TEMPERATURES``."""
    from scipy.optimize import minimize_scalar

    def scale(log_temperature: float) -> Scale:
        temperature = math.exp(log_temperature)
        offset = temperature * _intercept(logit / temperature, float(target.mean())) if with_offset else 0.0
        return Scale(temperature=temperature, offset=offset)

    def loss(log_temperature: float) -> float:
        return _loss(scale(log_temperature).logits(logit), target)

    low, high = map(math.log, TEMPERATURES)
    # Convex in 1 / temperature, also with the best offset for each, so there is one valley.
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-8})
    return scale(float(found.x))


def _intercept(scaled: Floats, share: float) -> float:
    """What to add to logits for the least log loss: their mean score is then the share of harmful answers."""
    from scipy.optimize import brentq
    from scipy.special import expit, logit

    middle = float(logit(share))
    low, high = middle - float(scaled.max()) - 1, middle - float(scaled.min()) + 1
    return float(brentq(lambda added: float(expit(scaled + added).mean()) - share, low, high))


def _loss(logits: Floats, target: NDArray[np.float64] | NDArray[np.bool_]) -> float:
    """The mean log loss."""
    return float(np.mean(np.logaddexp(0.0, logits) - target * logits))
