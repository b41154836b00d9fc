"""How a logit becomes a score: score = sigmoid((logit + offset) / temperature)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.05
"""Of both tests that choose a scale: so often are scores changed that were right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How a logit becomes a score. No scale changes the order of two answers.

    Attributes:
        temperature: positive.
        offset: in logits; positive makes every answer more harmful.
        p_unchanged: of the test that the scores as they are (temperature 1, offset 0) are right; ``None``
            where nobody tested.
        p_temperature: of the test that they need no offset beside a temperature.
    """

    temperature: float = 1.0
    offset: float = 0.0
    p_unchanged: float | None = None
    p_temperature: float | None = None

    def logits(self, logits: Sequence[float] | Floats) -> Floats:
        """The calibrated logits, shape (n,)."""
        return (np.asarray(logits, dtype=np.float64) + self.offset) / self.temperature

    def scores(self, logits: Sequence[float] | Floats) -> list[float]:
        """P(harmful) in [0, 1] of each answer; NaN where its logit is."""
        from scipy.special import expit

        scores: list[float] = expit(self.logits(logits)).tolist()
        return scores

    @property
    def how(self) -> str:
        """Which of the three it is and why, in one sentence."""
        if self.p_unchanged is None or self.p_temperature is None:
            return "not chosen on any answers"
        if self.p_unchanged >= LEVEL:
            return f"the scores as they are: the answers do not reject them ({_p(self.p_unchanged)})"
        rejected = f"the answers reject the scores as they are ({_p(self.p_unchanged)})"
        if self.p_temperature >= LEVEL:
            return f"a temperature: {rejected} and ask for no offset ({_p(self.p_temperature)})"
        return f"a temperature and an offset: {rejected} and a temperature alone ({_p(self.p_temperature)})"


def _p(value: float) -> str:
    return f"p = {value:.2g}" if value >= 1e-4 else "p < 0.0001"
