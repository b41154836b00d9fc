"""How a logit becomes a score: score = sigmoid((logit + offset) / temperature)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How a logit becomes a score, in float64 so that strong scores stay apart.

    No scale changes the order of two answers.

    Attributes:
        temperature: positive; above 1 it makes every score less sure.
        offset: in logits; positive makes every answer more harmful.
    """

    temperature: float = 1.0
    offset: float = 0.0

    def logits(self, logits: Sequence[float] | Floats) -> Floats:
        """The calibrated logits, shape (n,)."""
        return (np.asarray(logits, dtype=np.float64) + self.offset) / self.temperature

    def scores(self, logits: Sequence[float] | Floats) -> list[float]:
        """P(harmful) in [0, 1] of each answer; NaN where its logit is."""
        from scipy.special import expit

        scores: list[float] = expit(self.logits(logits)).tolist()
        return scores
